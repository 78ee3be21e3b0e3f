"""How fine everything is quantised, so that the file meets a budget in real bytes or a quality."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.layers import Note, calibrate, joined
from rac.container import zstd
from rac.encode import record as rec
from rac.encode import ties, workers
from rac.encode.align.recipe import EFFORTS, Recipe, calibrated, data_free, matrix_of
from rac.encode.code.plan import CODER, LEVELS, Bytes, Level, Plan, tuned
from rac.encode.quantise import trellis as lossy
from rac.encode.sources import Attachment, SourceTensor
from rac.encode.split import objects as split
from rac.errors import BudgetError, SourceError
from rac.linalg import exact
from rac.machine import room
from rac.native import product
from rac.stages.words import from_words

T = TypeVar("T")
TOLERANCE = 0.005
CLOSE = 0.1
"""Decibels that a file may have beyond the --snr that was asked for."""
SHAPED = 32
"""States of the trellis where errors of rows are fed back: every state carries its own."""
DECIBELS = 6.020599913279624
"""Of one bit: 20 log10 2."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A quantised tensor and its units."""

    plan: Plan
    quantised: lossy.Quantised
    """By trellis/1: the tensor, or what the objects leave to it."""
    units: list[Bytes]
    dtype: str
    alignment: str
    objects: tuple[split.Object, ...] = ()
    """What a third stage computes with."""

    @property
    def dense(self) -> NDArray[Any]:
        """(R, C) words of the data type: what a decoder restores. Decoded anew each time."""
        return split.after(self.quantised.dense, self.dtype, self.objects)

    def behind(self, digest: bytes, source: bytes) -> rec.Behind:
        """What stands behind the coder, given the digests of the dense bytes and of the source."""
        uses = tuple(o.name for o in self.objects)
        product = split.product_of(self.objects)
        return rec.Behind(self.quantised.trellis, digest, source, product, uses, self.alignment)


def code(t: SourceTensor, recipe: Recipe) -> Coded:
    """Quantise and code one tensor of the recipe."""
    a = recipe.aligned[t.name]
    w, dtype, objects = split.before(t, recipe)
    lane = split.lane_of(w.shape, recipe.coder)
    below = a.below()
    states = recipe.states if below is None else SHAPED
    q = lossy.quantise(w, dtype, a.base + recipe.scale, a.scales, lane, states, recipe.passes, a.columns(), below)
    del w, below
    plan, units = split.coded(q, recipe.coder)
    return Coded(plan, q, units, t.dtype, a.name, objects)


def stored(group: ties.Group, recipe: Recipe) -> int:
    """Bytes of the record of a quantised tensor and of its objects, all counted.

    An object that tensors share counts with the first of them, though it is in each of several shards.
    """
    return size_of(group, code(group.tensor, recipe), recipe)


def size_of(group: ties.Group, coded: Coded, recipe: Recipe) -> int:
    """The same of a tensor that is coded."""
    basis = recipe.aligned[group.tensor.name].basis
    mine = coded.objects if basis is None or basis.first == group.tensor.name else ()
    return _record(group, coded) + sum(o.size for o in mine)


def words(group: ties.Group, recipe: Recipe) -> tuple[str, NDArray[Any]]:
    """(name, the words (R, C) that a decoder restores) of a quantised tensor."""
    return group.tensor.name, code(group.tensor, recipe).dense


def _record(group: ties.Group, coded: Coded) -> int:
    behind = coded.behind(bytes(16), bytes(16))  # digests have one size
    return rec.size(rec.head(group, coded.plan, behind), coded.units)


