"""One unit to its place in the dense tensor: the fast path (C or numba) and the reference (constriction)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.entropy import tables
from rac.errors import ChecksumError, FormatError
from rac.quantize import lossless as ll

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Shared:
    """Unit 0 of a lanes/1 record: frequency tables, class of every row and column, class pair to table."""

    freq: NDArray[np.uint16]
    lut: NDArray[np.uint32]
    rows: NDArray[np.uint8] | None
    cols: NDArray[np.uint8] | None
    table: NDArray[np.uint8]
    values: NDArray[np.uint32]
    bases: NDArray[np.uint32]


def shared(unit: bytes, p: ll.Lanes, grid: ll.Grid) -> Shared:
    """Parse unit 0 (stages/lanes.md, "Shared unit")."""
    t, r, c = p.sizes
    if len(unit) != t + r + c + p.rows * p.cols:
        raise FormatError("shared unit does not have the size of its sections")
    freq = tables.from_bytes(unit[:t], p.tables, p.symbols, p.order)
    rows = _classes(unit[t : t + r], grid.rows, p.rows)
    cols = _classes(unit[t + r : t + r + c], grid.cols, p.cols)
    table = np.frombuffer(unit, np.uint8, offset=t + r + c).reshape(p.rows, p.cols)
    if (table >= p.tables).any():
        raise FormatError("class map names a table that is not there")
    bases = np.zeros(256, np.uint32)
    bases[: len(p.escapes)] = p.escapes
    return Shared(freq, tables.lookup(freq), rows, cols, table, p.values(), bases)


def _classes(data: bytes, n: int, k: int) -> NDArray[np.uint8] | None:
    """Classes of `n` rows or columns: nothing where k is 1, plain bytes of size n, or else a zstd frame."""
    if k == 1:
        if data:
            raise FormatError("classes are given where there is one class")
        return None
    out = np.frombuffer(data if len(data) == n else zstd.decompress(data, n), np.uint8)
    if (out >= k).any():
        raise FormatError("class is out of range")
    return out


def decode_lanes(
    unit: Array, p: ll.Lanes, s: Shared, box: tuple[int, int, int, int], dst: Array, reference: bool = False
) -> None:
    """Decode one tile unit (bytes,) uint8 into `dst`, a (h, w) view of words with unit column stride.

    Raises FormatError or ChecksumError; `dst` may then be partly written.
    """
    r0, r1, c0, c1 = box
    h, w = r1 - r0, c1 - c0
    n = h * w
    tile = ll.parse_tile(unit, n, p)
    order = ll.order(
        None if s.rows is None else s.rows[r0:r1], None if s.cols is None else s.cols[c0:c1], h, w, s.table
    )
    if reference:
        from rac.decode.reference import lanes

        sym = lanes(tile, s.freq, order.segments, n)
    else:
        sym = native.ans_decode(s.lut, tile.words, tile.counts, order.segments, n)
    pos, top = native.escapes(
        sym, p.lanes, order.segments, p.first_escape, s.bases, tile.escapes, tile.escape_counts
    )
    limit = 1 << min(32, 8 * dst.dtype.itemsize - p.zero - p.sign - p.shift)
    if len(top) and int(top.max()) >= limit:
        raise FormatError("escaped value leaves the range of tops")
    if reference or native.library() is None:
        _merge(sym, tile, unit, order, p, s, pos, top, dst)
        return
    starts, escape, at = np.array(tile.planes, np.int64), np.zeros(1, np.int64), 0
    stride = dst.strides[0] // dst.dtype.itemsize
    for a, b, c, d in order.blocks if order.cols is not None else [(0, h, 0, w)]:
        native.merge(
            sym, at, b - a, d - c, None if order.rows is None else order.rows[a:b],
            None if order.cols is None else order.cols[c:d], dst, stride, s.values, p.zero, p.sign, p.shift, unit,
            starts, p.raw, pos, top, escape,
        )  # fmt: skip
        at += (b - a) * (d - c)
    for (bits, _), start in zip(p.planes(), tile.planes, strict=True):
        if bits < 8 and n * bits % 8 and unit[start + n * bits // 8] >> (n * bits % 8):
            raise FormatError("plane ends in non-zero bits")


def _merge(
    sym: Array, tile: ll.Tile, unit: Array, order: ll.Order, p: ll.Lanes, s: Shared, pos: Array, top: Array, dst: Array
) -> None:
    tops = s.values[sym]
    tops[pos] = top
    sizes = ll.plane_sizes(len(sym), p)
    planes = [memoryview(unit)[a : a + n] for a, n in zip(tile.planes, sizes, strict=True)]
    word = dst.dtype.itemsize
    flat = ll.join(tops, ll.unpack_planes(planes, len(sym), p), p, word)
    at = 0
    rows = np.arange(dst.shape[0]) if order.rows is None else order.rows
    cols = np.arange(dst.shape[1]) if order.cols is None else order.cols
    for a, b, c, d in order.blocks:
        dst[np.ix_(rows[a:b], cols[c:d])] = flat[at : at + (b - a) * (d - c)].reshape(b - a, d - c)
        at += (b - a) * (d - c)


def decode_plain(unit: Array, method: str, box: tuple[int, int, int, int], dst: Array) -> None:
    """raw/1 and zstd/1 tiles into `dst`, a (h, w) view of words."""
    h, w, word = box[1] - box[0], box[3] - box[2], dst.dtype.itemsize
    size = h * w * word
    if method == "zstd/1":
        data = np.frombuffer(zstd.decompress(unit, size), np.uint8).reshape(word, h * w)
        dst[...] = np.ascontiguousarray(data.T).view(dst.dtype).reshape(h, w)
        return
    if len(unit) != size:
        raise FormatError("raw unit does not have the size of its tile")
    dst[...] = unit.view(dst.dtype).reshape(h, w)


def check_unit(unit: Array, want: int, name: str, i: int, offset: int) -> None:
    """ChecksumError, naming tensor, unit and offset, unless XXH3-64 of `unit` is `want`."""
    if zstd.xxh3(memoryview(unit)) != want:
        raise ChecksumError("checksum does not match", unit=f"{name!r} unit {i}", offset=offset)
