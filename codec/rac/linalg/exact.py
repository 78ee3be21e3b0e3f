"""Logarithms, powers and the error function from additions, products and divisions: the same bits on every machine.

What libm and the vector loops of numpy find may differ in the last bit from one CPU or version to the next, and a file
that hangs on it with it. These are not the nearest numbers either, but within a few units in the last place.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_LOG = [2 / (2 * k + 1) * 1.4426950408889634 for k in range(11)]
_EXP = list(itertools.accumulate(range(1, 14), lambda a, k: a * 0.6931471805599453 / k, initial=1.0))
_EIGHTHS = np.array([0.5452538663326288, 0.6484197773255049, 0.7711054127039705, 0.9170040432046713])
"""2**(-7/8), 2**(-5/8), 2**(-3/8), 2**(-1/8), each rounded up."""


def _horner(x: Floats, by: list[float]) -> Floats:
    out = np.full_like(x, by[-1])
    for b in by[-2::-1]:
        out *= x
        out += b
    return out


def log2(x: ArrayLike) -> Floats:
    """Logarithms of normal numbers above 0, float64; those of powers of two are exact."""
    m, e = np.frexp(np.asarray(x, np.float64))
    low = m < math.sqrt(0.5)
    m, e = np.where(low, 2 * m, m), e - low
    s = (m - 1) / (m + 1)
    return np.asarray(e + s * _horner(s * s, _LOG))


def exp2(x: ArrayLike) -> Floats:
    """2**x, float64; exact where x is whole."""
    x = np.asarray(x, np.float64)
    n = np.rint(x)
    return np.asarray(np.ldexp(_horner(x - n, _EXP), n.astype(np.int32)))


def quarters(x: ArrayLike) -> NDArray[np.int64]:
    """The whole numbers nearest to 4 log2 x of numbers x above 0: by comparison, so without any error."""
    m, e = np.frexp(np.asarray(x, np.float64))
    return 4 * e.astype(np.int64) - 4 + np.searchsorted(_EIGHTHS, m, "right")


def middle(x: ArrayLike) -> float:
    """log2 of the geometric mean of numbers above 0."""
    return float(log2(x).mean())


def erf(x: ArrayLike) -> Floats:
    """The error function, float64, to 1e-15: below 2 by its series, from there by a continued fraction."""
    x = np.asarray(x, np.float64)
    z = np.minimum(np.abs(x), 6.0)  # where it is 1
    two, root = 2 * z * z, math.sqrt(math.pi)
    bell = exp2(-1.4426950408889634 * (z * z))
    near, far = np.ones_like(z), np.zeros_like(z)
    for k in range(45, 0, -1):
        near = 1 + np.minimum(two, 8) / (2 * k + 1) * near
        far = k / np.maximum(two, 8) / (1 + far)
    out = np.where(z < 2, 2 * z * bell / root * near, 1 - bell / (np.maximum(z, 2) * root) / (1 + far))
    return np.asarray(np.copysign(out, x))
