"""A matrix to small integers and back, by the trellis alone.

The sign-symmetric trellis of format_spec/stages/trellis.md under an entropy constraint (Fischer & Wang,
"Entropy-constrained trellis-coded quantization", 1992), one walk down each column. Of what a file has beyond that there
is nothing here: no classes, no outliers, no coarser steps for weak columns, one rate for all.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rac.grid import Box
from rac.linalg.triangular import Triangular
from rac.native import trellis as native
from rac.stages import trellis

__all__ = ["dequantize", "quantize"]

MOST, ZERO = 127, 128


def quantize(
    w: ArrayLike,
    unit: float,
    states: int = 256,
    rows: ArrayLike | None = None,
    cols: ArrayLike | None = None,
    recursion: Triangular | None = None,
    slope: float = 0.35,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise a matrix; the integers are those of least squared error plus `slope` times their bits.

    The step of element (i, j) is unit * rows[i] * cols[j], the distance of neighbouring values. Bits are those of one
    Gaussian that has the deviation of all the matrix in steps, which is right where one table codes the integers.

    Args:
        w: (R, C) numbers, finite; computed in float32.
        unit: The step, above 0.
        states: States of the trellis: 4, 8, 16, 32, 64, 128, 256, 512 or 1024. More come nearer to the rate-distortion
            bound.
        rows: (R,) factors of the step above 0; None: 1.
        cols: (C,) factors of the step; 0: the column is dropped, its values are 0. None: 1.
        recursion: Feeds the errors of finished columns to those before them (GPTQ; WaterSIC, arXiv 2603.04956). Of its
            `order` (C,) places are quantised from the last to the first; `feed` (C, C) is as `rac.align.triangular` has
            it.
        slope: Squared steps that a bit is worth; 0: the nearest values whatever they cost.

    Returns:
        Integers (R, C), int8, -127 to 127, and what `dequantize` makes of them, (R, C) float32.

    Raises:
        ValueError: An argument is out of its range; a value lies more than 254 steps from 0; a column holds nothing but
            zeros and was not dropped, since the trellis has no value 0.
        RacError: The C kernel is not there.
    """
    x = np.asarray(w, np.float32)
    by_row, by_col = _steps(x.shape, unit, states, rows, cols)
    if not np.isfinite(x).all():
        raise ValueError("the matrix must be finite")
    c = x.shape[1]
    order = np.arange(c) if recursion is None else np.asarray(recursion.order)
    feed = np.zeros((c, c), np.float32) if recursion is None else np.ascontiguousarray(recursion.feed, np.float32)
    if feed.shape != (c, c) or order.shape != (c,):
        raise ValueError(f"the recursion is not of {c} columns")
    if not x.size:
        return np.zeros(x.shape, np.int8), np.zeros(x.shape, np.float32)
    plain, step = np.ascontiguousarray((x / by_row[:, None]).T[order]), by_col[order]
    live = step > 0
    deviation = float(np.sqrt(np.mean((plain[live] / step[live, None]) ** 2))) if live.any() else 1.0
    k = np.arange(-MOST, MOST + 1)
    bits = (2 * k / max(deviation, 0.5)) ** 2 / (2 * math.log(2))  # of a Gaussian, but for a constant
    rate = (slope * bits).astype(np.float32).reshape(1, 1, -1)
    search = native.Search(states, trellis.CODES[states], len(x), magnitudes(states), rate, 2.0 * MOST)
    found, _, far, coded = native.block(search, plain, plain.copy(), feed, step)
    if far.any():
        raise ValueError(f"a value lies more than {2 * MOST} steps from 0: choose a larger unit")
    if (zeros := np.flatnonzero(live & (coded < 0))).size:
        raise ValueError(f"column {order[zeros[0]]} holds nothing but zeros: give it the factor 0 in cols")
    integers = np.empty(x.shape, np.int8)
    integers[:, order] = found.T
    return integers, dequantize(integers, unit, states, rows, cols)


def dequantize(
    integers: ArrayLike, unit: float, states: int = 256, rows: ArrayLike | None = None, cols: ArrayLike | None = None
) -> NDArray[np.float32]:
    """What the integers (R, C) of `quantize` stand for, (R, C) float32; the other arguments must be those given there.

    Raises:
        ValueError: An argument is out of its range.
    """
    k = np.asarray(integers)
    by_row, by_col = _steps(k.shape, unit, states, rows, cols)
    if k.dtype.kind not in "iu" or (k.size and (k.min() < -MOST or k.max() > MOST)):
        raise ValueError(f"integers must be -{MOST} to {MOST}")
    out = np.empty(k.shape, "<u4")
    none = np.zeros((0, 2), np.int64)
    lists = trellis.Lists(trellis.magnitudes(states, ZERO), by_row, by_col, none, np.zeros(0, "<u4"))
    words = np.ascontiguousarray((k.astype(np.int16) + ZERO).astype(np.uint8))
    if k.size:
        numbers = trellis.OpenTrellis(trellis.Trellis(states, ZERO, 0, 0, (0, 0, 0, 0)), "F32", lists)
        numbers.decode(words, Box(0, len(k), 0, k.shape[1]), out)
    return out.view(np.float32)


def _steps(
    shape: tuple[int, ...], unit: float, states: int, rows: ArrayLike | None, cols: ArrayLike | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factors of the rows, and steps of the columns."""
    if len(shape) != 2:
        raise ValueError(f"a matrix has two dimensions, not {len(shape)}")
    if not 0 < unit < math.inf:
        raise ValueError("unit must be a number above 0")
    if states not in trellis.CODES or states == 1:
        raise ValueError(f"states must be one of {', '.join(str(s) for s in trellis.CODES if s > 1)}, not {states}")
    by_row, by_col = (np.ones(n) if v is None else np.asarray(v) for n, v in zip(shape, (rows, cols), strict=True))
    if by_row.shape != shape[:1] or by_col.shape != shape[1:]:
        raise ValueError(f"rows and cols must have {shape[0]} and {shape[1]} numbers")
    if not (np.isfinite(by_row).all() and np.isfinite(by_col).all() and (by_row > 0).all() and (by_col >= 0).all()):
        raise ValueError("rows must be above 0, cols at least 0, both finite")
    return by_row.astype(np.float32), (unit * by_col).astype(np.float32)


def magnitudes(states: int) -> NDArray[np.float32]:
    """(2 MOST + 1,) those of the integers -MOST..MOST."""
    return trellis.magnitudes(states, ZERO)[ZERO - MOST : ZERO + MOST + 1].copy()
