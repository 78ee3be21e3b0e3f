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
from rac.container import zstd
from rac.encode import lossy, ties
from rac.encode import record as rec
from rac.encode.analyse import LEVELS, Level, analyse, axis_of, grid_of
from rac.encode.calibrate import Layer, Note, calibrate
from rac.encode.sources import Attachment, SourceTensor
from rac.encode.tile import TileEncoder
from rac.errors import BudgetError, SourceError
from rac.quantize import lossless as ll
from rac.quantize import trellis as tr

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


DAMP = 0.03
"""Share of the mean energy that every input is taken to have beyond what was seen: the text is but a sample."""
STRENGTH, SPREAD = 0.5, 1.5
"""How far bits follow the sensitivity of a tensor, and by how many bits at most (docs/lossy.md)."""


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
        found[t.name] = Aligned(deviation, lossy.Scales(rows, cols), partial(triangular, layer.second, damp))
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


@dataclass(frozen=True, slots=True)
class Coded:
    """A quantised tensor and its units."""

    encoder: TileEncoder
    quantised: lossy.Quantised
    units: list[rec.Bytes]


def code(t: SourceTensor, recipe: Recipe) -> Coded:
    """Quantise and code one tensor of the recipe."""
    a = recipe.aligned[t.name]
    w = matrix_of(t)
    lane = grid_of("U8", w.shape, 1).tr
    recursion = a.recursion() if a.recursion else None
    q = lossy.quantise(w, t.dtype, a.base + recipe.scale, a.scales, lane, recipe.states, recipe.passes, recursion)
    del w, recursion
    plan = replace(analyse(lambda _, x, y: q.words[x:y], "U8", q.words.shape, _CODER), words=q.words)
    encoder = TileEncoder(plan)
    units: list[rec.Bytes] = [*([plan.shared] if plan.lanes else []), q.unit]
    for row in range(plan.grid.down):
        units += rec.band(t, encoder, row)
    return Coded(encoder, q, units)


def stored(group: ties.Group, recipe: Recipe) -> int:
    """Bytes of the record of a quantised tensor, all counted."""
    coded = code(group.tensor, recipe)
    behind = rec.Behind(coded.quantised.trellis, bytes(16), bytes(16))  # digests have one size
    return rec.size(rec.head(group, coded.encoder.plan, behind), coded.units)


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


def recipe_for(groups: Sequence[ties.Group], path: str, request: Request, note: Note | None = None) -> Recipe:
    """What the request and the weights (and, where a text is given, a calibration) say, at common scale 0."""
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
    groups: Sequence[ties.Group], recipe: Recipe, request: Request, jobs: int, note: Note | None = None,
    level: Level = LEVELS["default"], files: Sequence[Attachment] = (),
) -> Recipe:  # fmt: skip
    """The recipe with the common scale that meets the request in real bytes, from below, to half a percent.

    `level` codes the tensors that stay lossless, `files` travel along: both count in the size of the file.
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
        rest = _lossless([g for g in groups if g.tensor.name not in recipe.aligned], level, jobs)
        rest += sum(len(rec.attachment(file)[1]) + 512 for file in files)
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


def _lossless(groups: Sequence[ties.Group], level: Level, jobs: int) -> int:
    """About the bytes of the tensors that stay lossless, with their heads and index rows."""

    def one(g: ties.Group) -> int:
        encoder = rec.lossless(g.tensor, level)
        units = [unit for row in range(encoder.plan.grid.down) for unit in rec.band(g.tensor, encoder, row)]
        return len(encoder.plan.shared) + sum(map(len, units)) + 512

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(one, groups))
