"""Tiles of lanes/1 to words, or to the numbers that these stand for: C kernels, or the lanes in numba."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import ChecksumError, FormatError
from rac.native.library import library
from rac.native.prototypes import TileJob

Array = NDArray[Any]
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
)
"""What a kernel has found, by its number; the last two are never those of a tile that the CPU decodes."""


def decode_tiles(jobs: list[TileJob]) -> tuple[int, type[FormatError | ChecksumError], str] | None:
    """Decode tiles (only where kernels are `available`). None, or of the first that is wrong: its number and the error.

    FormatError where the unit breaks stages/lanes.md, ChecksumError where a lane does not end empty in state 0.
    """
    lib = library()
    assert lib is not None  # noqa: S101 - the caller asked
    at = ctypes.c_int64()
    bad = lib.rac_tiles(b"".join(jobs), len(jobs), ctypes.byref(at))
    if bad == 8:
        raise MemoryError
    return (at.value, ChecksumError if bad == 4 else FormatError, TILE_ERRORS[bad]) if bad else None


def ans_decode(luts: Array, words: Array, counts: Array, segments: Array, n: int) -> NDArray[np.uint8]:
    """Coded symbols (n,) of one tile in sequence order, in numba; ChecksumError where a lane does not end in state 0.

    luts (T, 4096) uint32, words (W,) uint32 in the order of reading, counts (L,) uint16 words per lane with L <= 1024,
    segments (S, 2) int64 of (symbols, table). The caller has checked that counts sum to W and segments to n.
    """
    from rac.native import fallback

    out = np.empty(n, np.uint8)
    if fallback.ans_decode(luts, words, counts, segments, out):
        raise ChecksumError(TILE_ERRORS[4])
    return out
