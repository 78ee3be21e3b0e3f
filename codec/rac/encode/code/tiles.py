"""Tiles of lanes/1 to units: one call of a C kernel for many, or numpy and constriction, tile by tile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.encode.code.fitted import coded, same
from rac.entropy.ans import Models, merge
from rac.grid import Box, Grid, bounds, boxes, up16
from rac.stages.lanes import layout
from rac.stages.lanes.parameters import Lanes, codes

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Symbols:
    """What the analysis of a tensor has found, and the encoding of its tiles needs."""

    lut: NDArray[np.uint8]  # (65536,) base symbol of each top
    rows: NDArray[np.uint8] | None  # (R,) classes of rows; None: one
    cols: NDArray[np.uint8] | None  # (C,) classes of columns; None: one
    table: NDArray[np.uint8]  # (Kr, Kc) table of each pair of classes


@dataclass(slots=True)
class Tiles:
    """Codes the tiles of a tensor, under tables that `use` sets; they are counted before that."""

    p: Lanes
    grid: Grid
    lut: NDArray[np.uint8]
    rows: NDArray[np.uint8] | None
    cols: NDArray[np.uint8] | None
    table: NDArray[np.uint8]
    freq: NDArray[np.uint16] = field(init=False)
    odd: NDArray[np.bool_] | None = field(init=False)  # (T, symbols) pairs that are coded as two first escapes
    model: NDArray[np.uint32] = field(init=False)  # (T, 256) of each base symbol, or pair a | b << 4
    escaping: NDArray[np.uint8] = field(init=False)  # (T, 256) of the same: see src/encode.h

    def count(self, base: NDArray[np.uint8], first: int = 0) -> NDArray[np.int64]:
        """(T, symbols) how often each coded symbol occurs under each table.

        `base` are the base symbols (h, C) of whole rows of tiles, which begin in row `first` of the matrix.
        """
        p, grid, code = self.p, self.grid, codes(self.p.base, self.p.first_escape, self.p.per)
        words = (p.tables, 256)
        form = {"word": 1, "zero": 0, "sign": 0, "shift": 0}
        coding = self._coding(None, np.zeros(words, np.uint32), np.zeros(words, np.uint8), **form)
        here = slice(first // grid.tr * grid.across, -(-(first + len(base)) // grid.tr) * grid.across)
        found = native.count_tiles(coding, native.pieces(base, bounds(grid)[here], first, self.rows, self.cols))
        if found is None:
            found = np.zeros(words, np.uint32)
            for box in boxes(grid)[here]:
                order, sym = self._sequence(base[box.r0 - first : box.r1 - first, box.c0 : box.c1], box)
                np.add.at(found, (np.repeat(order.segments[:, 1], order.segments[:, 0]), sym), 1)
        return np.ascontiguousarray(found[:, code].astype(np.int64))

    def use(self, freq: NDArray[np.uint16], odd: NDArray[np.bool_] | None) -> None:
        """Take tables `freq` (T, symbols), each of sum 4096; pairs that are `odd` are stored as two first escapes."""
        self.freq, self.odd = freq, odd
        self.model, self.escaping = coded(freq, odd, self.p)

    def take(self, found: native.Fitted) -> None:
        """Take tables that were fitted to counts."""
        self.freq, self.odd, self.model, self.escaping = found.freq, found.odd, found.model, found.escaping

    def units(self, words: Array, rows: range) -> tuple[list[NDArray[np.uint8]], bytes | None]:
        """Units of rows of tiles of words (h, C), planes as they are, and their directory where it is known."""
        grid, p = self.grid, self.p
        here, first = slice(rows.start * grid.across, rows.stop * grid.across), rows.start * grid.tr
        some = bounds(grid)[here]
        form = {"word": grid.word, "zero": p.zero, "sign": p.sign, "shift": p.shift}
        coding = self._coding(self.lut, self.model, self.escaping, **form)
        tiles = native.pieces(words, some, first, self.rows, self.cols)
        found = native.pack_tiles(coding, tiles, len(some) * self._most(grid.tr * grid.tc))
        if found is None:
            return [self._unit(words[b.r0 - first : b.r1 - first, b.c0 : b.c1], b) for b in boxes(grid)[here]], None
        return found

    def _coding(self, lut: Array | None, model: Array, escaping: Array, **form: int) -> native.TileCoding:
        """What the kernel needs; the arrays that it names are kept with it."""
        p = self.p
        kept = lut, model, escaping, self.table, np.array([*p.escapes, 0], np.uint16)
        counts = {"row_classes": p.rows, "col_classes": p.cols, "tables": p.tables, "lanes": p.lanes, "per": p.per}
        at = [native.address(a) for a in kept]
        out = native.TileCoding(*at, **counts, **form, first=p.first_escape, skip=p.skip)
        out.kept = kept  # type: ignore[attr-defined]
        return out

    def _most(self, n: int) -> int:
        """Bytes that the unit of a tile of `n` words can take: 12 bits for a symbol, and an escape byte for a word."""
        p = self.p
        words = -(-n // p.per + p.tables) * 12 // 32 + 3 * p.lanes + 16
        return up16(p.directory) + up16(4 * words) + up16(n + 16) + sum(map(up16, p.plane_sizes(n)))

    def _sequence(self, base: NDArray[np.uint8], box: Box) -> tuple[layout.Order, NDArray[np.uint8]]:
        """(order, coded symbols in sequence order, pairs as a | b << 4) of a tile of base symbols (h, w)."""
        rows = None if self.rows is None else self.rows[box.r0 : box.r1]
        cols = None if self.cols is None else self.cols[box.c0 : box.c1]
        order = layout.order(self.p, rows, cols, base.shape[0], base.shape[1], self.table)
        flat = gather(order, base)
        if self.p.per == 1:
            return order, flat
        pieces = []
        for part in np.split(flat, np.cumsum(order.sizes)[:-1]):
            even = np.append(part, np.zeros(len(part) % 2, np.uint8))  # an odd last one is paired with 0
            pieces.append(even[::2] | even[1::2] << np.uint8(4))
        return order, np.concatenate(pieces)

    def _unit(self, words: Array, box: Box) -> NDArray[np.uint8]:
        """The unit of a tile (h, w), planes as they are; slow."""
        p = self.p
        base = self.lut[native.tops(words, p.zero, p.sign, p.shift)]
        order, sym = self._sequence(base, box)
        flat, of = gather(order, words), np.zeros(256, np.uint8)
        of[codes(p.base, p.first_escape, p.per)] = np.arange(p.symbols)
        coded, counts = self._lanes(of[sym], order)
        sizes, cuts, total = p.plane_sizes(len(flat)), [], 0
        for (b, low), size in zip(p.planes(), sizes, strict=True):
            cuts.append((b, low, total))
            total += up16(size)
        raw = native.planes(flat, p.zero, p.sign, p.shift, cuts, total)
        planes = [raw[at : at + size].data for (*_, at), size in zip(cuts, sizes, strict=True)]
        escapes = self._escapes(order, sym, flat, gather(order, base)) if p.escapes else b""
        return layout.build_tile(coded, counts, escapes, planes, p)

    def _lanes(self, sym: NDArray[np.uint8], order: layout.Order) -> tuple[Array, Array]:
        """(words, words of each lane) of coded symbols through constriction, lane by lane."""
        p, table = self.p, order.segments[:, 1]
        models, starts = Models(self.freq), np.cumsum(order.segments[:, 0]) - order.segments[:, 0]
        coded_as = same(p, self.odd)
        places = np.empty(len(sym), np.int32)
        for start, (n, t) in zip(starts, order.segments, strict=True):
            places[start : start + n] = models.index[t][coded_as[t][sym[start : start + n]]]
        streams = []
        for lane, steps in enumerate(layout.lane_steps_all(order.segments, p.lanes)):
            mine = [places[s + lane : s + n : p.lanes] for s, n in zip(starts, order.segments[:, 0], strict=True)]
            todo = list(zip(steps.tolist(), table.tolist(), strict=True))
            streams.append(models.encode(np.ascontiguousarray(np.concatenate(mine)), todo))
        return merge(streams, self.freq, order.segments), np.array([len(s) for s in streams])

    def _escapes(self, order: layout.Order, sym: Array, flat: Array, base: Array) -> bytes:
        """Escape bytes in sequence order; few symbols have any."""
        p = self.p
        kinds = self.escaping[np.repeat(order.segments[:, 1], order.segments[:, 0]), sym]
        kind = np.concatenate(
            [
                np.repeat(part, p.per)[:n]
                for part, n in zip(np.split(kinds, np.cumsum(order.segments[:, 0])[:-1]), order.sizes, strict=True)
            ]
        )
        symbol = np.where(kind == 2, p.first_escape, base.astype(np.int64))
        use = (kind > 0) & (symbol >= p.first_escape)
        top = native.tops(flat[use], p.zero, p.sign, p.shift).astype(np.int64)
        out: bytes = (top - np.array(p.escapes, np.int64)[symbol[use] - p.first_escape]).astype(np.uint8).tobytes()
        return out


def gather(order: layout.Order, tile: Array) -> Array:
    """Elements of `tile` (h, w) in sequence order."""
    if order.rows is not None:
        tile = tile[order.rows]
    if order.cols is not None:
        tile = tile[:, order.cols]
    return np.concatenate([tile[a:b, c:d].reshape(-1) for _, a, b, c, d in order.blocks.tolist()])
