"""What a pack would come to, from a sample of its tensors that is really packed: size and time before the work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.layers import Layer
from rac.encode import record, ties, workers
from rac.encode.align.choose import choose
from rac.encode.align.recipe import SHARE, Recipe, calibrated, check_keep, data_free, quantisable
from rac.encode.allocate.budget import Search
from rac.encode.allocate.few import LEAST
from rac.encode.code.plan import axis_of
from rac.encode.options import Budget, Lossy, PackOptions
from rac.encode.quantise.tensor import FEWEST, PRODUCTS, encode, size_of
from rac.encode.schedule import WINDOW
from rac.encode.sources import Extent, Source, SourceTensor
from rac.encode.sources.tables import is_table
from rac.errors import BudgetError
from rac.grid import matrix
from rac.linalg.factors import Factors
from rac.machine import room, threads_of
from rac.native import product

PIECE = 4 << 20  # bytes of a tensor that are coded for a sample
SAMPLE = 64 << 20  # bytes of all lossless ones
WEIGHTS = 12 << 20  # weights that are quantised for a sample
TEXT = 3  # to which share attached files shrink, about
HEADS = 512  # bytes of a record beside its units, about: head, index row, padding
MEASURED = 0.15  # share of a pass that the errors of what is written take, beside the products for known inputs
BESIDE = 1.4  # times the products of a calibration by numpy: torch is slower, and there is attention (docs/scaling.md)
FINDING = 2  # times that one sequence is run to find the chain of blocks
BOTH = 3  # multiply-adds of a calibration for each weight and token, with the backward pass; 1 without it


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of one type and shape, and what they would become."""

    how: str  # "lossless" or "quantised"
    dtype: str
    shape: tuple[int, ...]
    tensors: int
    weights: int
    dense: int
    size: int | None  # None: not known before the work


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a pack would come to."""

    parts: tuple[Part, ...]
    dense: int
    weights: int
    size: int | None
    """Bytes of the file; None where a divergence is asked for, which is known when the model has been run."""
    seconds: float
    """With so many workers, on this machine as busy as it is now."""
    core_seconds: float
    """What one core that does nothing else would take."""
    calibration: float
    """Seconds among `seconds` that the calibration takes, about: from the speed of a matrix product here."""
    sampled: int
    """Dense bytes that were packed to find this out."""


Kind = tuple[bool, str, tuple[int, ...]]
"""Whether tensors are quantised, their type and shape."""


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds, and those of all cores together."""

    seconds: float = 0.0
    cores: float = 0.0

    def __add__(self, other: Time) -> Time:
        return Time(self.seconds + other.seconds, self.cores + other.cores)


@dataclass(slots=True)
class Work:
    """Operations on quantised tensors whose inputs are known (linalg/, docs/scaling.md), and their weights."""

    weights: int = 0
    factors: int = 0  # n^3 of the second moments of n inputs: of each tensor its own, though some share theirs
    fed: float = 0.0  # multiply-adds of errors fed back in a pass
    measured: int = 0  # multiply-adds of measuring
    moments: int = 0  # numbers of the second moments

    @classmethod
    def of(cls, groups: Iterable[ties.Group]) -> Work:
        """All of some tensors."""
        out = cls()
        for g in groups:
            t = g.tensor
            rows, n = matrix(t.dtype, t.shape, axis_of(t.shape))
            each = t.shape[0] if len(t.shape) == 3 else 1  # experts
            out.weights += rows * n
            out.factors += each * n**3
            out.fed += rows * n**2 / 2
            out.measured += 2 * min(rows * n**2, each * max(PRODUCTS, FEWEST * n**2))
            out.moments += each * n**2
        return out


