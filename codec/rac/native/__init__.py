"""The C kernels through ctypes, and numba or numpy in their place where they were not built.

`kernel()` says which are in use. The package works with any, bit for bit the same.

library.py finds the kernels and chooses among instruction sets, prototypes.py has the types of all that they take;
every other module calls those of one job, with the numpy twin of each beside it.
"""

from rac.native.frequencies import (
    Fitted,
    classify,
    cluster,
    code_length,
    fit,
    golomb,
    join,
    log2,
    lookup,
    sum_classes,
    tables,
)
from rac.native.lanes import (
    ans_decode,
    column_histogram,
    decode_spans,
    encode_lanes,
    histogram,
    symbol_model,
)
from rac.native.library import available, cpus, kernel, using
from rac.native.packing import count_tiles, pack_tiles, pieces
from rac.native.prototypes import TILE_ERRORS, Dequant, TileCoding, TileJob, TileShared, TileSpan, address
from rac.native.records import CODERS, Row, Run, decode_records
from rac.native.words import planes, scan, symbols, tops

__all__ = [
    "CODERS",
    "TILE_ERRORS",
    "Dequant",
    "Fitted",
    "Row",
    "Run",
    "TileCoding",
    "TileJob",
    "TileShared",
    "TileSpan",
    "address",
    "ans_decode",
    "available",
    "classify",
    "cluster",
    "code_length",
    "column_histogram",
    "count_tiles",
    "cpus",
    "decode_records",
    "decode_spans",
    "encode_lanes",
    "fit",
    "golomb",
    "histogram",
    "join",
    "kernel",
    "log2",
    "lookup",
    "pack_tiles",
    "pieces",
    "planes",
    "scan",
    "sum_classes",
    "symbol_model",
    "symbols",
    "tables",
    "tops",
    "using",
]
