"""What is measured of a matrix (R, C) of finite floats, whatever its scale: distribution, spectrum, energy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
GAUSSIAN = 0.5 * math.log2(2 * math.pi * math.e)  # differential entropy in bits of a Gaussian of deviation 1
CURVE = 32  # points of an energy curve behind its first, 0
EDGES = np.linspace(-8, 8, 65)  # edges of the bins of `histogram`, in units of the root mean square
FIGURES = (
    ("bits", "bits", "bits", ".3f"),
    ("kurtosis", "kurtosis", "kurtosis", ".2f"),
    ("kurtosis_rows", "of rows", "of rows", ".2f"),
    ("outlier", "max / rms", "max/rms", ".1f"),
    ("effective_rank", "effective rank", "eff. rank", ".0f"),
    ("stable_rank", "stable rank", "stable", ".1f"),
    ("top10", "energy, top 10 %", "top 10%", ".1%"),
    ("gini", "Gini", "Gini", ".3f"),
    ("output_top10", "output energy, top 10 %", "", ".1%"),
    ("output_gini", "output Gini", "", ".3f"),
    ("entropy", "entropy", "entropy", ".3f"),
    ("entropy_columns", "of columns", "", ".3f"),
    ("estimate", "bits estimated", "", ".3f"),
)
"""Columns of tables: key, head on a page, head on a terminal ("": not there), format."""
TIE = 2.0**-12  # least spacing that counts, in units of the root mean square: weights of 16 bits have ties


def rms(x: Array) -> float:
    """Root mean square; 0 where there is nothing."""
    return math.sqrt(float(np.square(x, dtype=np.float64).mean())) if x.size else 0.0


def kurtosis(x: Array) -> float:
    """E[(x - mean)^4] / variance^2, 3 for a Gaussian; NaN of a constant."""
    y = x.astype(np.float64).ravel()
    y -= y.mean()
    y *= y
    square = float(y.mean())
    return float(np.square(y, out=y).mean()) / square**2 if square else math.nan


def row_kurtosis(w: Array) -> float:
    """Mean over the rows of their kurtosis; rows that are constant do not count."""
    y = w - w.mean(1, keepdims=True, dtype=np.float64).astype(w.dtype)
    y *= y
    square, fourth = y.mean(1, dtype=np.float64), np.square(y).mean(1, dtype=np.float64)
    live = square > 0
    return float((fourth[live] / square[live] ** 2).mean()) if live.any() else math.nan


def outlier_ratio(x: Array) -> float:
    """Largest magnitude / root mean square."""
    size = rms(x)
    return float(np.abs(x).max()) / size if size else math.nan


def singular_values(w: Array) -> NDArray[np.float64]:
    """(min(R, C),) descending, from the smaller Gram matrix: those below 1e-8 of the first are noise."""
    a = w.astype(np.float64)
    gram = a @ a.T if len(a) <= a.shape[1] else a.T @ a
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)))


def effective_rank(values: Array) -> float:
    """E to the entropy of singular values that sum to 1 (Roy & Vetterli, "The effective rank", EUSIPCO 2007)."""
    total = float(values.sum())
    p = values[values > 0] / total if total else values[:0]
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def stable_rank(values: Array) -> float:
    """Sum of squared singular values / square of the largest."""
    most = float(values.max(initial=0))
    return float(np.square(values / most).sum()) if most else 0.0


def energies(w: Array) -> NDArray[np.float64]:
    """(C,) of the columns: sums of squares."""
    return np.asarray(np.einsum("ij,ij->j", w, w, dtype=np.float64))


def curve(energy: Array) -> NDArray[np.float64]:
    """(CURVE + 1,) share of the energy in the 0, 1/CURVE, ... 1 of the entries that have most; linear in between."""
    whole = np.concatenate([[0.0], np.cumsum(np.sort(energy)[::-1])])
    at = np.linspace(0, len(energy), CURVE + 1)
    return np.asarray(np.interp(at, np.arange(len(whole)), whole) / max(float(whole[-1]), 1e-300))


def top_share(energy: Array, share: float) -> float:
    """Share of the energy in the `share` of the entries that have most, at least one entry."""
    k = max(1, round(share * len(energy)))
    total = float(energy.sum())
    return float(np.sort(energy)[-k:].sum()) / total if total else math.nan


def gini(energy: Array) -> float:
    """Gini coefficient: 0 where all are equal, 1 - 1/n where one has all."""
    x = np.sort(energy)
    n, total = len(x), float(x.sum())
    return float((2 * np.arange(1, n + 1) - n - 1) @ x) / (n * total) if total else math.nan


def _digamma(n: int) -> float:
    """Digamma function of a whole number above 0."""
    if n < 64:
        return -float(np.euler_gamma) + sum(1 / k for k in range(1, n))
    return math.log(n) - 1 / (2 * n) - 1 / (12 * n * n) + 1 / (120 * n**4)


def entropy(x: Array) -> NDArray[np.float64]:
    """Differential entropy in bits of samples along the last axis (..., n), in units of the root mean square of all.

    Vasicek's estimate by spacings of m = sqrt(n) samples, with the correction of its bias ("A test for normality based
    on sample entropy", JRSS B 38, 1976). Of a Gaussian all of whose samples are in one row: `GAUSSIAN`, 2.047 bits.
    Spacings below TIE count as TIE, so that ties do not make it minus infinity. NaN where all is 0.
    """
    n, size = x.shape[-1], rms(x)
    if not size or n < 4:
        return np.full(x.shape[:-1], math.nan)
    m = max(1, round(math.sqrt(n)))
    y = np.sort(x, axis=-1)
    padded = np.concatenate([np.repeat(y[..., :1], m, -1), y, np.repeat(y[..., -1:], m, -1)], -1)
    gaps = np.maximum((padded[..., 2 * m :] - padded[..., : -2 * m]) / size, TIE)
    bias = math.log(2 * m) - math.log(n) - (1 - 2 * m / n) * _digamma(2 * m) + _digamma(n + 1)
    bias -= 2 / n * sum(_digamma(i + m - 1) for i in range(1, m + 1) if i + m > 1)
    nats = np.log(gaps, dtype=np.float64).mean(-1) + math.log(n / (2 * m)) + bias
    return np.asarray(nats / math.log(2))


def histogram(x: Array) -> NDArray[np.int64]:
    """(len(EDGES) - 1,) numbers of elements in units of the root mean square; what is beyond counts at the ends."""
    steps = (len(EDGES) - 1) / float(EDGES[-1] - EDGES[0])
    at = np.clip((x.ravel() / max(rms(x), 1e-30) - EDGES[0]) * steps, 0, len(EDGES) - 2).astype(np.uint8)
    return np.bincount(at, minlength=len(EDGES) - 1)
