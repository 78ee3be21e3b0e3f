"""lowrank/1 and basis/1 for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rac.gpu.layout import Call, Place, Rows, steps

ROWS, COLS = 16, 32
"""Words of a program."""


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
        options = {"WORD": t.word, "HALF": t.dtype == "F16", "ADDED": self.added, "ROWS": ROWS, "COLS": COLS}
        call = Call("product", tuple(options.items()), out=to.memory)
        for y, deep in steps(r1 - r0, w, ROWS, COLS):
            fields = {"numbers": band.numbers + 4 * y * w, "number_stride": w, "terms": terms}
            fields |= {"a": at + 4 * (r0 + y) * stride, "a_stride": stride, "b": b, "b_stride": b_stride}
            batch.add(call, **fields, words=to.at + y * to.stride * t.word, stride=to.stride, h=deep, w=w)
