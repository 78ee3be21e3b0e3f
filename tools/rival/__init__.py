"""Quantisers of other papers, written anew from what the papers say: what `tools/rivals.py` measures beside RAC.

Each takes a matrix (out, in) with the damped second moment (in, in) of its inputs, and returns the bits that its
numbers take and the numbers. They are for measuring: nothing writes what they find to a file, but every bit that a
decoder would need is counted, unless the module says otherwise.
"""
