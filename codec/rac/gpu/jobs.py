"""What the kernels of a GPU are asked for: tables and jobs of many tiles, laid out in numpy.

All places are offsets from the memory that a kernel is given: `units` has the stored bytes of tiles, `aux` what is made
here, `work` what the kernels leave for each other, `out` the tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.decoder import Decoder
from rac.gpu.layout import FOREVER, GRID, Call, Launch, Layout, power_of_two, up
from rac.grid import Box, up16
from rac.stages import bits as bt
from rac.stages import trellis as tr
from rac.stages.bits import Bits
from rac.stages.groups import OpenGroups
from rac.stages.lanes import layout as ll
from rac.stages.lanes.opened import OpenLanes
from rac.stages.trellis import OpenTrellis

Array = NDArray[Any]
TABLE = 4096 + 8 * 256
"""Bytes of a look-up table."""
WARP = 32
PLACE_COLS, PLACE_ROWS, TRELLIS_COLS, PRODUCT_ROWS, PRODUCT_COLS = 256, 64, 64, 16, 32
GROUPS_ROWS, GROUPS_COLS = 32, 256
WIDE_COLS = 1024
"""Columns of a program in tiles of more than WIDE columns, since a grid has at most 65535 programs that way."""
WIDE = 1 << 21
DEEP = 4
MOST = 1 << 24
"""Elements of a tile up to which its places fit."""

__all__ = ["MOST", "TABLE", "Batch", "Call", "Launch"]


class Batch(Layout):
    """Tiles of one or more tensors whose kernels are launched together."""

    def __init__(self, buffer: Array | None = None) -> None:
        """`buffer` (bytes,) uint8 takes `aux` as long as it is large enough."""
        super().__init__(buffer)
        self.status: list[tuple[Decoder, int]] = []
        """Tensor and tile of each place in the status array."""
        self._maps: dict[tuple[int, int], tuple[int, int]] = {}
        self._of: dict[int, _Shared] = {}

    def plain_map(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of places of a tile in row-major order."""
        if (h, w) not in self._maps:
            rows = np.arange(up(h, DEEP), dtype=np.uint32) * np.uint32(w)
            rows[h:] = 0
            self._maps[h, w] = self.put(rows), self.put(_columns(np.arange(w, dtype=np.uint32)))
        return self._maps[h, w]

    def shared(self, dec: Decoder) -> _Shared:
        """What all tiles of a tensor have in common, laid out once per batch."""
        if id(dec) not in self._of:
            self._of[id(dec)] = _Shared(self, dec)
        return self._of[id(dec)]

    def tile(self, dec: Decoder, i: int, unit: Array, units_at: int | None, out_at: int, stride: int) -> None:
        """Take in tile `i`, whose unit (bytes,) uint8 has been checked against its checksum.

        Args:
            dec: Its tensor.
            i: Number of the tile.
            unit: Without Zstandard frames (`tile.plain`).
            units_at: Offset of the unit in `units`, a multiple of 16, or None: it goes to `aux`, which is `units` too.
            out_at: Offset of the tile in `out` or, in front of a stage behind the trellis, in `work`.
            stride: Words from row to row there.

        Raises:
            FormatError: The unit breaks the format.
        """
        t = dec.tensor
        r0, r1, c0, c1 = box = t.grid.box(i)
        h, w = r1 - r0, c1 - c0
        with dec.at(i + t.first):
            at = self.put(unit) if units_at is None else units_at
            if isinstance(dec.coder, OpenLanes):
                _Tile(self, dec, i, unit, at, out_at, stride).lay()
                return
            source, planes, bits = "units", [at], dec.coder.bits if isinstance(dec.coder, Bits) else 0
            if bits:
                bt.check(unit, h * w, bits)
                planes = [at + start for _, _, start in bt.planes(h * w, bits)[0]]
            if not t.quantised:
                self._plain(t.grid.word, bits, planes, h, w, out_at, stride, "out")
                return
            if bits:
                source, at = "work", self.room(up(h * w, 16))
                self._plain(1, bits, planes, h, w, at, w, "work")
            status = len(self.status)
            self.status.append((dec, i))
            self.finish(dec, box, source, at, status, out_at, stride)

    def finish(self, dec: Decoder, box: Box, source: str, codes: int, status: int, out_at: int, stride: int) -> None:
        """The numbers of a tile whose words lie in row-major order."""
        h, w = box[1] - box[0], box[3] - box[2]
        if isinstance(dec.numbers, OpenGroups):
            self._groups(dec, box, source, codes, status, out_at, stride)
        else:
            self._numbers(dec, box, source, codes, *self.plain_map(h, w), out_at, stride)

    def _plain(
        self, word: int, bits: int, planes: list[int], h: int, w: int, out_at: int, stride: int, to: str
    ) -> None:
        """Words as they are, or in planes of `bits` bits."""
        many = max(1, word // 4)  # there is no plane of 64 bits
        rows, cols = self.plain_map(h, w * many)
        self._place(
            word // many,
            0,
            0,
            0,
            bits or 8 * word // many,
            False,
            rows,
            cols,
            0,
            0,
            out_at,
            stride * many,
            h,
            w * many,
            planes,
            to,
        )

    def _place(
        self,
        word: int,
        shift: int,
        sign: int,
        zero: int,
        raw: int,
        coded: bool,
        rows: int,
        cols: int,
        tops: int,
        symbols: int,
        out_at: int,
        stride: int,
        h: int,
        w: int,
        planes: list[int],
        to: str = "out",
    ) -> None:
        options = {
            "WORD": word,
            "SHIFT": shift,
            "SIGN": sign,
            "ZERO": zero,
            "RAW": raw,
            "CODED": coded,
            "ROWS": PLACE_ROWS,
            "COLS": _across(PLACE_COLS, w),
        }
        planes = planes + [0] * (6 - len(planes))
        self.jobs[Call("place", tuple(options.items()), to=to)].append(
            (rows, cols, tops, symbols, out_at, stride, h, w, *planes)
        )

    def product(
        self, dec: Decoder, box: Box, found: int, objects: list[tuple[int, int]], out_at: int, stride: int
    ) -> None:
        """The stage behind the trellis for whole rows of the matrix.

        Args:
            dec: The tensor.
            box: First and last + 1 of its rows; all columns.
            found: Offset in `work` of what the trellis yields, C numbers from row to row.
            objects: Offset of each object and numbers from row to row.
            out_at: Offset in `out` of the first word.
            stride: Words from row to row there.
        """
        t, (r0, r1, c0, c1) = dec.tensor, box
        added = len(objects) == 2
        a, b = (objects[0], objects[1]) if added else ((0, 0), objects[0])
        if added:
            a = (a[0] + 4 * r0 * a[1], a[1])
        terms = a[1] if added else c1 - c0
        options = {"WORD": t.word, "HALF": t.dtype == "F16", "ADDED": added, "ROWS": PRODUCT_ROWS, "COLS": PRODUCT_COLS}
        w = c1 - c0
        step = max(1, GRID // -(-w // PRODUCT_COLS)) * PRODUCT_ROWS  # rows of one job
        for y in range(0, r1 - r0, step):
            place = (found + 4 * y * w, w, a[0] + 4 * y * a[1], a[1], *b, terms, out_at + y * stride * t.word, stride)
            self.jobs[Call("product", tuple(options.items()))].append((*place, min(step, r1 - r0 - y), w))

    def _numbers(
        self,
        dec: Decoder,
        box: Box,
        source: str,
        codes: int,
        rows: int,
        cols: int,
        out_at: int,
        stride: int,
        word_of: Array | None = None,
    ) -> None:
        """The trellis of a tile; `word_of` (256,): words of the codes where they are not the codes themselves."""
        t, s, (r0, r1, c0, c1) = dec.tensor, self.shared(dec), box
        h, w = r1 - r0, c1 - c0
        tables = dec.numbers
        assert isinstance(tables, OpenTrellis)  # noqa: S101
        size = 4 if tables.dtype == "F32" else 2
        pairs = size == 2 and not (w % 2 or stride % 2 or out_at % 4)
        options = {"TO": tables.dtype, "COLS": _across(TRELLIS_COLS, w), "PAIRS": pairs}
        by_col = self.put(_padded(tables.cols[c0:c1], _across(TRELLIS_COLS, w)))
        by_row = self.put(_padded(tables.rows[r0:r1], DEEP))
        self.jobs[Call("trellis", tuple(options.items()), source, "work" if t.chain.product else "out")].append(
            (rows, cols, s.entries(word_of), by_col, by_row, codes, out_at, stride, h, w, s.step)
        )
        a, b = np.searchsorted(tables.places[:, 0], (r0, r1))
        places, values = tables.places[a:b], tables.values[a:b]
        mine = (places[:, 1] >= c0) & (places[:, 1] < c1)
        if mine.any():
            at = out_at + ((places[mine, 0] - r0) * stride + places[mine, 1] - c0) * size
            words = values[mine].view(f"<u{size}").astype(np.int64)
            call = Call("outliers", (("WORD", size), ("BLOCK", 128)), to="work" if t.chain.product else "out")
            self.jobs[call] += list(zip(at.tolist(), words.tolist(), strict=True))

    def _groups(self, dec: Decoder, box: Box, source: str, codes: int, status: int, out_at: int, stride: int) -> None:
        """The groups of a tile."""
        t, (r0, r1, c0, c1) = dec.tensor, box
        h, w = r1 - r0, c1 - c0
        numbers = dec.numbers
        assert isinstance(numbers, OpenGroups)  # noqa: S101
        entries, lists = self.shared(dec).groups, numbers.scales.shape[1]
        first, left = divmod(c0, numbers.p.group)
        size = 4 if numbers.dtype == "F32" else 2
        pairs = size == 2 and not (w % 2 or codes % 2 or stride % 2 or out_at % 4)
        options = {
            "TO": numbers.dtype,
            "PAIRS": pairs,
            "SAME": not (numbers.p.group % 2 or left % 2),
            "ROWS": GROUPS_ROWS,
            "COLS": GROUPS_COLS,
        }
        step = max(1, GRID // -(-w // GROUPS_COLS)) * GROUPS_ROWS  # rows of one job
        for y in range(0, h, step):
            self.jobs[Call("groups", tuple(options.items()), source, "work" if t.chain.product else "out")].append(
                (
                    codes + y * w,
                    w,
                    entries + 8 * ((r0 + y) * lists + first),
                    lists,
                    numbers.p.group,
                    left,
                    out_at + y * stride * t.word,
                    stride,
                    min(step, h - y),
                    w,
                    numbers.p.bits | status << 8,
                )
            )


def _padded(a: Array, many: int) -> Array:
    return np.append(a, np.zeros(-len(a) % many, a.dtype))


def _across(cols: int, w: int) -> int:
    return cols if w <= WIDE else WIDE_COLS


def _columns(v: Array) -> Array:
    return _padded(v.astype(np.uint32), _across(PLACE_COLS, len(v)))


class _Shared:
    """Tables of a tensor in `aux` and `work`."""

    def __init__(self, batch: Batch, dec: Decoder) -> None:
        self._batch, self._dec = batch, dec
        self._entries: int | None = None
        self.groups = 0
        self.step = 0
        s, n = dec.coder, dec.numbers
        if isinstance(n, OpenGroups):
            biased = n.zeros.astype(np.float32) + np.float32(2**23)
            self.groups = batch.put(np.stack(np.broadcast_arrays(n.scales, biased), axis=-1))
        if isinstance(n, OpenTrellis):
            self.step = _top(tr.CODES[n.p.states][0])
        if not isinstance(s, OpenLanes):
            return
        p = s.p
        starts = np.full((len(s.freq), 257), 4096, np.uint32)
        starts[:, 0] = 0
        np.cumsum(s.freq, axis=1, out=starts[:, 1 : s.freq.shape[1] + 1])
        code = s.code ^ s.code >> 4 if p.per == 2 else s.code
        codes = batch.put(np.append(code, np.zeros(256 - len(code), np.uint8)))
        self.codes = power_of_two(max(16, int(code.max()) + 1))
        self.tables = batch.room(len(starts) * TABLE)
        at = batch.put(starts)
        call = Call("tables", (("BLOCK", 2048),))
        batch.jobs[call] += [(at + 1028 * k, codes, self.tables + TABLE * k) for k in range(len(starts))]
        self.tops = batch.put(s.values)
        self.bases = batch.put(s.bases)
        self.order = np.argsort(s.table, axis=None, kind="stable")
        self.direct = isinstance(n, OpenTrellis) and not p.raw and not p.zero
        """Symbols are codes of words that the trellis takes as they are."""
        self.word_of = self.code_of = None
        if self.direct:
            runs = s.values[: p.first_escape].astype(np.uint8)
            self.word_of = np.concatenate([runs, np.setdiff1d(np.arange(256, dtype=np.uint8), runs)])
            codes_of = np.empty(256, np.uint8)
            codes_of[self.word_of] = np.arange(256)
            self.code_of = batch.put(codes_of)

    def entries(self, word_of: Array | None) -> int:
        """Look-up entries of the trellis."""
        tables = self._dec.numbers
        assert isinstance(tables, OpenTrellis)  # noqa: S101
        if self._entries is None:
            words = np.arange(256) if word_of is None else word_of.astype(np.int64)
            bits = tables.rec[words].view(np.uint32)
            odd = (words - tables.p.zero) & 1
            turns = odd.astype(np.uint32) * np.uint32(_top(tr.CODES[tables.p.states][1]))
            self._entries = self._batch.put(np.stack([bits, turns], axis=1))
        return self._entries


def _top(response: int) -> int:
    """Eight bits in reverse order, as the highest of a register."""
    return int(f"{response:08b}"[::-1], 2) << 24


class _Tile:
    """One tile of lanes/1."""

    def __init__(self, batch: Batch, dec: Decoder, i: int, unit: Array, at: int, out_at: int, stride: int) -> None:
        self.batch, self.dec, self.unit, self.at, self.out_at, self.stride = batch, dec, unit, at, out_at, stride
        t, s = dec.tensor, dec.coder
        assert isinstance(s, OpenLanes)  # noqa: S101
        self.limit = s.limit
        self.lanes, self.shared, self.box = s.p, batch.shared(dec), t.grid.box(i)
        r0, r1, c0, c1 = self.box
        self.h, self.w, kr, kc = r1 - r0, c1 - c0, *s.table.shape
        row_class = np.zeros(self.h, np.int64) if s.rows is None else s.rows[r0:r1].astype(np.int64)
        col_class = np.zeros(self.w, np.int64) if s.cols is None else s.cols[c0:c1].astype(np.int64)
        self.row_list, row_rank, nr = _ranks(row_class, kr)
        self.col_list, self.col_rank, nc = _ranks(col_class, kc)
        n = (nr[:, None] * nc).reshape(-1)[self.shared.order]
        starts = np.empty(kr * kc, np.int64)
        starts[self.shared.order] = np.cumsum(n) - n
        self.starts, self.sizes, self.nr, self.nc = starts, n, nr, nc
        self.place = starts.reshape(kr, kc)[row_class] + row_rank[:, None] * nc
        self.col_class = col_class
        of = s.table.reshape(-1)[self.shared.order]
        self.segments = [(int(k), int(m)) for k, m in enumerate(np.bincount(of, n).astype(np.int64)) if m]
        self.tile = ll.parse_tile(unit, self.h * self.w, s.p)
        batch.status.append((dec, i))

    def lay(self) -> None:
        """All jobs of the tile."""
        batch, p, s, t = self.batch, self.lanes, self.shared, self.dec.tensor
        n = self.h * self.w
        status = len(batch.status) - 1
        symbols = batch.room(up(n + 4, 16))
        span = power_of_two(p.lanes)
        options = {"LANES": p.lanes, "SPAN": span, "PER": p.per, "BLOCK": max(WARP, span), "ENTRIES": s.codes}
        words = self.at + up16(p.directory)
        states, taken = self._states()
        pieces = self._pieces()
        places = batch.room(4 * len(self.tile.escapes))
        batch.jobs[Call("lanes", tuple(options.items()))].append(
            (
                batch.put(states),
                words + 4 * taken,
                s.tables,
                symbols,
                batch.put(pieces),
                status,
                int(pieces[:-1, 0].sum()),
                p.first_escape,
                places,
                len(self.tile.escapes),
            )
        )
        rows = np.zeros((len(self.nc), up(self.h, DEEP)), np.uint32)
        rows[:, : self.h] = self.place.T
        rows_at = batch.put(rows)
        cols_at = batch.put(_columns(self.col_rank | self.col_class << 24))
        escapes = words + up16(4 * len(self.tile.words))
        planes = [self.at + a for a in self.tile.planes]
        if s.direct:
            if p.base > p.first_escape:
                self._escapes(symbols, status, escapes, places, None)
            batch._numbers(self.dec, self.box, "work", symbols, rows_at, cols_at, self.out_at, self.stride, s.word_of)
            return
        to, out_at, stride = "out", self.out_at, self.stride
        if t.quantised:
            to, out_at, stride = "work", batch.room(up(n, 16)), self.w
        batch._place(
            t.grid.word,
            p.shift,
            int(p.sign),
            p.zero,
            p.raw,
            True,
            rows_at,
            cols_at,
            s.tops,
            symbols,
            out_at,
            stride,
            self.h,
            self.w,
            planes,
            to,
        )
        if p.base > p.first_escape:
            self._escapes(symbols, status, escapes, places, (out_at, stride, to))
        if t.quantised:
            batch.finish(self.dec, self.box, "work", out_at, status, self.out_at, self.stride)

    def _states(self) -> tuple[Array, int]:
        """(L, 3) state and words left of each lane after its start, and words that were taken."""
        counts = self.tile.counts.astype(np.int64)
        head = np.minimum(counts, 2)
        first = np.cumsum(head) - head
        words = np.append(self.tile.words, np.zeros(2, np.uint32))
        one, two = words[np.minimum(first, len(words) - 1)], words[np.minimum(first + 1, len(words) - 1)]
        out = np.zeros((len(counts), 3), np.uint32)
        out[:, 0] = np.where(counts > 1, one, 0)
        out[:, 1] = np.where(counts > 1, two, np.where(counts > 0, one, 0))
        out[:, 2] = counts - head
        return out, int(head.sum())

    def _pieces(self) -> Array:
        """(n, 4) rows, lanes that decode, elements in a row, table: whole rows of a segment, then the rest.

        In front is one without rows and table, and behind the last one that never ends.
        """
        lanes, per, out = self.lanes.lanes, self.lanes.per, [(0, 0, 0, -1)]
        for table, m in self.segments:
            rows, rest = divmod(m, lanes * per)
            if rows:
                out.append((rows, lanes, lanes * per, table))
            if rest:
                out.append((1, -(-rest // per), rest, table))
        out.append((FOREVER, 0, 0, out[-1][3]))
        return np.array(out, np.int32)

    def _escapes(self, symbols: int, status: int, data: int, places: int, placed: tuple[int, int, str] | None) -> None:
        batch, p, s, t = self.batch, self.lanes, self.shared, self.dec.tensor
        start = (symbols, p.first_escape, s.bases, data, len(self.tile.escapes), self.limit, status)
        if placed is None:
            call = Call("found", (("WORD", 1), ("PLACED", False), ("BLOCK", 64)))
            batch.jobs[call].append((*start, s.code_of or 0, 0, 0, 0, 0, 0, 0, places))
            return
        out_at, stride, to = placed
        i, j = np.divmod(s.order, len(self.nc))
        blocks = np.stack(
            [self.starts[s.order], (np.cumsum(self.nr) - self.nr)[i], (np.cumsum(self.nc) - self.nc)[j], self.nc[j]],
            axis=1,
        )[self.sizes > 0].astype(np.int32)
        lists = batch.put(self.row_list.astype(np.int32)), batch.put(self.col_list.astype(np.int32))
        call = Call("added", (("WORD", t.grid.word), ("PLACED", True), ("BLOCK", 64)), to=to)
        batch.jobs[call].append(
            (*start, batch.put(blocks), len(blocks), *lists, out_at, stride, p.shift + p.zero, places)
        )


def _ranks(classes: Array, k: int) -> tuple[Array, Array, Array]:
    """Things sorted by class, stable; the rank of each in its class; and the number of each class."""
    order = np.argsort(classes, kind="stable")
    n = np.bincount(classes, minlength=k)
    rank = np.empty(len(classes), np.int64)
    rank[order] = np.arange(len(classes)) - np.repeat(np.cumsum(n) - n, n)
    return order, rank, n
