"""Triton kernels, one file each."""
