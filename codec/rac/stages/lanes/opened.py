"""lanes/1: the shared unit, and tiles to words: jobs of the C kernel, or numba and numpy."""

from __future__ import annotations

import copy
import ctypes
import threading
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.entropy import tables
from rac.errors import FormatError
from rac.grid import Box, Grid
from rac.native.prototypes import Array
from rac.stages.base import Job, OpenCoder, Pair
from rac.stages.lanes import layout
from rac.stages.lanes.parameters import Lanes, bases, codes


class OpenLanes(OpenCoder):
    """The shared unit of a record: frequency tables, class of every row and column, class pair to table."""

    def __init__(self, unit: bytes, p: Lanes, grid: Grid) -> None:
        """Parse the shared unit (stages/lanes.md, "Shared unit"); FormatError where it breaks the format."""
        t, r, c = p.sizes
        if len(unit) != p.front:
            raise FormatError("shared unit does not have the size of its sections")
        self.p, self.freq = p, tables.from_bytes(unit[:t], p.tables, p.symbols, p.order)  # (T, symbols) uint16
        self.rows = _classes(unit[t : t + r], grid.rows, p.rows)  # (R,) uint8; None where there is one class
        self.cols = _classes(unit[t + r : t + r + c], grid.cols, p.cols)  # (C,) uint8; None where there is one class
        self.table = np.frombuffer(unit, np.uint8, offset=t + r + c).reshape(p.rows, p.cols)  # of each pair of classes
        if (self.table >= p.tables).any():
            raise FormatError("class map names a table that is not there")
        self.values, self.bases, self.code = p.values(), bases(p.escapes), codes(p.base, p.first_escape, p.per)
        self.limit = 1 << min(16, 8 * grid.word - p.zero - p.sign - p.shift)  # tops are below it
        self._word = grid.word
        self._lut: NDArray[np.uint32] | None = None
        self._kernel: Job | None = None
        self._lock = threading.Lock()

    def bare(self) -> Self:
        """A copy without look-up tables, 16 KiB each, which are larger than all else."""
        out = copy.copy(self)
        out._lut, out._kernel, out._lock = None, None, threading.Lock()
        return out

    def lut(self) -> NDArray[np.uint32]:
        """(T, 4096) look-up tables, made when they are first asked for."""
        if self._lut is None:
            self._lut = tables.lookup(self.freq, self.code)
        return self._lut

    def kernel(self) -> Job | None:
        """What makes jobs of the C kernel; None where it was not built."""
        if not native.available():
            return None
        with self._lock:  # a second set of tables would be freed while jobs have its address
            if self._kernel is None:
                p, kept = self.p, (self.lut(), self.values, self.bases, self.table)
                form = p.rows, p.cols, p.skip, p.lanes, p.per, self._word, p.zero, p.sign, p.shift, p.raw
                shared = native.TileShared(
                    *[native.address(a) for a in kept], *form, p.base, p.first_escape, self.limit
                )
                at = native.address(self.rows), native.address(self.cols), ctypes.addressof(shared)
                self._kernel = partial(_job, (shared, *kept, self.rows, self.cols), at)
            return self._kernel

    def plain(self, unit: Array, box: Box) -> Array:
        """The unit (bytes,) uint8 of a tile with plain planes; FormatError where a frame is damaged."""
        if not self.p.skip:
            return unit
        return layout.plain_tile(unit, (box.r1 - box.r0) * (box.c1 - box.c0), self.p)

    def decode(self, unit: Array, box: Box, dst: Array, plain: bool = False) -> None:
        """Decode one tile unit (bytes,) uint8 into `dst`, a (h, w) view of words, without the C kernel."""
        p, (h, w) = self.p, dst.shape
        unit, order = self.plain(unit, box), self.order(box)
        tile = layout.parse_tile(unit, h * w, p)
        coded = native.ans_decode(self.lut(), tile.words, tile.counts, order.segments, int(order.segments[:, 0].sum()))
        tops = self._tops(_elements(coded, p, order), tile)
        planes = [unit.data[a : a + n] for a, n in zip(tile.planes, p.plane_sizes(h * w), strict=True)]
        flat = layout.join(tops, layout.unpack_planes(planes, h * w, p.planes()), p, dst.itemsize)
        rows = np.arange(h) if order.rows is None else order.rows
        cols = np.arange(w) if order.cols is None else order.cols
        start = 0
        for _, a, b, c, d in order.blocks.tolist():
            dst[np.ix_(rows[a:b], cols[c:d])] = flat[start : start + (b - a) * (d - c)].reshape(b - a, d - c)
            start += (b - a) * (d - c)

    def order(self, box: Box) -> layout.Order:
        """The sequence order of a tile."""
        r0, r1, c0, c1 = box
        rows = None if self.rows is None else self.rows[r0:r1]
        cols = None if self.cols is None else self.cols[c0:c1]
        return layout.order(self.p, rows, cols, r1 - r0, c1 - c0, self.table)

    def _tops(self, base: Array, tile: layout.Tile) -> NDArray[np.uint64]:
        """Tops (n,) of base symbols (n,) in sequence order."""
        tops = self.values[base].astype(np.uint64)
        at = np.flatnonzero(base >= self.p.first_escape)
        if len(at) != len(tile.escapes):
            raise FormatError(native.TILE_ERRORS[5])
        tops[at] = self.bases[base[at].astype(np.int64) - self.p.first_escape].astype(np.uint64) + tile.escapes
        if len(at) and int(tops[at].max()) >= self.limit:
            raise FormatError(native.TILE_ERRORS[6])
        return tops


def _job(kept: Any, at: tuple[int, int, int], unit: Pair, box: Box, place: Pair, numbers: Any) -> native.TileJob:
    """A `Job`; the addresses `at`, of classes of rows and of columns and of TileShared, lead to what is `kept`."""
    (by_row, by_col, shared), (r0, r1, c0, c1), (to, stride) = at, box, place
    rows, cols = by_row and by_row + r0, by_col and by_col + c0
    row, col, what = numbers or (0, 0, 0)
    return native.TileJob(*unit, rows, cols, to, r1 - r0, c1 - c0, stride, shared, what, row + 4 * r0, col + 4 * c0)


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


def _elements(sym: Array, p: Lanes, order: layout.Order) -> Array:
    """Base symbol of every element, out of `code` symbols."""
    if p.per == 1:
        return sym
    base, at = [], 0
    for n, steps in zip(order.sizes.tolist(), order.segments[:, 0].tolist(), strict=True):
        pair = sym[at : at + steps]
        base.append(np.stack([pair & 15, pair >> 4], axis=1).reshape(-1)[:n])
        at += steps
    return np.concatenate(base)
