"""Kernels in C++ for CPUs, built where they are first used."""
