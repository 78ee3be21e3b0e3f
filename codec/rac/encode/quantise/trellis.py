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
from rac.grid import Box
from rac.linalg import exact
from rac.linalg.triangular import Triangular
from rac.native import product
from rac.native import trellis as native
from rac.stages import trellis as trellis_stage
from rac.stages.base import Context
from rac.stages.words import DTYPES, to_words

Array = NDArray[Any]
F32 = np.float32
MOST = 127
ZERO = 128
LAMBDA = 0.35
"""Squared units that a bit is worth; best at every rate (docs/lossy.md)."""
SCALAR = 0.35 / 3
"""Squared units that a bit is worth without a trellis."""
BLOCK = 64
LEAST = 0.6
"""Deviation of a row in units below which it is coded finer than its sensitivity asks."""
LOW, HIGH = -12, 40
"""Quarter octaves of the deviation in units for which there are rate tables."""


@dataclass(frozen=True, slots=True)
class Scales:
    """How fine a matrix is quantised: unit of column j and row i is 2**(scale + cols[j] / 4 + rows[i] / 4)."""

    rows: NDArray[np.int8]
    cols: NDArray[np.int8]
    """DEAD for a column that no input reaches."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix as trellis/1 stores it."""

    words: NDArray[np.uint8]
    """(R, C)"""
    trellis: trellis_stage.Trellis
    unit: bytes
    dtype: str
    lane: int
    """Rows of a tile."""
    outliers: int
    dead: int
    """Columns that got no bits."""

    @property
    def dense(self) -> Array:
        """(R, C) words of the data type: what a decoder restores. Decoded anew each time."""
        r, c = self.words.shape
        numbers = self.trellis.open(self.unit, Context(self.dtype, r, c, 1))
        out = np.empty((r, c), f"<u{DTYPES[self.dtype].itemsize}")
        for a in range(0, r, self.lane):
            b = min(r, a + self.lane)
            numbers.decode(self.words[a:b], Box(a, b, 0, c), out[a:b])
        return out

    @property
    def digest(self) -> bytes:
        """XXH3-128 of the dense bytes."""
        return zstd.digest(self.dense.reshape(-1).view(np.uint8).data)


class Coders:
    """What the trellis does to Gaussians of each deviation: found by running it, once in a process.

    Deviations are in quarter octaves of the step at which a column of high rate is coded. Where a column gets little or
    no rate, a finer unit at the same slope (distortion against bits) is better, and below some deviation nothing at
    all: reverse water-filling.
    """

    SAMPLES = 1 << 14

    def __init__(self, states: int) -> None:
        self._states = states
        self._lock = threading.Lock()
        self._found: dict[tuple[int, int], tuple[NDArray[np.float64], float]] = {}
        self._fine: dict[int, int] = {}
        self._samples = np.random.default_rng(0).standard_normal(self.SAMPLES).astype(F32)

    def share(self, q: int, fine: int) -> NDArray[np.float64]:
        """(2 MOST + 1,) probability of the integers at deviation `q`, coded `fine` quarter octaves finer."""
        return self._run(min(HIGH, max(LOW, q)), fine)[0]

    def fine(self, q: int) -> int:
        """How many quarter octaves finer a column of deviation `q` is coded; -1: it is not."""
        if q >= 8:
            return 0
        if q not in self._fine:
            costs = {-1: float(exact.exp2(q / 2))} | {a: self._run(q, a)[1] for a in range(0, 9, 2)}
            self._fine[q] = min(costs, key=lambda a: costs[a])
        return self._fine[q]

    def _run(self, q: int, fine: int) -> tuple[NDArray[np.float64], float]:
        """(probabilities, distortion + bits times their worth in squared steps)."""
        with self._lock:
            if (q, fine) in self._found:
                return self._found[q, fine]
            finer = float(exact.exp2(fine / 2))  # squares of the unit by which it is finer
            x = (self._samples * trellis_stage.power(np.array(q + fine)))[None]
            rec = _magnitudes(self._states)
            p = _cells(q + fine, 1, self._states)
            slope = worth(self._states) * finer
            for _ in range(4):
                rate = (-slope * exact.log2(p)).astype(F32).reshape(1, 1, -1)
                search = native.Search(
                    self._states, trellis_stage.CODES[self._states], 1024, rec, rate, _far(self._states)
                )
                k, value, *_ = native.block(search, x, x.copy(), np.zeros((1, 1), F32), np.ones(1, F32))
                counts = np.bincount(k[0] + MOST, minlength=2 * MOST + 1)
                p = (counts + 32 * p) / (self.SAMPLES + 32)
            share = counts / self.SAMPLES
            used = share > 0
            bits = -float((share[used] * exact.log2(share[used])).sum())
            error = float(((x - value) ** 2).mean()) / finer
            p = 0.98 * p + 0.02 * _cells(q + fine, 3, self._states)
            self._found[q, fine] = p, error + worth(self._states) * bits
            return self._found[q, fine]


