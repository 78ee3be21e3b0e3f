"""One unit to its place in the dense tensor: the fast path (C or numba) and the reference (constriction)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.entropy import tables
from rac.errors import FormatError
from rac.stages import bits as bt
from rac.stages.lanes import layout as ll

Array = NDArray[Any]
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Shared:
    """Unit 0 of a lanes/1 record: frequency tables, class of every row and column, class pair to table."""

    freq: NDArray[np.uint16]
    lut: NDArray[np.uint32] | None
    """None: not now, see `bare`."""
    rows: NDArray[np.uint8] | None
    cols: NDArray[np.uint8] | None
    table: NDArray[np.uint8]
    values: NDArray[np.uint16]
    bases: NDArray[np.uint32]
    code: NDArray[np.uint8]
    """(symbols,) a coded symbol as its base symbol, or as a | b << 4 for a pair; `lut` holds these."""
    limit: int
    """Tops are below."""
    job: native.TileShared | None
    """What the jobs of the kernel share; None where there is no kernel, and without `lut`."""
    at: tuple[int, int]
    """Addresses of the classes of rows and columns, 0 where there is one."""
    at_job: int = 0
    """Address of `job`."""


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
    limit = 1 << min(16, 8 * grid.word - p.zero - p.sign - p.shift)
    at = (native.address(rows), native.address(cols))
    return ready(Shared(freq, None, rows, cols, table, p.values(), p.bases(), p.codes(), limit, None, at), p, grid)


def bare(s: Shared) -> Shared:
    """Without the look-up tables, 16 KiB each, which are larger than all else."""
    return replace(s, lut=None, job=None)


def ready(s: Shared, p: ll.Lanes, grid: ll.Grid) -> Shared:
    """With the look-up tables again."""
    lut = tables.lookup(s.freq, s.code)
    if not native.available():
        return replace(s, lut=lut)
    job = native.TileShared(
        *(native.address(a) for a in (lut, s.values, s.bases, s.table)),
        *(p.rows, p.cols, p.skip, p.lanes, p.per, grid.word, p.zero, p.sign, p.shift, p.raw, p.base, p.first_escape),
        s.limit,
    )
    return replace(s, lut=lut, job=job, at_job=ctypes.addressof(job))


def _classes(data: bytes, n: int, k: int) -> NDArray[np.uint8] | None:
    """Classes of `n` rows or columns: nothing where k is 1, plain bytes of size n, or else a zstd frame."""
    if k == 1:
        if data:
            raise FormatError("classes are given where there is one class")
        return None
    out = np.frombuffer(zstd.expand(data, n), np.uint8)
    if (out >= k).any():
        raise FormatError("class is out of range")
    return out


def lanes_job(
    unit: int, size: int, s: Shared, box: Box, dst: int, stride: int, numbers: tuple[int, int, int] = (0, 0, 0)
) -> native.TileJob:
    """Job of the kernel for one tile unit, only where `s.job` is there; addresses and numbers as in `TileJob`.

    Planes that are packed are expanded before (`expanded`). `numbers`: addresses of the float32 scales of the rows and
    columns of the tensor, and of the Dequant that says what the words stand for, or 0.
    """
    r0, r1, c0, c1 = box
    rows, cols = s.at[0] and s.at[0] + r0, s.at[1] and s.at[1] + c0
    row, col, what = numbers
    h, w = r1 - r0, c1 - c0
    return native.TileJob(unit, size, rows, cols, dst, h, w, stride, s.at_job, what, row + 4 * r0, col + 4 * c0)


def expanded(unit: Array, p: ll.Lanes, box: Box) -> Array:
    """A tile unit (bytes,) uint8 with its Zstandard frames expanded."""
    r0, r1, c0, c1 = box
    return ll.plain_tile(unit, (r1 - r0) * (c1 - c0), p, zstd.decompress) if p.packed else unit


def decode_lanes(unit: Array, p: ll.Lanes, s: Shared, box: Box, dst: Array, reference: bool = False) -> None:
    """Decode one tile unit (bytes,) uint8 into `dst`, a (h, w) view of words, without the C kernel.

    Raises FormatError or ChecksumError; `dst` may then be partly written.
    """
    r0, r1, c0, c1 = box
    h, w = r1 - r0, c1 - c0
    unit = expanded(unit, p, box)
    word, limit = dst.dtype.itemsize, s.limit
    row_class = None if s.rows is None else s.rows[r0:r1]
    col_class = None if s.cols is None else s.cols[c0:c1]
    order = ll.order(p, row_class, col_class, h, w, s.table)
    tile = ll.parse_tile(unit, h * w, p)
    coded = int(order.segments[:, 0].sum())
    if reference:
        from rac.stages.lanes.reference import lanes

        sym = s.code[lanes(tile, s.freq, order.segments, coded)]
    else:
        assert s.lut is not None  # noqa: S101
        sym = native.ans_decode(s.lut, tile.words, tile.counts, order.segments, coded)
    base = _elements(sym, p, order)
    tops = s.values[base].astype(np.uint64)
    pos = np.flatnonzero(base >= p.first_escape)
    if len(pos) != len(tile.escapes):
        raise FormatError(native.TILE_ERRORS[5])
    tops[pos] = s.bases[base[pos].astype(np.int64) - p.first_escape].astype(np.uint64) + tile.escapes
    if len(pos) and int(tops[pos].max()) >= limit:
        raise FormatError(native.TILE_ERRORS[6])
    sizes = ll.plane_sizes(h * w, p)
    planes = [unit.data[a : a + n] for a, n in zip(tile.planes, sizes, strict=True)]
    flat = ll.join(tops, ll.unpack_planes(planes, h * w, p), p, word)
    rows = np.arange(h) if order.rows is None else order.rows
    cols = np.arange(w) if order.cols is None else order.cols
    start = 0
    for _, a, b, c, d in order.blocks.tolist():
        dst[np.ix_(rows[a:b], cols[c:d])] = flat[start : start + (b - a) * (d - c)].reshape(b - a, d - c)
        start += (b - a) * (d - c)


def _elements(sym: Array, p: ll.Lanes, order: ll.Order) -> Array:
    """Base symbol of every element, out of `code` symbols."""
    if p.per == 1:
        return sym
    base, at = [], 0
    for n, steps in zip(order.sizes.tolist(), order.segments[:, 0].tolist(), strict=True):
        pair = sym[at : at + steps]
        base.append(np.stack([pair & 15, pair >> 4], axis=1).reshape(-1)[:n])
        at += steps
    return np.concatenate(base)


def decode_plain(unit: Array, method: str, box: Box, dst: Array, bits: int = 0) -> None:
    """Tiles of raw/1, zstd/1 and bits/1, then of `bits`, into `dst`, a (h, w) view of words."""
    h, w, word = box[1] - box[0], box[3] - box[2], dst.dtype.itemsize
    size = h * w * word
    if method == "zstd/1":
        data = np.frombuffer(zstd.decompress(unit.data, size), np.uint8).reshape(word, h * w)
        dst[...] = np.ascontiguousarray(data.T).view(dst.dtype).reshape(h, w)
        return
    if method == "bits/1":
        dst[...] = bt.unpack(unit, h * w, bits).reshape(h, w)
        return
    if len(unit) != size:
        raise FormatError("raw unit does not have the size of its tile")
    dst[...] = unit.view(dst.dtype).reshape(h, w)


def plain(unit: Array, method: str, p: ll.Lanes | None, box: Box, word: int) -> Array:
    """A tile unit (bytes,) uint8 without Zstandard frames: the words of zstd/1, lanes/1 with plain planes.

    Raises FormatError. What comes back is again a unit, of raw/1 or of the same lanes/1 or bits/1.
    """
    n = (box[1] - box[0]) * (box[3] - box[2])
    if method == "bits/1":
        return unit
    if p is None:
        words = np.empty((box[1] - box[0], box[3] - box[2]), f"<u{word}")
        decode_plain(unit, method, box, words)
        return words.reshape(-1).view(np.uint8)
    if not p.packed or not p.raw:
        return unit
    out = ll.plain_tile(unit, n, p, zstd.decompress)
    if out is not unit:
        out[4 : 4 + p.skip] = np.array(ll.plane_sizes(n, p), "<u4").view(np.uint8)
    return out
