"""Which tensors are quantised, and how fine, so that the file meets a budget in real bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.align.triangular import Triangular, triangular
from rac.container import wire, zstd
from rac.encode import lossy, ties
from rac.encode.analyse import LEVELS, Level, Plan, analyse, axis_of, grid_of
from rac.encode.calibrate import Layer, Note, calibrate
from rac.encode.sources import Source, SourceTensor
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
_CODER = Level("default", 16, 1, 8, 6, 2, False, 0, 9, 1)


@dataclass(frozen=True, slots=True)
class Aligned:
    """What the alignment found for one matrix: everything about its quantisation but the common scale."""

    base: float
    """log2 of the unit at common scale 0."""
    scales: lossy.Scales
    recursion: Callable[[], Triangular] | None = None
    """Makes the recursion of the columns; None: no feedback."""
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


DAMP = 0.03
"""Share of the mean energy that every input is taken to have beyond what was seen: the text is but a sample."""
STRENGTH, SPREAD = 0.5, 1.5
"""How far bits follow the sensitivity of a tensor, and by how many bits at most (docs/experiments.md)."""


def calibrated(
    groups: Sequence[ties.Group], layers: Mapping[str, Layer], keep: Sequence[str], effort: str, damp: float = DAMP,
    strength: float = STRENGTH,
) -> Recipe:  # fmt: skip
    """A recipe from what a calibration has found: triangular, water-filled, rows and tensors by their sensitivity."""
    found: list[tuple[str, float, float, int, Aligned]] = []
    plain = data_free(groups, keep, effort)
    for g in groups:
        t = g.tensor
        if t.name not in plain.aligned:
            continue
        w, layer = matrix_of(t), layers.get(t.name)
        if layer is None or layer.second.shape[0] != w.shape[1]:
            found.append((t.name, plain.aligned[t.name].base, 0.0, 0, plain.aligned[t.name]))
            continue
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
        need = deviation + math.log2(_middle(weight)) + gain  # bits, up to a constant, where all count in full
        aligned = Aligned(deviation, lossy.Scales(rows, cols), partial(triangular, layer.second, damp), "triangular")
        found.append((t.name, deviation, need, w.size, aligned))
    total = max(1, sum(n for *_, n, _ in found))
    mean = sum(need * n for _, _, need, n, _ in found) / total
    out = {}
    for name, base, need, n, aligned in found:
        more = min(SPREAD, max(-SPREAD, strength * (need - mean))) if n else 0.0
        out[name] = replace(aligned, base=base - more)
    states, passes = EFFORTS[effort]
    return Recipe(out, states, passes, about={"calibrate": "text", "effort": effort})


def _middle(x: NDArray[Any]) -> float:
    """Geometric mean."""
    return float(np.exp(np.log(x).mean()))


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
        w,
        t.dtype,
        scale,
        a.scales,
        grid.tr,
        recipe.states,
        recipe.passes,
        None if a.recursion is None else a.recursion(),
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


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks of a lossy pack. One of `bits`, `file_bits` and `size` is given."""

    bits: float | None = None
    """Bytes of the quantised tensors * 8 / their weights, everything counted."""
    file_bits: float | None = None
    """Bytes of the file * 8 / all weights."""
    size: int | None = None
    """Bytes of the file."""
    calibrate: str = "none"
    """A text file, or "none"."""
    tokens: int = 40960
    effort: str = "default"
    keep: tuple[str, ...] = ()
    """Patterns of tensors that stay lossless."""

    def __post_init__(self) -> None:
        given = [v for v in (self.bits, self.file_bits, self.size) if v is not None]
        if len(given) != 1 or given[0] <= 0:
            raise ValueError("give one of bits, file_bits and size, above 0")
        if self.effort not in EFFORTS:
            raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, not {self.effort!r}")


def recipe_for(source: Source, path: str, request: Request, note: Note | None = None) -> Recipe:
    """What the request and the weights (and, where a text is given, a calibration) say, at common scale 0."""
    groups = ties.find(source.tensors)
    if request.calibrate == "none":
        return data_free(groups, request.keep, request.effort)
    try:
        with open(request.calibrate, encoding="utf-8") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"calibration text cannot be read: {e}", file=request.calibrate) from e
    layers = calibrate(path, text, tokens=request.tokens, note=note)
    recipe = calibrated(groups, layers, request.keep, request.effort)
    digest = zstd.digest(text.encode()).hex()
    return replace(recipe, about={**recipe.about, "calibrate": {"text": digest, "tokens": request.tokens}})


def solve(
    groups: Sequence[ties.Group], recipe: Recipe, request: Request, jobs: int, note: Note | None = None
) -> Recipe:
    """The recipe with the common scale that meets the request in real bytes, from below, to half a percent.

    BudgetError where no scale does.
    """
    mine = [g for g in groups if g.tensor.name in recipe.aligned]
    if not mine:
        raise BudgetError("no tensor is large enough to be quantised, or --keep keeps them all")
    weights = sum(math.prod(g.tensor.shape) for g in mine)
    bits = request.bits
    if bits is None:
        everything = sum(math.prod(g.tensor.shape) * (1 + len(g.aliases)) for g in groups)
        size = request.size if request.size is not None else int((request.file_bits or 0) * everything / 8)
        rest = _lossless([g for g in groups if g.tensor.name not in recipe.aligned], jobs)
        bits = 8 * (size - rest) / weights
        if bits <= 0:
            raise BudgetError(f"what stays lossless takes {rest} bytes, more than the {size} of the whole file")
    tried = 0

    def rate(scale: float) -> float:
        nonlocal tried
        now = replace(recipe, scale=scale)
        with ThreadPoolExecutor(jobs) as pool:
            total = sum(pool.map(lambda g: stored(g, now), mine))
        tried += 1
        if note:
            note(f"scale {scale:+.3f}: {8 * total / weights:.4f} bits per weight, wanted {bits:.4f}", tried, 0)
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
    raise BudgetError(f"{bits:.3f} bits per weight cannot be met: the nearest is {got:.3f}")


def _lossless(groups: Sequence[ties.Group], jobs: int) -> int:
    """About the bytes of the tensors that stay lossless, with their heads and index rows."""

    def one(g: ties.Group) -> int:
        t = g.tensor
        grid = grid_of(t.dtype, t.shape, axis_of(t.shape))

        def read(grid: ll.Grid, a: int, b: int) -> NDArray[Any]:
            row = grid.cols * grid.word
            return t.read(a * row, b * row).view(f"<u{grid.word}").reshape(b - a, grid.cols)

        plan = analyse(read, t.dtype, t.shape, LEVELS["default"])
        encoder = TileEncoder(plan)
        total = len(plan.shared) + 512
        for i in range(grid.down * grid.across):
            r0, r1, c0, c1 = grid.box(i)
            total += len(encoder.encode(read(grid, r0, r1)[:, c0:c1], i))
        return total

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(one, groups))
