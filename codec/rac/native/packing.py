"""Tiles of words to units of lanes/1, many in one call of the C kernel; the numpy twin: rac/encode/code/tiles.py."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library
from rac.native.prototypes import Array, Piece, TileCoding, address

Pieces = NDArray[np.int64]  # (n, 6), a `Piece` each


def pieces(
    words: Array,
    boxes: NDArray[np.int64],
    first: int,
    rows: NDArray[np.uint8] | None,
    cols: NDArray[np.uint8] | None,
) -> Pieces:
    """Tiles (n, 4), r0, r1, c0, c1 each, of a matrix, whose rows from `first` on are `words`, of unit column stride.

    `rows` (R,) and `cols` (C,) are the classes of all rows and columns, None: one class. All are to be kept alive.
    """
    out = np.zeros((len(boxes), ctypes.sizeof(Piece) // 8), np.int64)
    r0, c0 = boxes[:, 0], boxes[:, 2]
    stride, word = words.strides[0], words.itemsize
    out[:, 0] = words.__array_interface__["data"][0] + (r0 - first) * stride + c0 * word
    for k, classes, at in ((1, rows, r0), (2, cols, c0)):
        if classes is not None:
            out[:, k] = address(classes) + at
    out[:, 3], out[:, 4], out[:, 5] = boxes[:, 1] - r0, boxes[:, 3] - c0, stride // word
    return out


def count_tiles(coding: TileCoding, tiles: Pieces) -> NDArray[np.uint32] | None:
    """(T, 256) how often each coded symbol, or pair a | b << 4, occurs under each table; None without a kernel."""
    lib = library()
    if lib is None:
        return None
    out = np.zeros((coding.tables, 256), np.uint32)
    if lib.rac_count(coding, tiles, len(tiles), out):
        raise MemoryError
    return out


def pack_tiles(coding: TileCoding, tiles: Pieces, room: int) -> tuple[list[NDArray[np.uint8]], bytes] | None:
    """The unit of each tile, planes as they are, in `room` bytes at most, and their directory; None without a kernel.

    The directory: 8 bytes of length and 8 of XXH3-64 for each.
    """
    lib = library()
    if lib is None:
        return None
    out, table = np.empty(room, np.uint8), np.empty((len(tiles), 2), np.int64)
    bad = lib.rac_pack(coding, tiles, len(tiles), out, len(out), table)
    if bad == -2:
        raise MemoryError
    assert not bad  # noqa: S101 - `room` is what the worst tiles take
    ends = np.cumsum(table[:, 0]).tolist()
    out.resize(ends[-1], refcheck=False)  # gives the rest back
    return [out[a:b] for a, b in zip([0, *ends], ends, strict=False)], table.tobytes()
