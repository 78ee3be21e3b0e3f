"""What is quantised and how: which tensors, their units by row and column, and what their errors cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.align.triangular import Triangular, triangular
from rac.encode import lossy, ties
from rac.encode.analyse import axis_of
from rac.encode.calibrate import Layer
from rac.encode.sources import SourceTensor
from rac.errors import SourceError
from rac.quantize import lossless as ll
from rac.quantize import trellis as tr

EFFORTS = {"fast": (32, 1), "default": (256, 1), "max": (256, 2)}
"""States of the trellis, and passes over each matrix."""
KEEP = ("*embed*", "*norm*", "*lm_head*", "*wte*", "*wpe*", "*.bias", "*shared.weight")
"""Kept lossless unless the user says otherwise."""
SMALLEST = 1 << 14
DAMP = 0.03
"""Share of the mean energy that every input is taken to have beyond what was seen: the text is but a sample."""
STRENGTH, SPREAD = 0.5, 1.5
"""How far bits follow the sensitivity of a tensor, and by how many bits at most (docs/lossy.md)."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """What the alignment found for one matrix: everything about its quantisation but the common scale."""

    base: float
    """log2 of the unit at common scale 0."""
    scales: lossy.Scales
    layer: Layer | None = None
    """Its inputs; None: not known, and no errors are fed back."""
    damp: float = DAMP

    def recursion(self) -> Triangular | None:
        """The recursion of the columns."""
        return None if self.layer is None else triangular(self.layer.second, self.damp)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the tensors of a model are quantised."""

    aligned: Mapping[str, Aligned]
    """By name; tensors that are not in it stay lossless."""
    states: int
    passes: int
    scale: float = 0.0
    """log2 of the common factor of all units."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """For the provenance."""
    unreached: tuple[str, ...] = ()
    """Tensors that the calibration did not reach: they are quantised from the weights alone."""


def matrix_of(t: SourceTensor) -> NDArray[np.float32]:
    """The tensor as a float32 matrix (R, C); SourceError where it holds NaN or infinity."""
    w = tr.from_words(t.read(0, t.nbytes).view(f"<u{tr.DTYPES[t.dtype].itemsize}"), t.dtype)
    if not np.isfinite(w).all():
        raise SourceError(f"tensor {t.name!r} holds NaN or infinity; keep it lossless with --keep {t.name!r}")
    return w.reshape(ll.matrix(t.dtype, t.shape, axis_of(t.shape)))


def quantisable(t: SourceTensor, keep: Sequence[str] = ()) -> bool:
    """True for float matrices of some size whose name no pattern keeps."""
    if t.dtype not in tr.DTYPES or len(t.shape) < 2 or math.prod(t.shape) < SMALLEST:
        return False
    rows, cols = ll.matrix(t.dtype, t.shape, axis_of(t.shape))
    return min(rows, cols) >= 16 and not any(fnmatchcase(t.name, p) for p in (*KEEP, *keep))


def data_free(groups: Sequence[ties.Group], keep: Sequence[str], effort: str) -> Recipe:
    """A recipe from the weights alone: every matrix at the same ratio of its own deviation to the error."""
    wanted = [g.tensor for g in groups if quantisable(g.tensor, keep)]
    found = {t.name: _even(matrix_of(t)) for t in wanted}
    states, passes = EFFORTS[effort]
    about = {"calibrate": "none", "effort": effort}
    return Recipe({name: a for name, a in found.items() if a}, states, passes, about=about)


def _even(w: NDArray[np.float32]) -> Aligned | None:
    """A unit by the deviation of the whole matrix; None where it is all zeros."""
    rms = float(np.sqrt(np.mean(w.astype(np.float64) ** 2)))
    scales = lossy.Scales(np.zeros(w.shape[0], np.int8), np.zeros(w.shape[1], np.int8))
    return Aligned(math.log2(rms), scales) if rms > 0 else None


def calibrated(
    groups: Sequence[ties.Group], layers: Mapping[str, Layer], keep: Sequence[str], effort: str, damp: float = DAMP,
    strength: float = STRENGTH,
) -> Recipe:  # fmt: skip
    """A recipe from what a calibration has found: triangular, water-filled, rows and tensors by their sensitivity."""
    found: dict[str, Aligned] = {}
    needs: dict[str, tuple[float, int]] = {}
    for t in (g.tensor for g in groups if quantisable(g.tensor, keep)):
        w = matrix_of(t)
        even, layer = _even(w), layers.get(t.name)
        if even is None:
            continue
        found[t.name] = even
        if layer is None or layer.second.shape[0] != w.shape[1]:
            continue
        if not layer.finite:
            raise SourceError(
                f"the inputs or gradients of {t.name!r} hold NaN or infinity; keep it lossless with --keep {t.name!r}"
            )
        r = triangular(layer.second, damp)
        weight = np.empty(len(r.weight))
        weight[r.order] = r.weight
        cols = np.clip(np.rint(-4 * np.log2(weight / _middle(weight))), -tr.MOST, tr.MOST).astype(np.int8)
        gain, rows = 0.0, np.zeros(w.shape[0], np.int8)
        if layer.sensitivity is not None:
            s = np.maximum(layer.sensitivity, layer.sensitivity.mean() * 1e-4)
            gain = 0.5 * math.log2(_middle(s))
            rows = np.clip(np.rint(-2 * np.log2(s / _middle(s))), -tr.MOST, tr.MOST).astype(np.int8)
        scaled = w.astype(np.float64) / tr.power(rows)[:, None] / tr.power(cols)
        deviation = math.log2(_middle(np.sqrt(np.maximum((scaled**2).mean(0), 1e-30))))
        # bits, up to a constant, where all count in full
        needs[t.name] = deviation + math.log2(_middle(weight)) + gain, w.size
        found[t.name] = Aligned(deviation, lossy.Scales(rows, cols), layer, damp)
    total = max(1, sum(n for _, n in needs.values()))
    mean = sum(need * n for need, n in needs.values()) / total
    for name, (need, _) in needs.items():
        more = min(SPREAD, max(-SPREAD, strength * (need - mean)))
        found[name] = replace(found[name], base=found[name].base - more)
    states, passes = EFFORTS[effort]
    unreached = tuple(name for name in found if name not in needs)
    return Recipe(found, states, passes, about={"calibrate": "text", "effort": effort}, unreached=unreached)


def _middle(x: NDArray[Any]) -> float:
    """Geometric mean."""
    return float(np.exp(np.log(x).mean()))