@dataclass(frozen=True, slots=True)
class Speed:
    """Core seconds of an operation of the kernels on this machine, from small runs."""

    factor: float  # of n^3
    product: float  # of a multiply-add

    @classmethod
    def here(cls) -> Speed:
        """The fastest of some."""
        n = 1024
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((64, n), np.float32), rng.standard_normal((n, n), np.float32)
        s = np.eye(n)
        factor = min(_busy(partial(product.factor, s.copy())) for _ in range(2))
        return cls(
            factor / n**3, min(_busy(partial(product.add, np.zeros_like(a), a, b)) for _ in range(3)) / a.size / n
        )


def _busy(work: Callable[[], object]) -> float:
    """Seconds of the processor, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def estimate(source: Source, options: PackOptions, request: Lossy | None) -> Estimate:
    """Size and time of a pack that is asked for so, from a sample; nothing is written.

    A few tensors of each type and shape are packed in memory, as they would be, and counted for the others. The time
    is that of this machine as busy as it is now.
    """
    if request is not None:
        check_keep(source.tensors, request.keep)
    kinds: dict[Kind, list[ties.Group]] = {}
    for g in ties.find(source.tensors):
        lossy = request is not None and quantisable(g.tensor, request.keep, request.embeddings)
        kinds.setdefault((lossy, g.tensor.dtype, g.tensor.shape), []).append(g)
    rest = {k: groups for k, groups in kinds.items() if not k[0]}
    mine = {k: groups for k, groups in kinds.items() if k[0]}
    with workers.start(threads_of(options.jobs)) as pool:
        sizes, time_of, sampled = _lossless(rest, options, pool)
        files = sum(len(a.data) if isinstance(a.data, bytes) else a.data.size for a in source.attachments) // TEXT
        fixed = sum(sizes.values()) + files
        every = sum(math.prod(t.shape) for t in source.tensors)
        calibration = Time()
        if request is not None and mine:
            bits = _bits(request.budget, fixed, every, _weights(mine))
            found, took, seen = _quantised(mine, request, bits, options, pool)
            calibration = _calibration(mine, rest, request)
            time_of, sampled = time_of + took + calibration, sampled + seen
            sizes |= found
    parts = tuple(_part(k, groups, sizes.get(k)) for k, groups in kinds.items())
    total = None if len(sizes) < len(kinds) else sum(sizes.values()) + files
    dense = sum(t.nbytes for t in source.tensors)
    return Estimate(parts, dense, every, total, time_of.seconds, time_of.cores, calibration.seconds, sampled)


def _part(kind: Kind, groups: Sequence[ties.Group], size: int | None) -> Part:
    names, n = sum(1 + len(g.aliases) for g in groups), math.prod(kind[2])
    how = "quantised" if kind[0] else "lossless"
    return Part(how, kind[1], kind[2], names, n * names, names * groups[0].tensor.nbytes, size)


def _weights(kinds: dict[Kind, list[ties.Group]]) -> int:
    return sum(math.prod(shape) * len(groups) for (_, _, shape), groups in kinds.items())


def _piece(t: SourceTensor) -> SourceTensor:
    """The first rows of a large tensor, about a third of the way down, where it can be cut there."""
    row = t.nbytes // max(1, t.shape[0]) if t.shape else 0
    if t.nbytes <= PIECE or not row or not isinstance(t.data, Extent):
        return t
    rows = max(1, min(t.shape[0], PIECE // row))
    at = (t.shape[0] - rows) // 3 * row
    part = replace(t.data, offset=t.data.offset + at, size=rows * row)
    return replace(t, shape=(rows, *t.shape[1:]), data=part)


def _spread(groups: Sequence[ties.Group], most: int) -> Iterable[ties.Group]:
    """At most `most` of the groups, spread evenly."""
    n = min(most, len(groups))
    return [groups[(2 * i + 1) * len(groups) // (2 * n)] for i in range(n)]


def _lossless(
    kinds: dict[Kind, list[ties.Group]], options: PackOptions, pool: Executor
) -> tuple[dict[Kind, int], Time, int]:
    """Bytes of each kind, time of all, and dense bytes of the sample."""
    each = max(1, SAMPLE // PIECE // max(1, len(kinds)))
    samples = {k: [replace(g, tensor=_piece(g.tensor)) for g in _spread(groups, each)] for k, groups in kinds.items()}
    jobs = [(g.tensor.nbytes, (g, options.lossless)) for groups in samples.values() for g in groups]
    start, busy = time.monotonic(), time.process_time()
    stored = {e.name: sum(map(len, e.units)) for e in workers.run(pool, record.whole, jobs, WINDOW)}
    seconds, busy = time.monotonic() - start, time.process_time() - busy
    seen, total, out = sum(n for n, _ in jobs), 0, {}
    for k, groups in kinds.items():
        dense = sum(g.tensor.nbytes for g in groups)
        mine = sum(g.tensor.nbytes for g in samples[k])
        out[k] = HEADS * len(groups) + round(sum(stored[g.tensor.name] for g in samples[k]) * dense / max(1, mine))
        total += dense
    return out, Time(seconds * total / max(1, seen), busy * total / max(1, seen)), seen


def _bits(budget: Budget, fixed: int, every: int, mine: int) -> float | None:
    """Bits per quantised weight that a budget leaves; None where it is one of quality."""
    if budget.bits is not None or (budget.size is None and budget.file_bits is None):
        return budget.bits
    size = budget.size if budget.size is not None else (budget.file_bits or 0) * every / 8
    if size <= fixed:
        raise BudgetError(f"what stays lossless takes about {fixed} bytes, more than the {size:.0f} of the whole file")
    return 8 * (size - fixed) / mine


def _quantised(
    kinds: dict[Kind, list[ties.Group]], request: Lossy, bits: float | None, options: PackOptions, pool: Executor
) -> tuple[dict[Kind, int], Time, int]:
    """Bytes of each kind, time of the work, and dense bytes of the sample."""
    sample, taken = list[ties.Group](), 0
    share = min(1.0, WEIGHTS / _weights(kinds))
    for groups in sorted(kinds.values(), key=lambda groups: -groups[0].tensor.nbytes * len(groups)):
        some = list(_spread(groups, max(1, round(share * len(groups)))))
        if not sample or taken + math.prod(groups[0].tensor.shape) <= WEIGHTS:
            sample += some
            taken += sum(math.prod(g.tensor.shape) for g in some)
    least = min(sample, key=lambda g: g.tensor.nbytes)
    first = data_free([least], request.keep, request.effort, request.embeddings)
    if least.tensor.name in first.aligned:  # which loads the kernels
        encode(least, first, measured=False)
    known = _known(sample) if request.calibration.any else {}
    start, before = time.monotonic(), time.process_time()
    recipe = replace(_recipe(sample, known, request), coder=options.coder, lossless=options.lossless)
    once = time.process_time() - before
    budget = replace(request.budget, bits=bits, file_bits=None, size=None) if bits else request.budget
    if budget.kl is not None:
        budget = Budget(bits=3.0)  # for the time
    search = Search(sample, recipe, pool)
    try:
        recipe = search.meet(budget)
    except BudgetError as e:
        if budget is request.budget:
            raise
        goal = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in request.budget.goal.items())
        raise BudgetError(f"{goal} cannot be met: it leaves {bits:.3f} bits for each quantised weight ({e})") from e
    busy, took = time.process_time() - before, time.monotonic() - start
    passes = search.tried if _weights(kinds) < LEAST or not bits else 1 + search.tried / SHARE
    every = Work.of(g for groups in kinds.values() for g in groups)
    cores = _cores((once, (busy - once) / search.tried, passes), Work.of(sample), every, bool(known))
    side = threads_of(options.jobs)
    crowded = max(1.0, took * min(side, len(sample)) / busy)  # seconds for each of the processor: others use it too
    spent = Time(cores / min(side, sum(map(len, kinds.values()))) * crowded, cores)
    jobs = ((workers.need(g.tensor, recipe), (g, workers.only(recipe, g.tensor.name))) for g in sample)
    size = sum(size_of(e, recipe) for e in workers.run(pool, partial(encode, measured=False), jobs, room()))
    rate = min(bits / 8, size / taken) if bits else size / taken  # less where lossless is finer than what was asked
    sizes = {k: round(math.prod(k[2]) * len(groups) * rate) for k, groups in kinds.items()}
    if request.budget.kl is not None:  # known when the model has been run
        sizes = {}
    return sizes, spent, sum(g.tensor.nbytes for g in sample)


def _cores(took: tuple[float, float, float], sample: Work, every: Work, known: bool) -> float:
    """Core seconds of all tensors; `took`: of the sample's recipe and of a pass over it, and how many passes."""
    recipe, one, passes = took
    share = every.weights / sample.weights
    if not known:
        return share * (recipe + (passes + MEASURED) * one)
    s = Speed.here()
    recipe = max(0.0, recipe - s.factor * sample.factors)
    one = max(0.0, one - s.product * sample.fed)
    products = s.factor * every.factors + s.product * (passes * every.fed + every.measured)
    return share * (recipe + (passes + MEASURED) * one) + products


