"""Which tensors are quantised, and how fine, so that the file meets a budget in real bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import wire
from rac.encode import lossy, ties
from rac.encode.analyse import Level, Plan, analyse, axis_of, grid_of
from rac.encode.sources import SourceTensor
from rac.encode.tile import TileEncoder
from rac.errors import BudgetError, SourceError
from rac.quantize import lossless as ll
from rac.quantize import trellis as tr
from rac.records import record_size

EFFORTS = {"fast": (32, 1), "default": (256, 1), "max": (256, 2)}
"""States of the trellis, and passes over each matrix."""
KEEP = ("*embed*", "*norm*", "*lm_head*", "*wte*", "*wpe*", "*.bias", "*shared.weight")
"""Kept lossless unless the user says otherwise."""
SMALLEST = 1 << 14
TOLERANCE = 0.005
_CODER = Level("lossy", 16, 1, 8, 6, 2, False, 0, 9, 1)


@dataclass(frozen=True, slots=True)
class Aligned:
    """What the alignment found for one matrix: everything about its quantisation but the common scale."""

    base: float
    """log2 of the unit at common scale 0."""
    scales: lossy.Scales
    feed: Callable[[], NDArray[np.float32]] | None = None
    """Loads the feedback weights (C, C) of the recursion; None: no feedback."""
    alignment: str = "identity"


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


def matrix_of(t: SourceTensor) -> NDArray[np.float32]:
    """The tensor as a float32 matrix (R, C); SourceError where it holds NaN or infinity."""
    rows, cols = ll.matrix(t.dtype, t.shape, axis_of(t.shape))
    data = t.read(0, t.nbytes)
    if t.dtype == "BF16":
        w = (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        w = data.view("<f4" if t.dtype == "F32" else "<f2").astype(np.float32)
    if not np.isfinite(w).all():
        raise SourceError(f"tensor {t.name!r} holds NaN or infinity; keep it lossless with --keep {t.name!r}")
    return w.reshape(rows, cols)


def quantisable(t: SourceTensor, keep: Sequence[str] = ()) -> bool:
    """True for float matrices of some size whose name no pattern keeps."""
    if t.dtype not in tr.DTYPES or len(t.shape) < 2 or math.prod(t.shape) < SMALLEST:
        return False
    rows, cols = ll.matrix(t.dtype, t.shape, axis_of(t.shape))
    return min(rows, cols) >= 16 and not any(fnmatchcase(t.name, p) for p in (*KEEP, *keep))


def data_free(groups: Sequence[ties.Group], keep: Sequence[str], effort: str) -> Recipe:
    """A recipe from the weights alone: every matrix at the same ratio of its own deviation to the error."""
    aligned = {}
    for g in groups:
        if not quantisable(g.tensor, keep):
            continue
        w = matrix_of(g.tensor)
        rms = float(np.sqrt(np.mean(w.astype(np.float64) ** 2)))
        if rms > 0:
            zeros = lossy.Scales(np.zeros(w.shape[0], np.int8), np.zeros(w.shape[1], np.int8))
            aligned[g.tensor.name] = Aligned(math.log2(rms), zeros)
    states, passes = EFFORTS[effort]
    return Recipe(aligned, states, passes, about={"calibrate": "none", "effort": effort})


@dataclass(frozen=True, slots=True)
class Coded:
    """A quantised tensor, ready to be written."""

    encoder: TileEncoder
    quantised: lossy.Quantised
    units: list[bytes | memoryview]


def code(t: SourceTensor, recipe: Recipe) -> Coded:
    """Quantise and code one tensor of the recipe."""
    a = recipe.aligned[t.name]
    w = matrix_of(t)
    grid = grid_of("U8", w.shape, 1)
    scale = a.base + recipe.scale
    q = lossy.quantise(
        w, t.dtype, scale, a.scales, grid.tr, recipe.states, recipe.passes, None if a.feed is None else a.feed()
    )
    del w
    plan: Plan = replace(analyse(lambda _, x, y: q.words[x:y], "U8", q.words.shape, _CODER), words=q.words)
    encoder = TileEncoder(plan)
    units: list[bytes | memoryview] = [plan.shared] if plan.lanes else []
    units.append(q.unit)
    for i in range(plan.grid.down * plan.grid.across):
        r0, r1, c0, c1 = plan.grid.box(i)
        units.append(encoder.encode(q.words[r0:r1, c0:c1], i))
    return Coded(encoder, q, units)


def head(group: ties.Group, coded: Coded) -> dict[str, Any]:
    """The record head of a quantised tensor."""
    t, plan = group.tensor, coded.encoder.plan
    coder = plan.lanes.to_head() if plan.lanes else {"id": plan.method}
    out: dict[str, Any] = {
        "axis": axis_of(t.shape), "digest": coded.quantised.digest, "dtype": t.dtype, "name": t.name,
        "shape": list(t.shape), "stages": [coder, coded.quantised.trellis.to_head()],
        "tile": [plan.grid.tr, plan.grid.tc], "x-source": ties.digest(t),
    }  # fmt: skip
    if group.aliases:
        out["aliases"] = [list(a) for a in group.aliases]
    if group.extra:
        out["extra"] = group.extra
    return out


def stored(group: ties.Group, recipe: Recipe) -> int:
    """Bytes of the record of a quantised tensor, all counted."""
    coded = code(group.tensor, recipe)
    payload = sum(len(u) + wire.pad(len(u), wire.STREAM_ALIGN) for u in coded.units)
    full = head(group, coded) | {"units": wire.directory(coded.units)}
    return record_size(wire.record_head(1, 0, full, payload)[2], payload)


def solve(
    groups: Sequence[ties.Group], recipe: Recipe, bits: float, jobs: int, note: Callable[[str], None] | None = None
) -> Recipe:
    """The recipe with the common scale at which its tensors take `bits` per weight, up to 0.5 % less.

    BudgetError where no scale gets there.
    """
    mine = [g for g in groups if g.tensor.name in recipe.aligned]
    if not mine:
        raise BudgetError("no tensor is large enough to be quantised, or --keep keeps them all")
    weights = sum(math.prod(g.tensor.shape) for g in mine)

    def rate(scale: float) -> float:
        tried = replace(recipe, scale=scale)
        with ThreadPoolExecutor(jobs) as pool:
            total = sum(pool.map(lambda g: stored(g, tried), mine))
        if note:
            note(f"scale {scale:+.3f}: {8 * total / weights:.4f} bits per weight")
        return 8 * total / weights

    goal = bits * (1 - TOLERANCE / 2)
    scale, low, high = 1.03 - bits, -math.inf, math.inf  # coarser than `low`, finer than `high`
    for _ in range(16):
        got = rate(scale)
        if bits * (1 - TOLERANCE) <= got <= bits:
            return replace(recipe, scale=scale)
        if got > bits:
            low = max(low, scale)
        else:
            high = min(high, scale)
        step = scale + (got - goal) * (1.0 if bits > 1 else 1.5)
        if not low < step < high:
            step = (low + high) / 2 if math.isfinite(low + high) else step
        if abs(step) > 80 or abs(step - scale) < 1e-5:
            break
        scale = step
    raise BudgetError(f"{bits} bits per weight cannot be met: the nearest is {got:.3f}")
