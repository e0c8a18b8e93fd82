"""Runs a test's function in real processes, over gloo, and ends them if they hang."""

from ranks import spawn

__all__ = ["spawn"]
