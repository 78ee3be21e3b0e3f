"""Decoding on a GPU: job tables laid out in numpy, Triton kernels, and the operator that torch knows."""
