"""The parts of `FP8Monitor`: what is measured where, how it is added up and read, and how it is shown."""
