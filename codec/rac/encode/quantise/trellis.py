"""One matrix to small integers and scales: trellis-coded, with the errors of finished columns fed back.

The recursion is successive interference cancellation through a Cholesky factor (Babai's nearest plane; WaterSIC,
arXiv 2603.04956), the quantiser the sign-symmetric trellis of stages/trellis.md under an entropy constraint (Fischer &
Wang, "Entropy-constrained trellis-coded quantization", 1992).
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.encode.code.plan import CODER, Level, Plan, grid_of
from rac.encode.encoded import Bytes
from rac.encode.record import coded
from rac.grid import Box
from rac.linalg import exact
from rac.linalg.device import Errors
from rac.linalg.triangular import Triangular
from rac.native import product, trellis
from rac.quantize import MOST, ZERO, magnitudes
from rac.stages import trellis as trellis_stage
from rac.stages.base import Context
from rac.stages.words import DTYPES, to_words

Array = NDArray[Any]
F32 = np.float32
LAMBDA = 0.35  # squared units that a bit is worth; best at every rate (docs/lossy.md)
SCALAR = 0.35 / 3  # squared units that a bit is worth without a trellis
ALONE = 0.7924812503605781  # log2 of the units without a trellis that cost the same: of the root of LAMBDA / SCALAR
BLOCK = 64
LEAST = 0.6  # deviation of a row in units below which it is coded finer than its sensitivity asks
FINER = (0, 1, 2, 4, 6, 8)  # quarter octaves that a column of little rate may be coded finer
HARM = 0.7213475204444817  # bits that the squared error of a number is worth: of a unit squared / 4 log 2, at LAMBDA
MANY, FULL = 4, 128  # outliers of a row or column up to which nothing is done: so many, or one number in so many
MORE = 4  # times as many as the middle row or column has up to which nothing is done
COARSER = 40  # quarter octaves, and one, up to which a row or column may be coarser than its errors ask for
LOW, HIGH = -12, 40  # quarter octaves of the deviation in units for which there are rate tables
SAMPLES = 1 << 14
PIECE = 1 << 20  # numbers that are looked at together: temporary arrays are no larger


@dataclass(frozen=True, slots=True)
class Scales:
    """How fine a matrix is quantised: unit of column j and row i is 2**(scale + cols[j] / 4 + rows[i] / 4)."""

    rows: NDArray[np.int8]
    cols: NDArray[np.int8]  # DEAD for a column that no input reaches


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard a matrix is searched, and how its integers are coded."""

    states: int  # states of the trellis, 4 to 1024, or 1: none, at larger units of the same cost
    passes: int = 1  # 1, or 2: again with the centroids of the first, where nothing is fed back
    coder: Level = CODER
    sparse: bool = False  # what is 0 stays 0; without a trellis only, which has no 0


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix as trellis/1 stores it."""

    words: NDArray[np.uint8]  # (R, C)
    trellis: trellis_stage.Trellis
    unit: bytes
    dtype: str
    coder: Level
    outliers: int
    dead: int  # columns that got no bits

    @property
    def dense(self) -> Array:
        """(R, C) words of the data type: what a decoder restores. Decoded anew each time."""
        r, c = self.words.shape
        numbers = self.trellis.open(self.unit, Context(self.dtype, r, c, 1))
        out = np.empty((r, c), f"<u{DTYPES[self.dtype].itemsize}")
        lane = _lane(self.words.shape, self.coder)
        for a in range(0, r, lane):
            b = min(r, a + lane)
            numbers.decode(self.words[a:b], Box(a, b, 0, c), out[a:b])
        return out

    @property
    def digest(self) -> bytes:
        """XXH3-128 of the dense bytes."""
        return zstd.digest(self.dense.reshape(-1).view(np.uint8).data)

    def coded(self) -> tuple[Plan, list[Bytes]]:
        """How the words are stored, and the units of their record."""
        plan, tiles = coded(self.words, self.coder)
        return plan, [*plan.fronts, self.unit, *tiles]


def _lane(shape: tuple[int, ...], coder: Level) -> int:
    """Rows of the tiles of a matrix of integers, after which a trellis begins anew."""
    return grid_of("U8", shape, 1, coder).tr


_LOCK = threading.Lock()  # threads wait for what one of them finds, rather than find it too


@functools.cache
def _found(states: int, q: int, fine: int) -> tuple[NDArray[np.float64], float]:
    """(probabilities of the integers, distortion + bits * worth) of a Gaussian of deviation `q`, coded `fine` finer."""
    finer, worth = float(exact.exp2(fine / 2)), LAMBDA if states > 1 else SCALAR
    x = (_samples() * trellis_stage.power(np.array(q + fine)))[None]
    rec, p = magnitudes(states), _cells(q + fine, 1, states)
    for _ in range(4):
        rate = (-worth * finer * exact.log2(p)).astype(F32).reshape(1, 1, -1)
        search = trellis.Search(states, trellis_stage.CODES[states], 1024, rec, rate, far(states))
        k, value, *_ = trellis.block(search, x, x.copy(), np.zeros((1, 1), F32), np.ones(1, F32))
        counts = np.bincount(k[0] + MOST, minlength=2 * MOST + 1)
        p = (counts + 32 * p) / (SAMPLES + 32)
    share = counts / SAMPLES
    used = share > 0
    bits = -float((share[used] * exact.log2(share[used])).sum())
    error = float(((x - value) ** 2).mean()) / finer
    return 0.98 * p + 0.02 * _cells(q + fine, 3, states), error + worth * bits


@functools.cache
def _samples() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(SAMPLES).astype(F32)


@functools.cache
def _cells(quarters: int, times: int, states: int) -> NDArray[np.float64]:
    """Probability of each integer's cell under a Gaussian of deviation `times` 2**(quarters / 4). Read only."""
    edges = np.arange(-MOST - 0.5, MOST + 1) if states == 1 else np.arange(-2 * MOST - 0.5, 2 * MOST + 2, 2.0)
    edges /= times * float(exact.exp2(quarters / 4)) * math.sqrt(2)
    out = np.diff(exact.erf(edges)) + 1e-7
    return np.asarray(out / out.sum())


