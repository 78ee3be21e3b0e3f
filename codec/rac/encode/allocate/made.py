"""A calibration that was made beforehand, brought to the tensors that are packed.

A module's names are often others than those in the files (prefixes, several files of a pipeline, query, key and value
in one parameter), so a tensor whose name does not say it is found by its values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.layers import Layer, Layers
from rac.calibrate.sketch import places, sketch
from rac.encode import ties
from rac.encode.code.plan import axis_of
from rac.encode.sources import SourceTensor
from rac.errors import SourceError
from rac.grid import matrix
from rac.stages.words import DTYPES, from_words

_LOOKED_AT = 12  # rows of a tensor that are compared
_FEW = 8  # rows below which values say nothing: one of many may be near by chance


def matched(groups: Sequence[ties.Group], layers: Layers, file: str = "") -> dict[str, Layer]:
    """The layers by the names of the tensors that they are about; SourceError, of `file`, where they are of others."""
    out: dict[str, Layer] = {}
    differ: dict[str, str] = {}  # tensors of a layer's name that are others, and how they differ
    for g in groups:
        t = g.tensor
        if t.dtype not in DTYPES or len(t.shape) < 2 or not t.nbytes:
            continue
        rows, cols = matrix(t.dtype, t.shape, axis_of(t.shape))
        look = _Look(t, rows, cols)
        own = next((layers[n] for n in (t.name, *(a for a, _ in g.aliases)) if n in layers), None)
        if own is not None and look.is_whole(own):
            out[t.name] = own
        elif (part := look.among(layers)) is not None:
            out[t.name] = part
        elif own is not None:
            differ[t.name] = look.difference(own)
    if not out or len(differ) > len(out):
        raise SourceError(_why(layers, differ), file=file or None)
    return out


class _Look:
    """A tensor that is compared with layers, of which a few rows are read, once."""

    def __init__(self, t: SourceTensor, rows: int, cols: int) -> None:
        self._t, self._rows, self._cols = t, rows, cols
        self._at = np.unique(np.linspace(0, rows - 1, min(rows, _LOOKED_AT)).astype(np.int64))
        self._found: NDArray[np.float32] | None = None

    def _sketch(self) -> NDArray[np.float32]:
        if self._found is None:
            size = self._t.nbytes // self._rows
            self._found = self._numbers([(int(a) * size, (int(a) + 1) * size) for a in self._at], len(self._at))
        return self._found

    def _numbers(self, ranges: Sequence[tuple[int, int]], rows: int) -> NDArray[np.float32]:
        """The sketch of rows that lie in ranges of the tensor's bytes."""
        data = np.concatenate([self._t.read(a, b) for a, b in ranges])
        values = from_words(data.view(f"<u{DTYPES[self._t.dtype].itemsize}"), self._t.dtype)
        return sketch(values.reshape(rows, 1, self._cols))

    def is_whole(self, layer: Layer) -> bool:
        """Whether the layer, which has the tensor's name, is about it: by shape, and by values where it knows them."""
        if layer.sketch is None:
            known = layer.sensitivity is None or layer.transposed or len(layer.sensitivity) == self._rows
            return known and self._fits(layer)
        return len(layer.sketch) == self._rows and len(places(layer.sketch, self._at, self._sketch(), self._rows)) > 0

    def among(self, layers: Mapping[str, Layer]) -> Layer | None:
        """The layer, or the part of one, that has the tensor's values."""
        if self._rows < _FEW:
            return None
        for layer in layers.values():
            if layer.sketch is None:
                continue
            for start in places(layer.sketch, self._at, self._sketch(), self._rows):
                if (part := _part(layer, int(start), self._rows)) is not None and self._fits(part):
                    return part
        return self._below_each_other(layers)

    def _below_each_other(self, layers: Mapping[str, Layer]) -> Layer | None:
        """Layers of which the tensor's rows are made: a query, key and value in one, for example."""
        known = (one for one in layers.values() if one.sketch is not None and len(one.sketch) >= _FEW)
        single = [one for one in known if not one.experts and not one.transposed]
        zero, first = np.zeros(1, np.int64), self._sketch()[:1]
        if not any(len(places(one.sketch[:1], zero, first, 1)) for one in single):  # type: ignore[index]
            return None
        whole, at = self._numbers([(0, self._t.nbytes)], self._rows), 0
        found: list[Layer] = []
        while at < self._rows:
            for one in single:
                n = len(one.sketch)  # type: ignore[arg-type]
                rest = whole[at : at + n]
                if len(rest) == n and len(places(one.sketch, np.arange(n), rest, n)):  # type: ignore[arg-type]
                    break
            else:
                return None
            found.append(one)
            at += n
        out = _stacked(found)
        return out if self._fits(out) else None

    def _fits(self, layer: Layer) -> bool:
        width = self._rows // max(1, len(layer.experts)) if layer.transposed else self._cols
        return layer.inputs == width

    def difference(self, layer: Layer) -> str:
        """How the layer of the tensor's name is about another."""
        rows = layer.sketch if layer.sketch is not None else layer.sensitivity
        if rows is not None and len(rows) != self._rows:
            return f"has {len(rows)} rows there, {self._rows} here"
        return "has other values there" if layer.sketch is not None else f"has {layer.inputs} inputs there"


def _stacked(found: Sequence[Layer]) -> Layer:
    """The layer of matrices below each other: of one input, or as blocks of equal height that each have their own."""
    known = all(one.sensitivity is not None for one in found)
    second = found[0].second
    if all(one.second is second or np.array_equal(one.second, second) for one in found[1:]):
        outputs = np.concatenate([one.sensitivity for one in found]) if known else None  # type: ignore[misc]
        return replace(
            found[0], sensitivity=outputs, finite=all(one.finite for one in found), sketch=None, outputs=None
        )
    step = math.gcd(*(len(one.sketch) for one in found))  # type: ignore[arg-type]
    parts = [_part(one, a, step) for one in found for a in range(0, len(one.sketch), step)]  # type: ignore[arg-type]
    each = [part for part in parts if part is not None]
    return Layer(found[0].moment, None, False, all(one.finite for one in found), each)


def _part(layer: Layer, start: int, rows: int) -> Layer | None:
    """The layer of `rows` rows of a matrix from `start` on; None where they have no second moment of their own."""
    assert layer.sketch is not None  # noqa: S101
    if start == 0 and rows == len(layer.sketch):
        return layer
    height = len(layer.sketch) // max(1, len(layer.experts))
    first, within = divmod(start, height)
    if layer.experts and within + rows > height:  # several of them
        each = layer.experts[first : first + rows // height]
        return None if within or rows % height else replace(layer, experts=each, sensitivity=None, outputs=None)
    one = layer.experts[first] if layer.experts else layer
    if one.transposed:
        return one if rows == height else None
    s, outer, own = one.sensitivity, one.outer, slice(within, within + rows)
    outputs = None if outer is None else outer[own, own]
    return replace(one, sensitivity=None if s is None else s[own], outputs=outputs)


def _why(layers: Layers, differ: Mapping[str, str]) -> str:
    if differ:
        name = next(iter(differ))
        return f"a calibration of another model: {name!r} {differ[name]} ({len(differ)} tensors differ)"
    return (
        f"no tensor has a name or the values of one of this calibration's {len(layers)} weights, such as "
        f"{min(layers, default='none')!r}: is it of another model? rac.calibrate takes names={{...}}"
    )