@functools.cache
def _cells(quarters: int, times: int, states: int) -> NDArray[np.float64]:
    """Probability of each integer's cell under a Gaussian of deviation `times` 2**(quarters / 4). Read only."""
    edges = np.arange(-MOST - 0.5, MOST + 1) if states == 1 else np.arange(-2 * MOST - 0.5, 2 * MOST + 2, 2.0)
    edges /= times * float(exact.exp2(quarters / 4)) * math.sqrt(2)
    out = np.diff(exact.erf(edges)) + 1e-7
    return np.asarray(out / out.sum())


@functools.cache
def coders(states: int) -> Coders:
    """The coders of a trellis with so many states, made once in a process."""
    return Coders(states)


def _quarters(x: Array) -> NDArray[np.int64]:
    return exact.quarters(np.maximum(x, 1e-30))


def quantise(
    w: NDArray[np.float32],
    dtype: str,
    scale: float,
    scales: Scales,
    lane: int,
    states: int,
    passes: int,
    recursion: Triangular | None = None,
    below: NDArray[np.float32] | None = None,
) -> Quantised:
    """Quantise `w` (R, C) float32 for the data type `dtype`.

    Args:
        w: The matrix, finite.
        dtype: "F32", "F16" or "BF16": what a decoder restores.
        scale: log2 of the unit.
        scales: Exponents of rows and columns, in quarter octaves.
        lane: Rows after which the trellis begins anew: those of a tile.
        states: States of the trellis, 4 to 256, or 1: none. A scalar's units of the same cost are larger (`worth`).
        passes: 1, or 2: again with the centroids of the first. With feedback, which would be of other values then, 1.
        recursion: Order of the columns and weights of their errors in each other's targets, of all rows or of each of
            several blocks of them; None: no feedback.
        below: Weights of the errors of rows in the targets of later rows (Rows.feed); None: no feedback of rows.

    Raises:
        RacError: The C kernel is not there.
    """
    r, c = w.shape
    bits = exact.exp2(min(max(scale, -60), 60)).astype(F32)
    step = bits * trellis_stage.power(scales.cols)
    step[scales.cols == trellis_stage.DEAD] = 0
    # The smallest magnitude is half a unit: a row must not lie far below it.
    near = np.sqrt(np.mean((w[:, step > 0] / step[step > 0]) ** 2, axis=1)) if (step > 0).any() else np.ones(r)
    row_list = np.minimum(
        scales.rows, np.clip(_quarters(near / LEAST), -trellis_stage.MOST, trellis_stage.MOST)
    ).astype(np.int8)
    row_unit = trellis_stage.power(row_list)
    if below is not None:
        u = row_unit.reshape(*below.shape[:-2], 1, -1)
        below = below * (u / u.swapaxes(-1, -2))  # of errors in units of their rows
    plain = np.ascontiguousarray((w / row_unit[:, None]).T)
    order = np.arange(c) if recursion is None else recursion.order
    feed = None if recursion is None else recursion.feed
    plain, step = np.ascontiguousarray(plain[order]), step[order]
    live = step > 0
    x = plain[live] / step[live][:, None]
    x /= np.sqrt(np.maximum((x * x).mean(1, keepdims=True), F32(1e-30)))
    by_row = np.sqrt((x * x).mean(0)) if x.size else np.ones(r)
    del x
    rows, row = np.unique(np.clip(_quarters(by_row), -16, 16), return_inverse=True)
    known = coders(states)
    fine = np.array([known.fine(q) for q in range(LOW, HIGH + 1)], np.int8)
    share = np.array(
        [
            [known.share(q + int(o), max(0, int(f))) for o in rows]
            for q, f in zip(range(LOW, HIGH + 1), fine, strict=True)
        ]
    )
    slope = worth(states) * exact.exp2(np.maximum(fine, 0) / 2)[:, None, None]
    costs = (states, (-slope * exact.log2(share)).astype(F32), fine, row.astype(np.uint8))
    rec, low, corrections = _magnitudes(states), 0, np.zeros(0, np.int8)
    k, value, wild, fine_of = _columns(plain, step, lane, rec, *costs, feed, below)
    if passes > 1 and feed is None:
        low, corrections = _centroids(k, value, plain, step * _finer(fine_of), rec)
        rec[low : low + len(corrections)] += corrections.astype(F32) / F32(64)
        k, value, wild, fine_of = _columns(plain, step, lane, rec, *costs, feed, below)
    back = np.argsort(order)
    value, wild, fine_of = value[back], wild[back], fine_of[back]
    cols = np.where(
        fine_of < 0, trellis_stage.DEAD, np.maximum(scales.cols.astype(np.int64) - fine_of, -trellis_stage.MOST)
    ).astype(np.int8)
    words = np.ascontiguousarray((k[back].T + ZERO).astype(np.uint8))
    places = np.argwhere(wild.T)
    apart = (value.T[wild.T != 0] * row_unit[places[:, 0]]).astype(F32)
    sizes, unit = trellis_stage.build_unit(corrections, row_list, cols, places, to_words(apart, dtype))
    p = trellis_stage.Trellis(states, ZERO, low + ZERO - MOST, int(bits.view(np.uint32)), sizes)
    return Quantised(words, p, unit, dtype, lane, len(places), int((cols == trellis_stage.DEAD).sum()))


