"""Why tensors of a lossy pack are lossless."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rac.encode import ties
from rac.records import Entry
from rac.stages.table import is_quantised

SMALLER = "smaller that way"


@dataclass(frozen=True, slots=True)
class Lossless:
    """Tensors of a lossy pack that are lossless for one reason."""

    why: str
    names: tuple[str, ...]
    weights: int
    """Their elements, under all their names."""


def reasons(groups: Sequence[ties.Group], why: Mapping[str, str], entries: Iterable[Entry]) -> tuple[Lossless, ...]:
    """The tensors that are lossless in the index rows of a file, by what `why` says of their names, most weights first.

    One of which it says nothing was to be quantised, and was smaller losslessly.
    """
    lossy = {e.name for e in entries if is_quantised(e.method)}
    found: dict[str, list[ties.Group]] = {}
    for g in groups:
        if g.tensor.name not in lossy:
            found.setdefault(why.get(g.tensor.name, SMALLER), []).append(g)
    out = [
        Lossless(reason, tuple(g.tensor.name for g in mine), sum(map(_weights, mine))) for reason, mine in found.items()
    ]
    return tuple(sorted(out, key=lambda one: -one.weights))


def _weights(g: ties.Group) -> int:
    return math.prod(g.tensor.shape) * (1 + len(g.aliases))
