"""lanes/1 for a GPU: tables, lanes, escapes, and the places of elements that are sorted by class."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rac.errors import LimitError
from rac.gpu.layout import DEEP, Batch, Call, Codes, Place, Tile, by_row, call, columns, place, power_of_two
from rac.gpu.specs import WARP
from rac.grid import Box, up16
from rac.native.prototypes import Array
from rac.stages.lanes import layout
from rac.stages.lanes.opened import OpenLanes

TABLE = 4096 + 8 * 256  # bytes of a look-up table
FOREVER = 1 << 30  # rows of the piece behind the last one of a tile, which no lane decodes
MOST = 1 << 24  # elements of a tile up to which its places fit


class Lanes:
    """lanes/1."""

    def words(self, opened: OpenLanes, tile: Tile, to: Place) -> None:
        """Words in their places, the tops of those that escape added behind."""
        coded, p = _Coded(opened, tile), opened.p
        form = {"WORD": tile.dec.tensor.grid.word, "SHIFT": p.shift, "SIGN": int(p.sign), "ZERO": p.zero, "RAW": p.raw}
        fields = {"rows": coded.places[0], "columns": coded.places[1], "tops": coded.tables.tops}
        planes = [tile.at + start for start in coded.parsed.planes]
        place(tile, to, form | {"CODED": True}, tile.shape, **fields, symbols=coded.symbols, planes=planes)
        coded.add_escapes(to)

    def codes(self, opened: OpenLanes, tile: Tile, anywhere: bool) -> Codes:
        """The symbols where they are all of a word, else words row by row."""
        p = opened.p
        if p.raw or p.zero or not anywhere:
            return by_row(self, opened, tile)
        coded = _Coded(opened, tile)
        words = p.values()[: p.first_escape].astype(np.uint8)
        words = np.concatenate([words, np.setdiff1d(np.arange(256, dtype=np.uint8), words)])
        coded.find_escapes(words)
        return Codes("work", coded.symbols, coded.places, words)


class _Tables(NamedTuple):
    """What all tiles of a tensor have in common: offsets in `work` and `aux`."""

    luts: int
    tops: int
    bases: int
    entries: int  # codes are below; a power of two


def _tables(batch: Batch, s: OpenLanes) -> _Tables:
    """Lay out the tables of a tensor."""
    starts = np.full((len(s.freq), 257), 4096, np.uint32)
    starts[:, 0] = 0
    np.cumsum(s.freq, axis=1, out=starts[:, 1 : s.freq.shape[1] + 1])
    code = s.code ^ s.code >> 4 if s.p.per == 2 else s.code
    luts, at, each = batch.room(len(starts) * TABLE), batch.put(starts), np.arange(len(starts))
    codes = np.full(len(each), batch.put(np.append(code, np.zeros(256 - len(code), np.uint8))))
    batch.add(call("tables", BLOCK=2048), starts=at + 4 * 257 * each, codes=codes, table=luts + TABLE * each)
    return _Tables(luts, batch.put(s.values), batch.put(s.bases), power_of_two(max(16, int(code.max()) + 1)))


class _Sequence:
    """Where the elements of a tile stand in its sequence: sorted by table, then by classes, then row by row."""

    def __init__(self, s: OpenLanes, box: Box) -> None:
        order, h, w = s.order(box), box.r1 - box.r0, box.c1 - box.c0
        self.row_list: Array = np.arange(h) if order.rows is None else order.rows
        self.col_list: Array = np.arange(w) if order.cols is None else order.cols
        self.segments = list(zip(order.segments[:, 1].tolist(), order.sizes.tolist(), strict=True))
        """(table, elements) in order."""
        _, a, b, c, d = order.blocks.T
        first = np.cumsum((b - a) * (d - c)) - (b - a) * (d - c)
        self.blocks = np.stack([first, a, c, d - c], axis=1).astype(np.int32)
        """Each pair of classes: place of its first element, of its row and column in the lists, columns."""
        self.rows = np.zeros((s.p.cols, h + -h % DEEP), np.uint32)
        """Place of the first element of each row, for each class of columns."""
        ranks = np.empty(w, np.int64)
        for at, r0, r1, c0, c1 in zip(*(v.tolist() for v in (first, a, b, c, d)), strict=True):
            of = 0 if s.cols is None else int(s.cols[box.c0 + self.col_list[c0]])
            self.rows[of, self.row_list[r0:r1]] = at + np.arange(r1 - r0) * (c1 - c0)
            ranks[self.col_list[c0:c1]] = np.arange(c1 - c0) | of << 24
        self.columns = columns(ranks)


class _Coded:
    """A tile whose lanes are laid out: its symbols will stand in `work`."""

    def __init__(self, s: OpenLanes, tile: Tile) -> None:
        self.tile, self.opened = tile, s
        batch, (h, w) = tile.batch, tile.shape
        if h * w > MOST:
            raise LimitError(f"tiles of more than {MOST} elements are not for the GPU")
        p = s.p
        self.tables = batch.once((id(tile.dec), "lanes"), lambda: _tables(batch, s))
        self.parsed = layout.parse_tile(tile.unit, h * w, p)
        self.sequence = _Sequence(s, tile.box)
        self.symbols = batch.room(h * w + 4)
        self.escaped = batch.room(4 * len(self.parsed.escapes))  # places of the elements that escape
        self.places = batch.put(self.sequence.rows), batch.put(self.sequence.columns)
        words = tile.at + up16(p.directory)
        self._escapes = words + up16(4 * len(self.parsed.words))
        self._lanes(words)

    def _lanes(self, words: int) -> None:
        """The job of the lanes, whose words are at this offset."""
        tile, batch, p = self.tile, self.tile.batch, self.opened.p
        span = power_of_two(p.lanes)
        form = {"LANES": p.lanes, "SPAN": span, "PER": p.per, "BLOCK": max(WARP, span)}
        states, taken = _states(self.parsed)
        pieces = _pieces(self.sequence.segments, p.lanes, p.per)
        fields = {"words": words + 4 * taken, "tables": self.tables.luts, "symbols": self.symbols}
        fields |= {"states": batch.put(states), "pieces": batch.put(pieces), "rows": int(pieces[:-1, 0].sum())}
        fields |= {"first": p.first_escape, "places": self.escaped, "escapes": len(self.parsed.escapes)}
        batch.add(call("lanes", **form, ENTRIES=self.tables.entries), **fields, status=tile.status)

    def find_escapes(self, words: NDArray[np.uint8]) -> None:
        """Give the symbols that escape the codes of their tops; `words` (256,): the word of each code."""
        batch = self.tile.batch
        code_of = np.empty(256, np.uint8)
        code_of[words] = np.arange(256)
        codes = batch.once((id(self.tile.dec), "codes"), lambda: batch.put(code_of))
        unused = dict.fromkeys(("blocks", "n", "rows", "columns", "words", "stride", "shift"), 0)
        self._add(call("escapes", "", "work", WORD=1, PLACED=False, BLOCK=64), codes=codes, **unused)

    def add_escapes(self, to: Place) -> None:
        """Add the tops of the symbols that escape to words that stand in their places."""
        batch, sequence, p = self.tile.batch, self.sequence, self.opened.p
        if p.base > p.first_escape:
            fields = {"blocks": batch.put(sequence.blocks), "n": len(sequence.blocks), "shift": p.shift + p.zero}
            fields["rows"] = batch.put(sequence.row_list.astype(np.int32))
            fields["columns"] = batch.put(sequence.col_list.astype(np.int32))
            launch = call("escapes", "", to.memory, WORD=self.tile.dec.tensor.grid.word, PLACED=True, BLOCK=64)
            self._add(launch, codes=0, **fields, words=to.at, stride=to.stride)

    def _add(self, launch: Call, **fields: int) -> None:
        """A job of the escapes, if there can be any."""
        p = self.opened.p
        if p.base > p.first_escape:
            fields |= {"symbols": self.symbols, "places": self.escaped, "status": self.tile.status}
            fields |= {"first": p.first_escape, "bases": self.tables.bases, "limit": self.opened.limit}
            fields |= {"bytes": self._escapes, "count": len(self.parsed.escapes)}
            self.tile.batch.add(launch, **fields)


def _states(parsed: layout.Tile) -> tuple[NDArray[np.uint32], int]:
    """(L, 3) state and words left of each lane after its start, and the number of words that were taken."""
    counts = parsed.counts.astype(np.int64)
    head = np.minimum(counts, 2)
    first = np.cumsum(head) - head
    words = np.append(parsed.words, np.zeros(2, np.uint32))
    one, two = words[np.minimum(first, len(words) - 1)], words[np.minimum(first + 1, len(words) - 1)]
    out = np.zeros((len(counts), 3), np.uint32)
    out[:, 0] = np.where(counts > 1, one, 0)
    out[:, 1] = np.where(counts > 1, two, np.where(counts > 0, one, 0))
    out[:, 2] = counts - head
    return out, int(head.sum())


def _pieces(segments: list[tuple[int, int]], lanes: int, per: int) -> NDArray[np.int32]:
    """(n, 4) rows, lanes that decode, elements in a row, table: whole rows of each segment, the rest; two ends."""
    out = [(0, 0, 0, -1)]
    for table, n in segments:
        rows, rest = divmod(n, lanes * per)
        if rows:
            out.append((rows, lanes, lanes * per, table))
        if rest:
            out.append((1, -(-rest // per), rest, table))
    out.append((FOREVER, 0, 0, out[-1][3]))
    return np.array(out, np.int32)
