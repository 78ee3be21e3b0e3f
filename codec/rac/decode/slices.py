"""A part of one tensor: only the tiles that it touches are read and decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rac import frameworks
from rac.container.access import InFile
from rac.container.forward import entries_by_name
from rac.container.reader import Archive
from rac.cpu.work import Place, Work
from rac.decode import random
from rac.decode.selection import Runs, select
from rac.decoder import Decoder
from rac.grid import Box
from rac.native.prototypes import Array
from rac.records import Online
from rac.tensor import Tensor, numbers

BAND = 1 << 24  # dense bytes of the rows of tiles that `in_bands` decodes at once, about


class Slice:
    """A tensor that is read where it is indexed: as in numpy, but for negative steps."""

    def __init__(self, archive: Archive, t: Tensor, framework: str, device: str) -> None:
        self._archive, self._tensor, self._framework, self._device = archive, t, framework, device
        self._shape = (*t.shape[:-1], t.shape[-1] // 2) if t.dtype == "F4" else t.shape

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles open the file again."""
        return _again, (self._archive, self._tensor.name, self._framework, self._device)

    def get_shape(self) -> list[int]:
        """Shape, in bytes of two values along the last dimension for F4."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Name of the data type."""
        return self._tensor.dtype

    @property
    def online(self) -> Online | None:
        """What the layer does to its input before this weight."""
        return self._tensor.online

    def __getitem__(self, key: Any) -> Any:
        """The part that `key` selects, in its own memory; SliceError, an IndexError, for what is no index of it."""
        t = self._tensor
        chosen = select(key, self._shape, self._gaps())
        found = chosen.of(self._read_runs(chosen.runs), self._framework)
        part = np.ascontiguousarray(found).reshape(-1)
        elements = (part.size * (2 if t.dtype == "F4" else 1),)
        out = frameworks.to_framework(part, t.dtype, elements, self._framework, self._device)
        return out.reshape(np.shape(found))

    def _gaps(self) -> list[int]:
        """Elements of each axis after which another tile begins; without end where tiles do not cut the axis."""
        t, shape = self._tensor, self._shape
        out = [1 << 63] * len(shape)
        if math.prod(shape):
            if t.axis < len(shape):
                out[t.axis] = max(1, t.grid.tc // (t.grid.cols // shape[t.axis]))
            if t.axis > 0:
                out[0] = max(1, t.grid.tr // (t.grid.rows // shape[0]))
        return out

    def _read_runs(self, runs: Sequence[Runs]) -> Array:
        """Elements of the ranges, which are several along one axis at most, joined."""
        axis = next((i for i, r in enumerate(runs) if len(r) > 1), None)
        if axis is None:
            return self._read([r for (r,) in runs])
        rest = [r[0] for r in runs]
        return np.concatenate([self._read([*rest[:axis], r, *rest[axis + 1 :]]) for r in runs[axis]], axis)

    def _read(self, box: Sequence[tuple[int, int]]) -> Array:
        """Elements of the box, as unsigned integers or, for C64, as complex numbers."""
        t, shape, axis = self._tensor, list(self._shape), self._tensor.axis
        r0, r1, c0, c1 = 0, t.grid.rows, 0, t.grid.cols
        whole = [(0, n) for n in shape]
        if shape and t.grid.rows * t.grid.cols:
            if axis > 0:
                inner = t.grid.rows // shape[0]
                r0, r1 = box[0][0] * inner, box[0][1] * inner
                whole[0] = box[0]
            if axis < len(shape):
                inner = t.grid.cols // shape[axis]
                c0, c1 = box[axis][0] * inner, box[axis][1] * inner
                whole[axis] = box[axis]
        words = self._tiles(r0, r1, c0, c1).reshape(-1)
        if t.dtype == "C64":
            words = words.view("<c8")
        view = words.reshape([b - a for a, b in whole])
        cut = tuple(slice(None) if w == b else slice(*b) for w, b in zip(whole, box, strict=True))
        return view[cut]

    def _tiles(self, r0: int, r1: int, c0: int, c1: int) -> Array:
        t, g = self._tensor, self._tensor.grid
        if r0 >= r1 or c0 >= c1:
            return np.empty((max(0, r1 - r0), max(0, c1 - c0)), f"<u{t.word}")
        a0, a1, b0, b1 = r0 // g.tr, -(-r1 // g.tr), c0 // g.tc, -(-c1 // g.tc)
        product = t.chain.product
        if product is not None and product.whole_rows:  # every column comes from all of them
            b0, b1 = 0, g.across
        top, left = a0 * g.tr, b0 * g.tc
        with InFile(self._archive.access.name, repr(t.name)):
            place = Place(numbers(t, min(g.rows, a1 * g.tr) - top, min(g.cols, b1 * g.tc) - left), top, left)
            rows = [t.first + a * g.across for a in range(a0, a1)]
            spans = [(0, t.first)] * (t.first > 0) + [(r + b0, r + b1) for r in rows]
            found = random.read_units(self._archive, t, spans)
            front = [unit.data for unit in found.pop(0)] if t.first else []
            dec = Decoder(t, front, random.objects(self._archive, t))
            work = Work()
            for (first, _), units in zip(spans[t.first > 0 :], found, strict=True):
                for i, unit in enumerate(units, first - t.first):
                    work.add(dec, range(i, i + 1), unit, place)
            work.run()
            box = Box(r0, r1, c0, c1)
            if product is None:
                return np.ascontiguousarray(place.part(box))
            out = np.empty((r1 - r0, c1 - c0), f"<u{t.word}")
            dec.join(place.part(Box(r0, r1, left, g.cols) if product.whole_rows else box), out, box)
            return out


def in_bands(archive: Archive, t: Tensor, threads: int, take: Callable[[int, Array], None]) -> None:
    """Decode a tensor some rows of tiles at a time, several side by side; all its bytes are checked.

    `take` gets the offset of each piece in the dense bytes, and its words; threads call it, in any order.
    """
    of, grid = Slice(archive, t, "numpy", "cpu"), t.grid
    step = max(1, BAND // max(1, grid.tr * grid.cols * t.word)) * grid.tr

    def decode(a: int) -> None:
        take(a * grid.cols * t.word, of._tiles(a, min(grid.rows, a + step), 0, grid.cols))

    with ThreadPoolExecutor(threads, "rac-decode") as pool:
        for _ in pool.map(decode, range(0, grid.rows, step)):
            pass


def _again(archive: Archive, name: str, framework: str, device: str) -> Slice:
    """A slice of an archive that was opened again."""
    entry = entries_by_name(archive.index)[name]
    return Slice(archive, random.parse(archive, archive.record(entry)), framework, device)