@functools.cache
def _fine(states: int, q: int, corrected: bool) -> int:
    """How many quarter octaves finer a column of deviation `q` is coded; -1: it is not.

    Where a column gets little or no rate, a finer unit at the same slope (distortion against bits) is better, and below
    some deviation nothing at all: reverse water-filling. Values that are centroids (`corrected`) are no better for 1.
    """
    if q >= 8:
        return 0
    costs = {-1: float(exact.exp2(q / 2))} | {a: _found(states, q, a)[1] for a in FINER if a != 1 or not corrected}
    return min(costs, key=lambda a: costs[a])


def _quarters(x: Array) -> NDArray[np.int64]:
    return exact.quarters(np.maximum(x, 1e-30))


def quantise(
    w: NDArray[np.float32],
    dtype: str,
    scale: float,
    scales: Scales,
    effort: Effort,
    recursion: Triangular | None = None,
    below: NDArray[np.float32] | None = None,
) -> Quantised:
    """Quantise `w` (R, C) float32, finite, with units 2**scale for a decoder that restores `dtype`: F32, F16 or BF16.

    `recursion` has the order of the columns and weights of their errors in each other's targets, of all rows or of each
    of several blocks of them; `below` weights of the errors of rows in the targets of later rows (Rows.feed). None: no
    feedback. RacError where the C kernel is not there.
    """
    c, states = w.shape[1], effort.states
    bits = exact.exp2(min(max(scale, -60), 60)).astype(F32)
    step = _steps(bits, scales.cols)
    live = step > 0
    # the smallest magnitude is half a unit: a row must not lie far below it
    near = np.ones(len(w), F32)
    for some in pieces(w.shape) if live.any() else ():
        near[some] = _deviation(w[some][:, live] / step[live], 1, effort.sparse)
    most = np.clip(_quarters(near / LEAST), -trellis_stage.MOST, trellis_stage.MOST)
    scales = _roomy(
        w, bits, Scales(np.minimum(scales.rows, most).astype(np.int8), scales.cols), far(states), DTYPES[dtype].itemsize
    )
    step, row_list = _steps(bits, scales.cols), scales.rows
    row_unit = trellis_stage.power(row_list)
    if below is not None:
        u = row_unit.reshape(*below.shape[:-2], 1, -1)
        below = below * (u / u.swapaxes(-1, -2))  # of errors in units of their rows
    order = np.arange(c) if recursion is None else recursion.order
    plain = np.empty((c, len(w)), F32)
    for some in pieces(w.shape):
        plain[:, some] = (w[some] / row_unit[some, None]).T[order]
    step = step[order]
    rec, low, corrections = magnitudes(states), 0, np.zeros(0, np.int8)
    again = effort.passes > 1 and recursion is None
    rate, fine, row = _rates(plain, step, effort, again)
    lane, code = _lane(w.shape, effort.coder), trellis_stage.CODES[states]
    search = trellis.Search(states, code, lane, rec, rate, far(states), fine, LOW, row, below, sparse=effort.sparse)
    found = _columns(search, plain, step, recursion, again)
    if again:
        finer = np.where(found.fine < 0, F32(0), trellis_stage.power(-found.fine))
        low, corrections = _centroids(found, plain, step * finer, rec, effort.sparse)
        rec[low : low + len(corrections)] += corrections.astype(F32) / F32(64)
        found = _columns(search, plain, step, recursion)
    fine_of = found.fine[back := np.argsort(order)]
    cols = np.maximum(scales.cols.astype(np.int64) - fine_of, -trellis_stage.MOST)
    cols = np.where(fine_of < 0, trellis_stage.DEAD, cols).astype(np.int8)
    words = np.empty(w.shape, np.uint8)
    for some in pieces(w.shape):
        words[some] = found.words[:, some][back].T
    places, values = found.outliers(order)
    apart = (values * row_unit[places[:, 0]]).astype(F32)
    sizes, unit = trellis_stage.build_unit(corrections, row_list, cols, places, to_words(apart, dtype))
    p = trellis_stage.Trellis(states, ZERO, low + ZERO - MOST, int(bits.view(np.uint32)), sizes)
    return Quantised(words, p, unit, dtype, effort.coder, len(places), int((cols == trellis_stage.DEAD).sum()))


