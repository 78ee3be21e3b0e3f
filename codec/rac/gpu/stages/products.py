"""lowrank/1 and basis/1 for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from rac.gpu.layout import Call, Place, steps
from rac.gpu.stages.base import Product

ROWS, COLS = 16, 32
"""Words of a program."""


def _lay(band: Product, to: Place, added: bool, a: tuple[int, int, int], b: tuple[int, int]) -> None:
    """Jobs of as many rows as a grid takes; `a`: offset and numbers from row to row (`added`), and terms of a sum."""
    batch, t, (r0, r1, c0, c1) = band.batch, band.dec.tensor, band.box
    w, (at, stride, terms) = c1 - c0, a
    options = {"WORD": t.word, "HALF": t.dtype == "F16", "ADDED": added, "ROWS": ROWS, "COLS": COLS}
    for y, deep in steps(r1 - r0, w, ROWS, COLS):
        fields = {"numbers": band.numbers + 4 * y * w, "number_stride": w, "terms": terms}
        fields |= {"a": at + 4 * y * stride, "a_stride": stride, "b": b[0], "b_stride": b[1]}
        call = Call("product", tuple(options.items()), out=to.memory)
        batch.add(call, **fields, words=to.at + y * to.stride * t.word, stride=to.stride, h=deep, w=w)


class LowRank:
    """lowrank/1."""

    def lay(self, band: Product, objects: Sequence[tuple[int, int]], to: Place) -> None:
        """The numbers plus a product of two thin matrices."""
        (at, rank), b = objects
        _lay(band, to, True, (at + 4 * band.box[0] * rank, rank, rank), b)


class Basis:
    """basis/1."""

    def lay(self, band: Product, objects: Sequence[tuple[int, int]], to: Place) -> None:
        """The numbers times a square matrix."""
        _lay(band, to, False, (0, 0, band.box[3] - band.box[2]), objects[0])