@dataclass(frozen=True, slots=True, eq=False)
class _Moment:
    """Second moment (n, n) of inputs that are not known yet, of full rank."""

    found: NDArray[np.float32]

    @classmethod
    def of(cls, n: int) -> _Moment:
        """That of random ones."""
        x = np.random.default_rng(0).standard_normal((2 * n, n), dtype=np.float32)
        return cls(np.asarray(x.T @ x / len(x), np.float32))

    @property
    def key(self) -> str:
        """What tells it from others."""
        return str(len(self.found))

    def __call__(self) -> NDArray[np.float32]:
        return self.found


def _known(sample: Sequence[ties.Group]) -> dict[str, Layer]:
    """What a calibration may find of the tensors."""
    factors, moments, out = Factors(), dict[int, _Moment](), dict[str, Layer]()
    for g in sample:
        rows, n = matrix(g.tensor.dtype, g.tensor.shape, axis_of(g.tensor.shape))
        moments[n] = moments.get(n) or _Moment.of(n)
        out[g.tensor.name] = Layer(moments[n], np.ones(rows), factors=factors)
    return out


def _recipe(sample: Sequence[ties.Group], layers: Mapping[str, Layer], request: Lossy) -> Recipe:
    """The recipe of the sample: with a calibration one of inputs that are not known yet, which takes as long."""
    if not layers:
        return data_free(sample, request.keep, request.effort, request.embeddings)
    recipe = calibrated(sample, layers, request.keep, request.effort, embeddings=request.embeddings)
    rank = 0 if request.rank is None and request.effort != "max" else request.rank
    return choose(recipe, sample, rank, request.align, request.budget.expected)


def _calibration(kinds: dict[Kind, list[ties.Group]], rest: dict[Kind, list[ties.Group]], request: Lossy) -> Time:
    """Time of a calibration, about, by the speed of a product of matrices."""
    c = request.calibration
    if not c.texts:
        return Time()
    every = Work.of(g for groups in kinds.values() for g in groups)
    tables = [math.prod(g.tensor.shape) for groups in rest.values() for g in groups if is_table(g.tensor)]
    both = BOTH * every.weights + (BOTH - 1) * max(tables, default=0) if c.backward else every.weights
    a = np.ones((1024, 1024), np.float32)
    a @ a
    start, busy = time.monotonic(), time.process_time()
    a @ a
    seconds, busy = time.monotonic() - start, time.process_time() - busy
    one = (both + every.moments / 2) * c.tokens + FINDING * every.weights * min(c.tokens, c.context)
    products = BESIDE * one * len(c.texts) / 1024**3
    return Time(products * seconds, products * busy)
