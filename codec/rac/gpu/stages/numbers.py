"""trellis/1 and groups/1 for a GPU, and the products behind them, lowrank/1 and basis/1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rac.gpu.layout import DEEP, Codes, Place, Rows, Tile, across, call, padded, steps
from rac.native.prototypes import Array
from rac.stages.groups import OpenGroups
from rac.stages.trellis import CODES, OpenTrellis
from rac.stages.words import DTYPES

COLS = 64  # columns of a program of `trellis`
BLOCK = 128  # outliers of a program
GROUP_ROWS, GROUP_COLS = 32, 256  # codes of a program of `groups`
PRODUCT_ROWS, PRODUCT_COLS = 16, 32  # words of a program of `product`


class Trellis:
    """trellis/1."""

    anywhere = True

    def lay(self, opened: OpenTrellis, tile: Tile, codes: Codes, to: Place) -> None:
        """The walk of a tile, and its outliers behind it."""
        batch, (h, w), (r0, r1, c0, c1) = tile.batch, tile.shape, tile.box
        step, turn = (_top(response) for response in CODES[opened.p.states])
        entries = batch.once((id(tile.dec), "entries"), lambda: batch.put(_entries(opened, codes, turn)))
        rows, columns = codes.places or batch.plain_map(h, w)
        cols = across(COLS, w)
        pairs = DTYPES[opened.dtype].itemsize == 2 and not (w % 2 or to.stride % 2 or to.at % 4)
        launch = call("trellis", codes.source, to.memory, TO=opened.dtype, COLS=cols, PAIRS=pairs)
        fields = {"rows": rows, "columns": columns, "codes": codes.at, "entries": entries, "step": step}
        fields["column_scales"] = batch.put(padded(opened.cols[c0:c1], cols))
        fields["row_scales"] = batch.put(padded(opened.rows[r0:r1], DEEP))
        batch.add(launch, **fields, numbers=to.at, stride=to.stride, h=h, w=w)
        _outliers(tile, opened, to)


def _outliers(tile: Tile, s: OpenTrellis, to: Place) -> None:
    """The outliers of a tile."""
    (r0, r1, c0, c1), size = tile.box, DTYPES[s.dtype].itemsize
    a, b = np.searchsorted(s.places[:, 0], (r0, r1))
    (y, x), words = s.places[a:b].T, s.values[a:b].view(f"<u{size}")
    mine = (x >= c0) & (x < c1)
    if mine.any():
        at = to.at + ((y[mine] - r0) * to.stride + x[mine] - c0) * size
        tile.batch.add(call("outliers", "", to.memory, WORD=size, BLOCK=BLOCK), place=at, word=words[mine])


def _entries(s: OpenTrellis, codes: Codes, turn: int) -> Array:
    """(256, 2) uint32 look-up entry of each code: magnitude, and what the code does to the state."""
    words = np.arange(256) if codes.words is None else codes.words.astype(np.int64)
    odd = (words - s.p.zero) & 1
    return np.stack([s.rec[words].view(np.uint32), odd.astype(np.uint32) * np.uint32(turn)], axis=1)


def _top(response: int) -> int:
    """The bits of a state in reverse order, from the highest of a register of 32 down."""
    return int(f"{response:032b}"[::-1], 2)


class Groups:
    """groups/1."""

    anywhere = False

    def lay(self, opened: OpenGroups, tile: Tile, codes: Codes, to: Place) -> None:
        """The numbers of a tile, in jobs of as many rows as a grid takes."""
        batch, (h, w), (r0, _, c0, _) = tile.batch, tile.shape, tile.box
        entries = batch.once((id(tile.dec), "groups"), lambda: _groups(tile, opened))
        lists, group, size = opened.scales.shape[1], opened.p.group, DTYPES[opened.dtype].itemsize
        first, left = divmod(c0, group)
        pairs = size == 2 and not (w % 2 or codes.at % 2 or to.stride % 2 or to.at % 4)
        form = {"TO": opened.dtype, "PAIRS": pairs, "SAME": not (group % 2 or left % 2)}
        launch = call("groups", codes.source, to.memory, **form, ROWS=GROUP_ROWS, COLS=GROUP_COLS)
        for y, deep in steps(h, w, GROUP_ROWS, GROUP_COLS):
            fields = {"codes": codes.at + y * w, "code_stride": w, "bits_status": opened.p.bits | tile.status << 8}
            fields |= {
                "entries": entries + 8 * ((r0 + y) * lists + first),
                "lists": lists,
                "group": group,
                "left": left,
            }
            batch.add(launch, **fields, numbers=to.at + y * to.stride * size, stride=to.stride, h=deep, w=w)


def _groups(tile: Tile, s: OpenGroups) -> int:
    """Offset in `aux` of the groups of the matrix, (R, G, 2) float32: scale, 2^23 + zero."""
    biased = s.zeros.astype(np.float32) + np.float32(2**23)
    return tile.batch.put(np.stack(np.broadcast_arrays(s.scales, biased), axis=-1))


@dataclass(frozen=True, slots=True)
class Product:
    """The numbers plus a product of two thin matrices (`added`, lowrank/1), or times a square one (basis/1)."""

    added: bool

    def lay(self, band: Rows, objects: Sequence[tuple[int, int]], to: Place) -> None:
        """Words of the tensor in their places, in jobs of as many rows as a grid takes.

        `objects`: of each its offset in the memory `objects`, and numbers from row to row.
        """
        batch, t, (r0, r1, c0, c1) = band.batch, band.dec.tensor, band.box
        w, (b, b_stride), (at, terms) = c1 - c0, objects[-1], objects[0] if self.added else (0, c1 - c0)
        stride = terms if self.added else 0
        form = {"WORD": t.word, "HALF": t.dtype == "F16", "ADDED": self.added}
        launch = call("product", "", to.memory, **form, ROWS=PRODUCT_ROWS, COLS=PRODUCT_COLS)
        for y, deep in steps(r1 - r0, w, PRODUCT_ROWS, PRODUCT_COLS):
            fields = {"numbers": band.numbers + 4 * y * w, "number_stride": w, "terms": terms}
            fields |= {"a": at + 4 * (r0 + y) * stride, "a_stride": stride, "b": b, "b_stride": b_stride}
            batch.add(launch, **fields, words=to.at + y * to.stride * t.word, stride=to.stride, h=deep, w=w)
