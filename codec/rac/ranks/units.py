"""The units of a recipe, found tensor by tensor: as rows of markers, and which tensors one rank should have."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.encode.align.recipe import Aligned, Ask, Seen, input_of
from rac.encode.code.plan import axis_of
from rac.encode.quantise.trellis import Scales
from rac.grid import matrix
from rac.ranks.stage import Home

WIDE = 1024  # inputs from which on a factor takes long enough (15 ms) that one rank should have all that need it
FACTOR, FEEDBACK = 2200, 6400
"""The factor of n inputs takes as long as the search of n^3 / FACTOR bytes in BF16, feedback n / FEEDBACK of a search
(rates of docs/scaling.md)."""


def told(seen: Seen) -> list[Any]:
    """A row of a marker."""
    a = seen.aligned
    if a is None:
        return [seen.name, seen.why]
    few = None if a.few is None else _text(a.few.astype("<i8"))
    return [seen.name, seen.why, seen.need, a.base, a.zeros, a.fed, _text(a.scales.rows), _text(a.scales.cols), few]


def seen_of(row: Sequence[Any]) -> Seen:
    """What such a row says."""
    name, why, *found = row
    if not found:
        return Seen(name, why)
    need, base, zeros, fed, rows, cols, few = found
    scales = Scales(_numbers(rows, np.int8), _numbers(cols, np.int8))
    picked = None if few is None else _numbers(few, "<i8")
    return Seen(name, why, Aligned(base, scales, zeros=zeros, fed=fed, few=picked), need)


def _text(numbers: NDArray[Any]) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def _numbers(text: str, dtype: Any) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype).copy()


def homes_of(asked: Sequence[Sequence[Ask]]) -> dict[str, Home]:
    """Homes of tensors, by name: those of one wide input, whose factor is found once, have one."""
    out: dict[str, Home] = {}
    for number, some in enumerate(asked):
        t, layer = some[0]
        _, n = matrix(t.dtype, t.shape, axis_of(t.shape))
        if layer is None or layer.transposed or n < WIDE or not input_of(layer):
            continue
        cost = max(1, len(layer.experts)) * n**3 // FACTOR + sum(t.nbytes * (FEEDBACK + n) // FEEDBACK for t, _ in some)
        out |= {t.name: Home(number, cost) for t, _ in some}
    return out