def pieces(shape: tuple[int, ...]) -> list[slice]:
    """Rows of a matrix that are looked at together; never one alone of several, whose sums have another order."""
    most = max(16, PIECE // max(1, shape[1]))
    ends = [*range(most, shape[0] - 1, most), shape[0]]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _steps(unit: Array, cols: NDArray[np.int8]) -> NDArray[np.float32]:
    """Steps of columns; 0: dead."""
    return np.where(cols == trellis_stage.DEAD, F32(0), unit * trellis_stage.power(cols))


def _roomy(w: NDArray[np.float32], unit: Array, scales: Scales, most: float, word: int) -> Scales:
    """Scales with coarser rows and columns where many numbers lie beyond `most` units: an outlier has 8 + `word` bytes.

    Not those that have at most MORE times as many as the middle one: where all have many, a fine unit was asked for.
    """
    lists = [scales.rows, scales.cols]
    for axis in (0, 1):  # rows, then columns
        each = trellis_stage.power(lists[0]), _steps(unit, lists[1])
        own, other = each[axis], np.where(each[1 - axis] > 0, each[1 - axis], F32(math.inf)) * F32(most)
        high = np.maximum(w.max(1 - axis, initial=0), -w.min(1 - axis, initial=0))
        line = np.flatnonzero((own > 0) & (high > own * other.min(initial=math.inf)))  # others have no outlier
        far = np.zeros(len(own), np.int64)
        for some in pieces((len(line), len(other))):
            far[line[some]] = np.count_nonzero(_units(w, axis, line[some], other, own) > 1, 1)
        line = line[far[line] > max(MANY, len(other) // FULL, MORE * int(np.sort(far)[len(far) // 2]))]
        if not len(line):
            continue
        steps, out = exact.exp2(np.arange(COARSER) / 4), np.zeros((COARSER, len(line)), np.int64)
        for some in pieces((len(line), len(other))):
            x = _units(w, axis, line[some], other, own)
            out[:, some] = [np.count_nonzero(x > F32(step), 1) for step in steps]
        cost = len(other) * (HARM * steps**2 - exact.log2(steps))[:, None] + 8 * (8 + word) * out
        lists[axis] = lists[axis].copy()
        lists[axis][line] = np.minimum(lists[axis][line] + np.argmin(cost, 0), trellis_stage.MOST)
    return Scales(*lists)


def _units(w: Array, axis: int, line: Array, other: Array, own: Array) -> Array:
    """Magnitudes of some rows, or with axis 1 columns, in what is too far out: units of both directions."""
    return np.abs(w.take(line, axis).swapaxes(0, axis)) / other / own[line][:, None]


def _deviation(x: Array, axis: int, sparse: bool) -> Array:
    """Roots of the mean squares along an axis, of what is not 0 there where the matrix is sparse."""
    square = np.add.reduce(x**2, axis=axis)
    return _root(square, x.shape[axis], np.count_nonzero(x, axis) if sparse else None)


def _root(square: Array, count: int, present: NDArray[np.int64] | None) -> Array:
    """Deviations from sums of `count` squares, of which only `present` are not 0 where the matrix is sparse."""
    square = square / F32(count)
    if present is not None:
        square *= count / np.maximum(1, present)
    return np.asarray(np.sqrt(square))


def _rates(
    plain: Array, step: Array, effort: Effort, corrected: bool
) -> tuple[NDArray[np.float32], NDArray[np.int8], NDArray[np.uint8]]:
    """`rate`, `fine` and `row` of a search (trellis.Search) among columns (C, R)."""
    live, states = np.flatnonzero(step > 0), effort.states
    square, present = np.zeros((0, plain.shape[1]), F32), np.zeros(plain.shape[1], np.int64)
    for some in pieces((len(live), plain.shape[1])) if len(live) and plain.size else ():
        x = plain[live[some]] / step[live[some]][:, None]
        x /= np.maximum(_deviation(x, 1, effort.sparse), F32(1e-15))[:, None]
        square = np.add.reduce(np.concatenate([square, x**2]), 0, keepdims=True)  # one column after the other
        present += np.count_nonzero(x, 0) if effort.sparse else 0
    by_row = _root(square[0], len(live), present if effort.sparse else None) if len(square) else np.ones(plain.shape[1])
    rows, row = np.unique(np.clip(_quarters(by_row), -16, 16), return_inverse=True)
    with _LOCK:
        fine = np.array([_fine(states, q, corrected) for q in range(LOW, HIGH + 1)], np.int8)
        share = [
            [_found(states, min(HIGH, max(LOW, q + int(o))), max(0, int(f)))[0] for o in rows]
            for q, f in zip(range(LOW, HIGH + 1), fine, strict=True)
        ]
    slope = (LAMBDA if states > 1 else SCALAR) * exact.exp2(np.maximum(fine, 0) / 2)[:, None, None]
    p = np.array(share)
    if effort.sparse and len(square):  # of what is 0 the coder is told by the integers too
        share_of = int(present.sum()) / (len(live) * plain.shape[1])
        p *= share_of
        p[..., MOST] += 1 - share_of
    return (-slope * exact.log2(p)).astype(F32), fine, row.astype(np.uint8)


def far(states: int) -> float:
    """Units from which on a number is an outlier."""
    return 2.0 * MOST if states > 1 else MOST + 0.5


@dataclass(slots=True)
class _Found:
    """What the columns (C, R) of a matrix became, in the places in which they were quantised."""

    words: NDArray[np.uint8]
    fine: NDArray[np.int8]
    values: NDArray[np.float32] | None  # where they are asked for
    apart: list[tuple[Array, Array, Array]] = field(default_factory=list)  # places, rows and values of outliers

    def put(self, a: int, b: int, found: trellis.Quantised) -> None:
        """Columns a to b."""
        np.add(found.integers, ZERO, out=self.words[a:b], casting="unsafe")
        self.fine[a:b] = found.fine
        place, row = np.nonzero(found.outliers)
        self.apart.append((place + a, row, found.values[place, row]))
        if self.values is not None:
            self.values[a:b] = found.values

    def outliers(self, order: Array) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(N, 2) rows and columns of what is stored apart, sorted, and (N,) its values."""
        place, row, value = (np.concatenate(each) for each in zip(*self.apart, strict=True))
        places = np.stack([row, order[place]], 1)
        sort = np.lexsort((places[:, 1], places[:, 0]))
        return places[sort], value[sort]


def _columns(
    search: trellis.Search,
    plain: NDArray[np.float32],
    step: NDArray[np.float32],
    recursion: Triangular | None,
    values: bool = False,
) -> _Found:
    """The columns (C, R), quantised block by block from the last to the first; `plain` gets their errors, if fed.

    No block of columns is read again once it is done, so that errors need no memory of their own. Those of a recursion
    that was found on a device are kept and multiplied there, but for experts'.
    """
    c, r = plain.shape
    feed = None if recursion is None else recursion.feed
    away = recursion is not None and recursion.device != "cpu" and recursion.feed.ndim == 2
    errors = Errors(recursion.feed, r, recursion.device) if recursion is not None and away else None
    out = _Found(np.empty((c, r), np.uint8), np.empty(c, np.int8), np.empty((c, r), F32) if values else None)
    each = () if feed is None else feed.reshape(-1, c, c)
    groups = max(len(each), 1 if search.below is None or search.below.ndim == 2 else len(search.below))
    own = r // groups  # rows of a block
    for b in range(c, 0, -BLOCK):
        a = max(0, b - BLOCK)
        target, inner = plain[a:b].copy(), np.zeros((groups, b - a, b - a), F32)
        for g in range(groups) if feed is not None else ():
            one, mine = each[g if len(each) > 1 else 0], slice(g * own, (g + 1) * own)
            inner[g] = one[a:b, a:b]
            if b < c and errors is None:
                product.add(target[:, mine], np.ascontiguousarray(one[a:b, b:]), plain[b:, mine])
        if errors is not None and b < c:
            target += errors.fed(a, b)
        out.put(a, b, trellis.block(search, plain[a:b], target, inner, step[a:b]))
        if errors is not None:
            errors.put(a, b, target)
        if feed is not None:
            plain[a:b] = target
    return out


def _centroids(found: _Found, plain: Array, step: Array, rec: Array, sparse: bool) -> tuple[int, NDArray[np.int8]]:
    """First index and corrections, in 1/64, of the integers that occur often enough."""
    assert found.values is not None  # noqa: S101 - they were asked for
    unit, k = np.where(step > 0, step, 1)[:, None], found.words.astype(np.int16) - ZERO
    sign = np.sign(found.values) * np.sign(rec[k + MOST])
    at = (k + MOST).ravel()
    n = np.bincount(at, minlength=2 * MOST + 1)
    mean = np.bincount(at, weights=(plain / unit * sign).ravel(), minlength=2 * MOST + 1) / np.maximum(n, 1)
    off = np.clip(np.rint((mean - rec) * 64), -48, 48) * (n >= 100)
    off[MOST] *= not sparse
    used = np.flatnonzero(off)
    if not len(used):
        return 0, np.zeros(0, np.int8)
    return int(used[0]), off[used[0] : used[-1] + 1].astype(np.int8)
