"""The C kernels through ctypes, and numba or numpy in their place where they were not built.

`kernel()` says which are in use. The package works with any, bit for bit the same.

library.py finds the kernels and chooses among instruction sets, prototypes.py has the types of all that they take;
every other module calls those of one job, with the numpy twin of each beside it.
"""

from rac.native.frequencies import code_length, golomb, join, log2, lookup, sum_classes, tables
from rac.native.lanes import (
    ans_decode,
    count_segments,
    decode_spans,
    decode_tiles,
    encode_lanes,
    find,
    histogram,
    pair,
    symbol_model,
)
from rac.native.library import available, cpus, kernel, using
from rac.native.prototypes import SHORT, TILE_ERRORS, Dequant, TileJob, TileShared, TileSpan, address
from rac.native.words import gather, planes, scan, symbols, tops

__all__ = [
    "SHORT",
    "TILE_ERRORS",
    "Dequant",
    "TileJob",
    "TileShared",
    "TileSpan",
    "address",
    "ans_decode",
    "available",
    "code_length",
    "count_segments",
    "cpus",
    "decode_spans",
    "decode_tiles",
    "encode_lanes",
    "find",
    "gather",
    "golomb",
    "histogram",
    "join",
    "kernel",
    "log2",
    "lookup",
    "pair",
    "planes",
    "scan",
    "sum_classes",
    "symbol_model",
    "symbols",
    "tables",
    "tops",
    "using",
]