def worth(states: int) -> float:
    """Squared units that a bit is worth."""
    return LAMBDA if states > 1 else SCALAR


def _far(states: int) -> float:
    """Units from which on a number is an outlier."""
    return 2.0 * MOST if states > 1 else MOST + 0.5


def _magnitudes(states: int) -> NDArray[np.float32]:
    """(2 MOST + 1,) those of the integers -MOST..MOST."""
    return trellis_stage.magnitudes(states, ZERO)[ZERO - MOST : ZERO + MOST + 1].copy()


def _finer(fine: NDArray[np.int8]) -> NDArray[np.float32]:
    """Factor of the step of each column; 0 where it is not coded."""
    out: NDArray[np.float32] = np.where(fine < 0, F32(0), trellis_stage.power(-fine))
    return out


def _columns(
    plain: NDArray[np.float32],
    step: NDArray[np.float32],
    lane: int,
    rec: NDArray[np.float32],
    states: int,
    rate: NDArray[np.float32],
    fine: NDArray[np.int8],
    row: NDArray[np.uint8],
    feed: NDArray[np.float32] | None,
    below: NDArray[np.float32] | None,
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.uint8], NDArray[np.int8]]:
    """Integers, values and outliers (C, R), and how fine each column is, block by block from the last to the first."""
    c, r = plain.shape
    k, value, wild = np.empty((c, r), np.int16), np.empty((c, r), F32), np.empty((c, r), np.uint8)
    fine_of = np.empty(c, np.int8)
    error = np.empty((c, r), F32)
    search = native.Search(states, trellis_stage.CODES[states], lane, rec, rate, _far(states), fine, LOW, row, below)
    each = np.zeros((1, c, c), F32) if feed is None else feed.reshape(-1, c, c)
    if below is not None and below.ndim == 3:
        each = np.broadcast_to(each, (len(below), c, c))
    own = r // len(each)  # rows of a block
    for b in range(c, 0, -BLOCK):
        a = max(0, b - BLOCK)
        target = plain[a:b].copy()
        if feed is not None and b < c:
            for g, one in enumerate(each):
                mine = slice(g * own, (g + 1) * own)
                product.add(target[:, mine], one[a:b, b:], error[b:, mine])
        inner = np.ascontiguousarray(each[:, a:b, a:b])
        k[a:b], value[a:b], wild[a:b], fine_of[a:b] = native.block(search, plain[a:b], target, inner, step[a:b])
        error[a:b] = target
    return k, value, wild, fine_of


def _centroids(
    k: NDArray[np.int16],
    value: NDArray[np.float32],
    plain: NDArray[np.float32],
    step: NDArray[np.float32],
    rec: NDArray[np.float32],
) -> tuple[int, NDArray[np.int8]]:
    """First index and corrections, in 1/64, of the integers that occur often enough."""
    unit = np.where(step > 0, step, 1)[:, None]
    sign = np.sign(value) * np.sign(rec[k + MOST])
    at = (k + MOST).ravel()
    n = np.bincount(at, minlength=2 * MOST + 1)
    mean = np.bincount(at, weights=(plain / unit * sign).ravel(), minlength=2 * MOST + 1) / np.maximum(n, 1)
    off = np.clip(np.rint((mean - rec) * 64), -48, 48) * (n >= 100)
    used = np.flatnonzero(off)
    if not len(used):
        return 0, np.zeros(0, np.int8)
    return int(used[0]), off[used[0] : used[-1] + 1].astype(np.int8)
