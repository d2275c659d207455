"""Triton kernels: loaded on use alone, since they need what only torch's CUDA builds bring."""
