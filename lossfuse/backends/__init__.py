"""The implementations, as functions of the same names: Triton kernels, or blocks of torch code."""
