"""Every function and structure that Python and the C kernels (native/src) share.

Version and structures, field by field, are compared with the library's when it is loaded (src/layout.c). An array is
handed over by its address; who keeps an address in a structure keeps the array alive.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
F32 = NDArray[np.float32]
VERSION = 31  # changes with any function or structure
_start, _byref = ctypes.c_char.from_buffer, ctypes.byref


def address(a: Array | None) -> int:
    """Address of the first byte of an array, 0 for None."""
    if a is None:
        return 0
    try:
        whole: Any = a  # quick, but for whole and writable arrays only
        return ctypes.addressof(_start(whole))
    except (TypeError, ValueError):
        return int(a.__array_interface__["data"][0])


def _fields(text: str) -> list[tuple[str, Any]]:
    """Fields of a structure: their types, each with the names that have it."""
    kinds = {"at": c_void_p, "i32": c_int32, "i64": c_int64, "u32": c_uint32, "f32": c_float}
    parts = [part.split() for part in text.split(";")]
    return [(name, kinds[kind]) for kind, *names in parts for name in names]


class Matrix(ctypes.Structure):
    """A matrix with columns side by side."""

    _fields_ = _fields("at at; i64 rows cols stride")

    @classmethod
    def from_param(cls, a: Array) -> Any:
        """A numpy matrix of unit column stride as an argument."""
        return ctypes.byref(cls(address(a), *a.shape, a.strides[0] // a.itemsize))


class Flat:
    """An array, or None, as an argument: its address."""

    @staticmethod
    def from_param(a: Array | bytes | None) -> Any:
        """The address of an array; None and bytes as they are."""
        if a is None or isinstance(a, bytes):
            return a
        try:  # as in `address`, without its integer: a tile makes thirty such arguments
            whole: Any = a
            return _byref(_start(whole))
        except (TypeError, ValueError):
            return c_void_p(a.__array_interface__["data"][0])


class Dequant(ctypes.Structure):
    """What the words of a tensor stand for, see src/rac.h."""

    _fields_ = _fields("at rec; i32 h0 h1 zero size")


class TileShared(ctypes.Structure):
    """What all tiles of a tensor share under lanes/1, see src/tile.h."""

    _fields_ = _fields(
        "at luts values bases table;"
        "i32 row_classes col_classes skip lanes per word zero sign shift raw base first; u32 limit"
    )


class TileJob(ctypes.Structure):
    """One tile to be decoded, see src/tile.h."""

    _fields_ = _fields("at unit; i64 size; at row_class col_class dst; i64 rows cols stride; at shared numbers row col")


class TileSpan(ctypes.Structure):
    """Tiles of one tensor whose numbers follow each other, see src/tile.h."""

    _fields_ = [("all", TileJob), *_fields("at units; i64 first tiles tall wide word")]


class TileCoding(ctypes.Structure):
    """What encoding the tiles of a tensor under lanes/1 shares, see src/encode.h."""

    _fields_ = _fields(
        "at lut model escaping table bases;i32 row_classes col_classes tables lanes per word zero sign shift first skip"
    )


class Piece(ctypes.Structure):
    """A tile that is to be encoded, see src/encode.h; `packing.pieces` makes many at once."""

    _fields_ = _fields("at words row_class col_class; i64 rows cols stride")


class Stored(ctypes.Structure):
    """A record among others, see src/records.h; `records.row` makes one."""

    _fields_ = _fields("i64 stated stated_size at head payload check; at out; i64 size; i32 word coder")


class Quantiser(ctypes.Structure):
    """How the columns of a tensor are quantised (`trellis.Search`), as the kernel takes it."""

    _fields_ = _fields(
        "i32 states h0 h1 low levels most tables lag; i64 lane; at rec rate fine row below back; f32 far; i32 sparse"
    )


class Columns(ctypes.Structure):
    """The columns of one block, (n, m) column-major, and what `rac_quantise` finds (`trellis.block`)."""

    _fields_ = _fields("i64 cols rows groups; at plain target feed step out recon wild fine_of")


class Coded(ctypes.Structure):
    """A weight for products, see src/coded.h; `coded.Weight` makes one."""

    _fields_ = _fields("at codes rows columns places values; i64 out in_ apart kind")


class Team(ctypes.Structure):
    """What threads that make products share, see src/coded.h."""

    _fields_ = [
        ("open", c_uint64),
        ("apart1", ctypes.c_char * 56),
        ("left", c_int64),
        ("apart2", ctypes.c_char * 56),
        ("task", c_void_p),
        ("parallel", c_void_p),
        ("threads", c_int64),
        ("busy", c_int),
    ]


TILE_ERRORS = (
    "",
    "tile streams do not fill the unit exactly",
    "padding is not zero",
    "ANS lane begins with a zero word",
    "ANS lane does not end in its initial state",
    "escape counts do not match the symbols",
    "escaped value leaves the range of tops",
    "plane ends in non-zero bits",
    "not enough memory",
    "a word is larger than groups/1 allows",
    "checksum does not match",
)
"""What a kernel has found, by its number; 8 and 9 are never those of a tile that the CPU decodes."""
STRUCTURES = (
    Matrix,
    Dequant,
    TileShared,
    TileJob,
    TileSpan,
    Quantiser,
    Columns,
    TileCoding,
    Piece,
    Stored,
    Coded,
    Team,
)

_WORDS = {
    "rac_scan": (c_uint64, Flat, c_int64, c_uint64, c_int, Flat),
    "rac_symbols": (None, Flat, c_int64, c_int, c_int, c_int, Flat, Flat),
    "rac_planes": (None, Flat, c_int64, c_int, c_int, c_int, Flat, Flat),
}
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "rac_cpu": (c_int,),
    "rac_tables": (c_int, Flat, c_int64, c_int64, c_int64, c_int, Flat),
    "rac_lookup": (None, Flat, c_int64, c_int64, Flat, Flat),
    "rac_golomb": (c_int64, Flat, c_int64, c_int64, c_int, Flat),
    "rac_spans": (c_int, Flat, c_int64, POINTER(c_int64)),
    "rac_heads": (c_int64, Flat, c_int64, Flat, Flat, c_int64, c_int64, Flat, Flat),
    "rac_records": (c_int, Flat, c_int64, Flat, Flat, c_int64, c_int64, *[Flat] * 3, c_int64, Flat, c_int64),
    "rac_xxh3": (c_uint64, Flat, c_int64),
    "rac_untrellis": (None, Matrix, POINTER(Dequant), Flat, Flat, Matrix, Flat),
    "rac_ungroup": (c_int, Matrix, Matrix, Matrix, Matrix, c_int64, c_int64, c_int),
    "rac_unbits": (None, Flat, c_int64, c_int, Flat),
    "rac_product": (None, Matrix, Matrix, Matrix),
    "rac_factor": (c_int64, Flat, c_int64, Flat),
    "rac_multiply": (None, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    "rac_help": (None, c_void_p, c_int64),
    "rac_round": (None, Flat, c_int64, Flat, c_int),
    "rac_hist": (None, Flat, c_int64, c_int64, Flat, Flat, c_int64, Flat),
    "rac_hist_cols": (c_int, Flat, c_int64, c_int64, c_int64, Flat, c_int64, c_int64, Flat),
    "rac_count": (c_int, POINTER(TileCoding), Flat, c_int64, Flat),
    "rac_pack": (c_int, POINTER(TileCoding), Flat, c_int64, Flat, c_int64, Flat),
    "rac_sum": (None, Flat, Flat, c_int64, c_int64, Flat),
    "rac_log2": (None, Flat, c_int64, Flat, Flat),
    "rac_code_length": (None, Flat, c_int64, c_int64, Flat, c_int64, Flat),
    "rac_cluster": (c_int, Flat, *[c_int64] * 5, Flat, Flat, Flat),
    "rac_classify": (c_int, Flat, *[c_int64] * 5, *[Flat] * 7),
    "rac_fit": (None, Flat, c_int64, c_int64, Flat, c_int64, c_int64, c_int64, *[Flat] * 7),
    "rac_join": (None, *[Flat] * 7, c_int64, c_int64, c_int64, Flat, c_int64),
    "rac_encode": (c_int64, Flat, c_int64, Flat, c_int64, Flat, c_int64, Flat, c_int64, Flat),
    "rac_quantise": (c_int, POINTER(Quantiser), POINTER(Columns)),
    **{f"{name}{word}": types for name, types in _WORDS.items() for word in (1, 2, 4, 8)},
}
"""Result and arguments of each function."""
BRIEF = {"rac_tables", "rac_lookup"}
"""Functions so short that giving up the GIL for them makes threads wait for each other."""


def layout() -> list[tuple[str, int]]:
    """The version, and of each structure its bytes and the offsets of its fields, each with a name for errors."""
    out = [("version", VERSION)]
    for kind in STRUCTURES:
        out.append((kind.__name__, ctypes.sizeof(kind)))
        out += [(f"{kind.__name__}.{name}", getattr(kind, name).offset) for name, *_ in kind._fields_]
    return [*out, ("end", -1)]
