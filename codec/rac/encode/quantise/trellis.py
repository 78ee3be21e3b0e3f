"""One matrix to small integers and scales: trellis-coded, with the errors of finished columns fed back.

The recursion is successive interference cancellation through a Cholesky factor (Babai's nearest plane; WaterSIC,
arXiv 2603.04956), the quantiser the sign-symmetric trellis of stages/trellis.md under an entropy constraint (Fischer &
Wang, "Entropy-constrained trellis-coded quantization", 1992).
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.encode.code.plan import CODER, Level, Plan, grid_of
from rac.encode.encoded import Bytes
from rac.encode.record import coded
from rac.grid import Box
from rac.linalg import exact
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
HARM = 0.7213475204444817  # bits that the squared error of a number is worth: of a unit squared / 4 log 2, at LAMBDA
MANY, FULL = 4, 128  # outliers of a row or column up to which nothing is done: so many, or one number in so many
MORE = 4  # times as many as the middle row or column has up to which nothing is done
COARSER = 40  # quarter octaves, and one, up to which a row or column may be coarser than its errors ask for
LOW, HIGH = -12, 40  # quarter octaves of the deviation in units for which there are rate tables
SAMPLES = 1 << 14


@dataclass(frozen=True, slots=True)
class Scales:
    """How fine a matrix is quantised: unit of column j and row i is 2**(scale + cols[j] / 4 + rows[i] / 4)."""

    rows: NDArray[np.int8]
    cols: NDArray[np.int8]  # DEAD for a column that no input reaches


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard a matrix is searched, and how its integers are coded."""

    states: int  # states of the trellis, 4 to 256, or 1: none, at larger units of the same cost
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
def _fine(states: int, q: int) -> int:
    """How many quarter octaves finer a column of deviation `q` is coded; -1: it is not.

    Where a column gets little or no rate, a finer unit at the same slope (distortion against bits) is better, and below
    some deviation nothing at all: reverse water-filling.
    """
    if q >= 8:
        return 0
    costs = {-1: float(exact.exp2(q / 2))} | {a: _found(states, q, a)[1] for a in range(0, 9, 2)}
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
    near = _deviation(w[:, live] / step[live], 1, effort.sparse) if live.any() else np.ones(len(w))
    most = np.clip(_quarters(near / LEAST), -trellis_stage.MOST, trellis_stage.MOST)
    scales = _roomy(
        w, bits, Scales(np.minimum(scales.rows, most).astype(np.int8), scales.cols), far(states), DTYPES[dtype].itemsize
    )
    step, row_list = _steps(bits, scales.cols), scales.rows
    row_unit = trellis_stage.power(row_list)
    if below is not None:
        u = row_unit.reshape(*below.shape[:-2], 1, -1)
        below = below * (u / u.swapaxes(-1, -2))  # of errors in units of their rows
    order, feed = (np.arange(c), None) if recursion is None else (recursion.order, recursion.feed)
    plain = np.ascontiguousarray((w / row_unit[:, None]).T)
    plain, step = np.ascontiguousarray(plain[order]), step[order]
    rec, low, corrections = magnitudes(states), 0, np.zeros(0, np.int8)
    rate, fine, row = _rates(plain, step, effort)
    lane, code = _lane(w.shape, effort.coder), trellis_stage.CODES[states]
    search = trellis.Search(states, code, lane, rec, rate, far(states), fine, LOW, row, below, sparse=effort.sparse)
    k, value, wild, fine_of = _columns(search, plain, step, feed)
    if effort.passes > 1 and feed is None:
        finer = np.where(fine_of < 0, F32(0), trellis_stage.power(-fine_of))
        low, corrections = _centroids(k, value, plain, step * finer, rec, effort.sparse)
        rec[low : low + len(corrections)] += corrections.astype(F32) / F32(64)
        k, value, wild, fine_of = _columns(search, plain, step, feed)
    back = np.argsort(order)
    value, wild, fine_of = value[back], wild[back], fine_of[back]
    cols = np.maximum(scales.cols.astype(np.int64) - fine_of, -trellis_stage.MOST)
    cols = np.where(fine_of < 0, trellis_stage.DEAD, cols).astype(np.int8)
    words = np.ascontiguousarray((k[back].T + ZERO).astype(np.uint8))
    places = np.argwhere(wild.T)
    apart = (value.T[wild.T != 0] * row_unit[places[:, 0]]).astype(F32)
    sizes, unit = trellis_stage.build_unit(corrections, row_list, cols, places, to_words(apart, dtype))
    p = trellis_stage.Trellis(states, ZERO, low + ZERO - MOST, int(bits.view(np.uint32)), sizes)
    return Quantised(words, p, unit, dtype, effort.coder, len(places), int((cols == trellis_stage.DEAD).sum()))


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
        x = np.abs(w.take(line, axis).swapaxes(0, axis)) / other / own[line][:, None]
        far = np.zeros(len(own), np.int64)
        far[line] = np.count_nonzero(x > 1, 1)
        many = far[line] > max(MANY, len(other) // FULL, MORE * int(np.sort(far)[len(far) // 2]))
        line, x = line[many], x[many]
        if not len(line):
            continue
        steps = exact.exp2(np.arange(COARSER) / 4)
        out = np.stack([np.count_nonzero(x > F32(step), 1) for step in steps])
        cost = len(other) * (HARM * steps**2 - exact.log2(steps))[:, None] + 8 * (8 + word) * out
        lists[axis] = lists[axis].copy()
        lists[axis][line] = np.minimum(lists[axis][line] + np.argmin(cost, 0), trellis_stage.MOST)
    return Scales(*lists)


def _deviation(x: Array, axis: int, sparse: bool) -> Array:
    """Roots of the mean squares along an axis, of what is not 0 there where the matrix is sparse."""
    square = np.mean(x**2, axis=axis)
    if sparse:
        square *= x.shape[axis] / np.maximum(1, np.count_nonzero(x, axis))
    return np.asarray(np.sqrt(square))


def _rates(
    plain: Array, step: Array, effort: Effort
) -> tuple[NDArray[np.float32], NDArray[np.int8], NDArray[np.uint8]]:
    """`rate`, `fine` and `row` of a search (trellis.Search) among columns (C, R)."""
    live, states = step > 0, effort.states
    x = plain[live] / step[live][:, None]
    x /= np.maximum(_deviation(x, 1, effort.sparse), F32(1e-15))[:, None]
    by_row = _deviation(x, 0, effort.sparse) if x.size else np.ones(plain.shape[1])
    rows, row = np.unique(np.clip(_quarters(by_row), -16, 16), return_inverse=True)
    with _LOCK:
        fine = np.array([_fine(states, q) for q in range(LOW, HIGH + 1)], np.int8)
        share = [
            [_found(states, min(HIGH, max(LOW, q + int(o))), max(0, int(f)))[0] for o in rows]
            for q, f in zip(range(LOW, HIGH + 1), fine, strict=True)
        ]
    slope = (LAMBDA if states > 1 else SCALAR) * exact.exp2(np.maximum(fine, 0) / 2)[:, None, None]
    p = np.array(share)
    if effort.sparse and x.size:  # of what is 0 the coder is told by the integers too
        p *= np.count_nonzero(x) / x.size
        p[..., MOST] += 1 - np.count_nonzero(x) / x.size
    return (-slope * exact.log2(p)).astype(F32), fine, row.astype(np.uint8)


def far(states: int) -> float:
    """Units from which on a number is an outlier."""
    return 2.0 * MOST if states > 1 else MOST + 0.5


def _columns(
    search: trellis.Search, plain: NDArray[np.float32], step: NDArray[np.float32], feed: NDArray[np.float32] | None
) -> trellis.Quantised:
    """The columns (C, R), quantised block by block from the last to the first."""
    c, r = plain.shape
    k, value, wild, error = (np.empty((c, r), kind) for kind in (np.int16, F32, np.uint8, F32))
    out = trellis.Quantised(k, value, wild, np.empty(c, np.int8))
    each = np.zeros((1, c, c), F32) if feed is None else feed.reshape(-1, c, c)
    if search.below is not None and search.below.ndim == 3:
        each = np.broadcast_to(each, (len(search.below), c, c))
    own = r // len(each)  # rows of a block
    for b in range(c, 0, -BLOCK):
        a = max(0, b - BLOCK)
        target = plain[a:b].copy()
        if feed is not None and b < c:
            for g, one in enumerate(each):
                mine = slice(g * own, (g + 1) * own)
                product.add(target[:, mine], one[a:b, b:], error[b:, mine])
        inner = np.ascontiguousarray(each[:, a:b, a:b])
        found = trellis.block(search, plain[a:b], target, inner, step[a:b])
        out.integers[a:b], out.values[a:b], out.outliers[a:b], out.fine[a:b] = found
        error[a:b] = target
    return out


def _centroids(
    k: Array, value: Array, plain: Array, step: Array, rec: Array, sparse: bool
) -> tuple[int, NDArray[np.int8]]:
    """First index and corrections, in 1/64, of the integers that occur often enough."""
    unit = np.where(step > 0, step, 1)[:, None]
    sign = np.sign(value) * np.sign(rec[k + MOST])
    at = (k + MOST).ravel()
    n = np.bincount(at, minlength=2 * MOST + 1)
    mean = np.bincount(at, weights=(plain / unit * sign).ravel(), minlength=2 * MOST + 1) / np.maximum(n, 1)
    off = np.clip(np.rint((mean - rec) * 64), -48, 48) * (n >= 100)
    off[MOST] *= not sparse
    used = np.flatnonzero(off)
    if not len(used):
        return 0, np.zeros(0, np.int8)
    return int(used[0]), off[used[0] : used[-1] + 1].astype(np.int8)
