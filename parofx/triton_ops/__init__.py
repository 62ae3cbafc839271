"""Triton kernels for CUDA. There are none yet: on CUDA the reference provider serves every call."""
