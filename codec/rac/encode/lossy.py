"""One matrix to small integers and scales: trellis-coded, with the errors of finished columns fed back.

The recursion is successive interference cancellation through a Cholesky factor (Babai's nearest plane; WaterSIC,
arXiv 2603.04956), the quantiser the sign-symmetric trellis of stages/trellis.md under an entropy constraint (Fischer &
Wang, "Entropy-constrained trellis-coded quantization", 1992).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.align.triangular import Triangular
from rac.container import zstd
from rac.errors import RacError
from rac.native import trellis as native
from rac.quantize import trellis as tr

Array = NDArray[Any]
F32 = np.float32
MOST = 127
ZERO = 128
LAMBDA = 0.35
"""Squared units that a bit is worth; best at every rate (docs/experiments.md)."""
BLOCK = 64
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
    trellis: tr.Trellis
    unit: bytes
    dense: Array
    """(R, C) words of the data type: what a decoder restores."""
    digest: bytes


def model(q: int) -> NDArray[np.float64]:
    """(2 MOST + 1,) probability of the integers where the deviation is 2**(q / 4) units; weights have heavy tails."""
    from math import erf, sqrt

    edges = np.arange(-2 * MOST - 0.5, 2 * MOST + 2, 2.0)
    out = np.zeros(2 * MOST + 1)
    for share, wider in ((0.98, 1.0), (0.02, 3.0)):
        s = wider * 2 ** (q / 4) * sqrt(2)
        cdf = np.array([erf(e / s) for e in edges])
        out += share * np.diff(cdf) / 2
    out += 1e-7
    return np.asarray(out / out.sum())


_MODELS: dict[int, NDArray[np.float64]] = {}


def _model(q: int) -> NDArray[np.float64]:
    if q not in _MODELS:
        _MODELS[q] = model(q)
    return _MODELS[q]


def _quarters(x: Array) -> NDArray[np.int64]:
    out: NDArray[np.int64] = np.rint(4 * np.log2(np.maximum(x, 1e-30))).astype(np.int64)
    return out


def quantise(
    w: NDArray[np.float32], dtype: str, scale: float, scales: Scales, lane: int, states: int, passes: int,
    recursion: Triangular | None = None,
) -> Quantised:  # fmt: skip
    """Quantise `w` (R, C) float32 for the data type `dtype`.

    Args:
        w: The matrix, finite.
        dtype: "F32", "F16" or "BF16": what a decoder restores.
        scale: log2 of the unit.
        scales: Exponents of rows and columns, in quarter octaves.
        lane: Rows after which the trellis begins anew: those of a tile.
        states: Of the trellis, 4 to 256.
        passes: 1, or 2: again with the counts of the first pass.
        recursion: Order of the columns and weights of their errors in each other's targets; None: no feedback.

    Raises:
        RacError: The C kernel is not there.
    """
    r, c = w.shape
    bits = np.array(min(max(2.0**scale, 2.0**-60), 2.0**60), F32)
    row_unit = tr.power(scales.rows)
    step = bits * tr.power(scales.cols)
    step[scales.cols == tr.DEAD] = 0
    plain = np.ascontiguousarray((w / row_unit[:, None]).T)
    order = np.arange(c) if recursion is None else recursion.order
    feed = None if recursion is None else recursion.feed
    plain, step = np.ascontiguousarray(plain[order]), step[order]
    live = step > 0
    x = plain[live] / step[live][:, None]
    by_col = np.zeros(c)
    by_col[live] = np.sqrt((x * x).mean(1)) if x.size else 0
    by_row = (
        np.sqrt(((x / np.maximum(by_col[live], 1e-20)[:, None].astype(F32)) ** 2).mean(0)) if x.size else np.ones(r)
    )
    del x
    qc, qr = _quarters(by_col), np.clip(_quarters(by_row), -16, 16)
    qc = np.clip(qc, LOW, HIGH)
    cols, col = np.unique(qc, return_inverse=True)
    rows, row = np.unique(qr, return_inverse=True)
    of = np.clip(cols[:, None] + rows, LOW, HIGH)
    models = {q: _model(q) for q in set(of.ravel().tolist())}
    rec = tr.magnitudes(states, ZERO)[ZERO - MOST : ZERO + MOST + 1].copy()
    low, corrections = 0, np.zeros(0, np.int8)
    for turn in range(passes):
        rate = np.empty((*of.shape, 2 * MOST + 1), F32)
        for q, share in models.items():
            rate[of == q] = (-LAMBDA * np.log2(share)).astype(F32)
        k, value, wild = _columns(
            plain, step, lane, states, rec, rate, row.astype(np.uint8), col.astype(np.uint8), feed
        )
        if turn + 1 < passes:
            models = _counted(k, of, col, row, models)
            low, corrections = _centroids(k, value, plain, step, rec) if feed is None else (low, corrections)
            rec = tr.magnitudes(states, ZERO)[ZERO - MOST : ZERO + MOST + 1].copy()
            rec[low : low + len(corrections)] += corrections.astype(F32) / F32(64)
    back = np.argsort(order)
    value, wild = value[back], wild[back]
    words = np.ascontiguousarray((k[back].T + ZERO).astype(np.uint8))
    places = np.argwhere(wild.T)
    kind = np.dtype([("row", "<u4"), ("col", "<u4"), ("value", f"<u{tr.DTYPES[dtype].itemsize}")])
    outliers = np.zeros(len(places), kind)
    outliers["row"], outliers["col"] = places[:, 0], places[:, 1]
    exact = (value.T[wild.T != 0] * row_unit[places[:, 0]]).astype(F32)
    outliers["value"] = tr.to_words(exact, dtype)
    sections = (corrections.tobytes(), tr.pack_list(scales.rows), tr.pack_list(scales.cols), outliers.tobytes())
    sizes = tuple(len(s) for s in sections)
    p = tr.Trellis(states, ZERO, low + ZERO - MOST, int(bits.view(np.uint32)), sizes)  # type: ignore[arg-type]
    unit = b"".join(sections)
    tables = tr.parse_unit(unit, p, dtype, r, c)
    dense = np.empty((r, c), f"<u{tr.DTYPES[dtype].itemsize}")
    for a in range(0, r, lane):
        b = min(r, a + lane)
        tr.decode(words[a:b], p, tables, (a, b, 0, c), dense[a:b], dtype)
    return Quantised(words, p, unit, dense, zstd.digest(dense.reshape(-1).view(np.uint8).data))


def _columns(
    plain: NDArray[np.float32], step: NDArray[np.float32], lane: int, states: int, rec: NDArray[np.float32],
    rate: NDArray[np.float32], row: NDArray[np.uint8], col: NDArray[np.uint8], feed: NDArray[np.float32] | None,
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.uint8]]:  # fmt: skip
    """Integers, values and outliers (C, R), block by block from the last column to the first."""
    c, r = plain.shape
    k, value, wild = np.empty((c, r), np.int16), np.empty((c, r), F32), np.empty((c, r), np.uint8)
    error = plain.copy()
    for b in range(c, 0, -BLOCK):
        a = max(0, b - BLOCK)
        target = error[a:b]
        if feed is not None and b < c:
            target += feed[a:b, b:] @ error[b:]
        inner = np.zeros((b - a, b - a), F32) if feed is None else np.ascontiguousarray(feed[a:b, a:b])
        done = native.block(
            states, tr.CODES[states], target, lane, inner, step[a:b], rec, rate, row, col[a:b], 2.0 * MOST
        )
        if done is None:
            raise RacError("lossy packing needs the C kernel, which was not built; reinstall with a C compiler")
        k[a:b], value[a:b], wild[a:b] = done
    return k, value, wild


def _counted(
    k: NDArray[np.int16], of: Array, col: Array, row: Array, models: dict[int, NDArray[np.float64]]
) -> dict[int, NDArray[np.float64]]:
    """The models with what has been counted, each as a prior worth 256 symbols."""
    out = {}
    counts = {q: np.zeros(2 * MOST + 1) for q in models}
    for i in range(of.shape[0]):
        mine = k[col == i]
        for j in range(of.shape[1]):
            counts[int(of[i, j])] += np.bincount((mine[:, row == j] + MOST).ravel(), minlength=2 * MOST + 1)
    for q, p in models.items():
        total = counts[q] + 256 * p
        out[q] = total / total.sum()
    return out


def _centroids(
    k: NDArray[np.int16], value: NDArray[np.float32], plain: NDArray[np.float32], step: NDArray[np.float32],
    rec: NDArray[np.float32],
) -> tuple[int, NDArray[np.int8]]:  # fmt: skip
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