def snr(t: SourceTensor, dense: NDArray[Any], recipe: Recipe) -> float:
    """Output signal to noise in dB, tr(W S W^T) / tr(E S E^T), S the second moment of the inputs, or 1 if not known.

    `dense` (R, C) has the words that a decoder restores.
    """
    w = matrix_of(t)
    e = from_words(dense, t.dtype) - w
    layer = recipe.aligned[t.name].layer
    if layer is None:
        energy, error = _energy(w, w), _energy(e, e)
    else:
        energy = error = 0.0
        each = layer.experts or (layer,)
        for one, a, b in zip(each, np.split(w, len(each)), np.split(e, len(each)), strict=True):
            second = np.asarray(one.second, np.float32)
            if layer.transposed:
                a, b = a.T, b.T
            energy, error = energy + _through(a, second), error + _through(b, second)
    return DECIBELS / 2 * float(exact.log2(energy / error)) if error > 0 and energy > 0 else math.inf


def _energy(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Sum of the products of the elements of two matrices, in numpy's order of additions."""
    return float((a * b).sum(dtype=np.float64))


def _through(a: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """tr(A S A^T)."""
    a = np.ascontiguousarray(a)
    product.add(out := np.zeros_like(a), a, np.ascontiguousarray(second))
    return _energy(out, a)


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks of a lossy pack. One of `bits`, `file_bits`, `size`, `snr` and `kl` is given."""

    bits: float | None = None
    """Bytes of the quantised tensors * 8 / their weights, everything counted."""
    file_bits: float | None = None
    """Bytes of the file * 8 / all weights."""
    size: int | None = None
    """Bytes of the file."""
    snr: float | None = None
    """Output signal to noise, mean over the quantised tensors, in dB."""
    kl: float | None = None
    """Divergence per token from the original on the calibration text, in nats."""
    calibrate: tuple[str, ...] = ()
    """Text files, and "self" for text that the model writes: each counts alike. Empty: from the weights alone."""
    tokens: int = 40960
    effort: str = "default"
    keep: tuple[str, ...] = ()
    """Patterns of tensors that stay lossless, beside norms, small tensors and embeddings."""
    cache: str | None = None
    """Folder where calibrations are kept; None: not kept."""
    align: str = "auto"
    """Of tensors whose inputs are known: one of split.ALIGNMENTS."""
    rank: int | None = None
    """Of the low-rank part of these; None: at effort "max" what pays, else 0."""
    embeddings: bool = False
    """Quantise embeddings and output layers too."""
    lanes: int | None = None
    slices: str | None = None
    """Per tile; None: as usual."""

    def __post_init__(self) -> None:
        given = list(self.goal.values())
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise ValueError("give one of bits, file_bits, size, snr and kl, above 0")
        if self.effort not in EFFORTS:
            raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, not {self.effort!r}")
        if self.align not in split.ALIGNMENTS:
            raise ValueError(f"alignment must be one of {', '.join(split.ALIGNMENTS)}, not {self.align!r}")
        if self.rank is not None and (self.rank < 0 or (self.rank and self.align in ("pca", "identity"))):
            raise ValueError("a rank is 0 or more, and above 0 only with triangular alignment")
        if not self.calibrate and (self.rank or self.align in ("triangular", "pca")):
            raise ValueError("ranks and alignments follow from the inputs of layers: give --calibrate too")
        if "none" in self.calibrate:
            raise ValueError("none is no text: it cannot be among those to calibrate on")
        if self.kl is not None and self.calibrate[:1] in ((), ("self",)):
            raise ValueError("a divergence is measured on the first calibration text: give a text file to calibrate on")

    @property
    def goal(self) -> dict[str, float]:
        """What was asked."""
        every = {
            "bits": self.bits,
            "file_bits": self.file_bits,
            "size": self.size,
            "snr": self.snr,
            "kl": self.kl,
        }
        return {k: v for k, v in every.items() if v is not None}

    @property
    def shape(self) -> dict[str, Any]:
        """What else was asked for, where it is not what one gets unasked."""
        every = (
            ("align", self.align),
            ("rank", self.rank),
            ("embeddings", self.embeddings),
            ("keep", sorted(self.keep)),
        )
        return {k: v for k, v in every if v != "auto" and v is not None and v is not False and v != []}

    @property
    def expected(self) -> float:
        """Bits per weight to expect, about: what ranks and bases are judged by."""
        return self.bits or self.file_bits or (self.snr / DECIBELS if self.snr else 3.0)

    @property
    def stated(self) -> dict[str, str]:
        """The same for the provenance, where numbers are whole."""
        return {k: repr(v) for k, v in self.goal.items()}


def recipe_for(groups: Sequence[ties.Group], path: str, request: Request, note: Note | None = None) -> Recipe:
    """What the request and the weights (and, but for "none", a calibration) say, at common scale 0."""
    if not request.calibrate:
        recipe = data_free(groups, request.keep, request.effort, request.embeddings)
        about = {**recipe.about, **request.shape, "goal": request.stated}
        return replace(recipe, coder=tuned(CODER, request.lanes, request.slices), about=about)
    texts = [None if name == "self" else read_text(name) for name in request.calibrate]
    found = [calibrate(path, text, tokens=request.tokens, note=note, cache=request.cache) for text in texts]
    layers = found[0] if len(found) == 1 else joined(found)
    recipe = calibrated(groups, layers, request.keep, request.effort, embeddings=request.embeddings)
    rank = 0 if request.rank is None and request.effort != "max" else request.rank  # takes long to find, and is rare
    recipe = split.choose(recipe, groups, rank, request.align, request.expected)
    used = [
        {"text": "self" if text is None else zstd.digest(text.encode()).hex(), "tokens": one.tokens}
        for text, one in zip(texts, found, strict=True)
    ]
    about = {**recipe.about, **request.shape, "calibrate": used, "goal": request.stated}
    return replace(recipe, coder=tuned(CODER, request.lanes, request.slices), about=about)


def texts_of(given: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    """What to calibrate on, as a request has it: one text or several; "none" alone is no text."""
    names = (os.fspath(given),) if isinstance(given, str | os.PathLike) else tuple(os.fspath(name) for name in given)
    return () if names == ("none",) else names


def read_text(path: str) -> str:
    """A text to calibrate or to measure on; SourceError where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"the text cannot be read: {e}", file=path) from e


class Judge(Protocol):
    """The model, whose weights can be replaced and whose predictions are compared with those of the original."""

    def put(self, names: Sequence[str], w: NDArray[np.float32]) -> None:
        """Replace the weights of a tensor, which has these names."""

    def kl(self) -> float:
        """Nats per token."""


def solve(
    groups: Sequence[ties.Group],
    recipe: Recipe,
    request: Request,
    jobs: int,
    note: Note | None = None,
    level: Level = LEVELS["default"],
    files: Sequence[Attachment] = (),
    judge: Judge | None = None,
    pool: Executor | None = None,
) -> Recipe:
    """The recipe with the common scale that meets the request: real bytes from below, to half a percent.

    `level` codes the tensors that stay lossless, `files` travel along: both count in the size of the file.
    `judge` measures the model where a divergence is asked for.
    `pool` does the work; else threads.
    BudgetError where no scale does.
    """
    if pool is None:
        with workers.start(jobs) as threads:
            return solve(groups, recipe, request, jobs, note, level, files, judge, threads)
    mine = [g for g in groups if g.tensor.name in recipe.aligned]
    if not mine:
        raise BudgetError("no tensor is large enough to be quantised, or --keep keeps them all")
    weights = sum(math.prod(g.tensor.shape) for g in mine)
    tried = 0

    by_name = {g.tensor.name: g for g in mine}

    def found_at(scale: float, work: Callable[[ties.Group, Recipe], T], what: str) -> Iterator[T]:
        nonlocal tried
        now = replace(recipe, scale=scale)
        tried += 1
        every = ((workers.need(g.tensor, now), (g, workers.only(now, g.tensor.name))) for g in mine)
        for i, result in enumerate(workers.run(pool, work, every, room()), 1):
            if note:
                note(f"looking for the scale: {what}, pass {tried} at {scale:+.3f}", i, len(mine))
            yield result

    if request.snr is not None:
        goal = request.snr
        mean = lambda scale: math.fsum(found_at(scale, _snr, f"{goal:g} dB")) / len(mine)  # noqa: E731
        found = _meet(mean, goal, goal + CLOSE, 0.8 - goal / DECIBELS, 1 / DECIBELS)
        if found[0] is None:
            raise BudgetError(f"{goal:g} dB cannot be met: the nearest is {found[1]:.2f} dB")
        return replace(recipe, scale=found[0])
    if request.kl is not None:
        assert judge is not None  # noqa: S101
        nats, j = request.kl, judge

        def loss(scale: float) -> float:
            for name, found in found_at(scale, words, f"{nats:g} nats"):
                group = by_name[name]
                j.put((name, *(a for a, _ in group.aliases)), from_words(found, group.tensor.dtype))
            return -math.log2(max(j.kl(), 1e-9))

        found = _meet(loss, -math.log2(nats), -math.log2(nats * (1 - 10 * TOLERANCE)), -2.0, 0.5)
        if found[0] is None:
            raise BudgetError(f"{nats:g} nats cannot be met: the nearest is {2 ** -found[1]:.4f}")
        return replace(recipe, scale=found[0])
    bits = request.bits
    if bits is None:
        everything = sum(math.prod(g.tensor.shape) * (1 + len(g.aliases)) for g in groups)
        size = request.size if request.size is not None else int((request.file_bits or 0) * everything / 8)
        rest = _lossless([g for g in groups if g.tensor.name not in recipe.aligned], level, jobs)
        rest += sum(len(rec.attachment(file)[1]) + 512 for file in files)
        bits = 8 * (size - rest) / weights
        if bits <= 0:
            raise BudgetError(f"what stays lossless takes {rest} bytes, more than the {size} of the whole file")
    rate = lambda scale: 8 * sum(found_at(scale, stored, f"{bits:.3f} bits")) / weights  # noqa: E731
    found = _meet(rate, bits * (1 - TOLERANCE), bits, 1.03 - bits, 1.0 if bits > 1 else 1.5)
    if found[0] is None:
        raise BudgetError(f"{bits:.3f} bits per weight cannot be met: the nearest is {found[1]:.3f}")
    return replace(recipe, scale=found[0])


def _snr(group: ties.Group, recipe: Recipe) -> float:
    return min(100.0, snr(group.tensor, code(group.tensor, recipe).dense, recipe))


def _meet(
    measure: Callable[[float], float], least: float, most: float, scale: float, slope: float
) -> tuple[float | None, float]:
    """(a scale at which the measure, falling in it, is between `least` and `most`; or None, and what it is there)."""
    goal = (least + most) / 2
    low, high = -math.inf, math.inf  # coarser than `low`, finer than `high`
    for _ in range(16):
        got = measure(scale)
        if least <= got <= most:
            return scale, got
        if got > most:
            low = max(low, scale)
        else:
            high = min(high, scale)
        step = scale + (got - goal) * slope
        if not low < step < high:
            step = (low + high) / 2 if math.isfinite(low + high) else step
        if abs(step) > 80 or abs(step - scale) < 1e-5:
            break
        scale = step
    return None, got


def _lossless(groups: Sequence[ties.Group], level: Level, jobs: int) -> int:
    """About the bytes of the tensors that stay lossless, with their heads and index rows."""

    def one(g: ties.Group) -> int:
        encoder = rec.lossless(g.tensor, level)
        units = [unit for row in range(encoder.plan.grid.down) for unit in rec.band(g.tensor, encoder, row)]
        return len(encoder.plan.front) + sum(map(len, units)) + 512

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(one, groups))
