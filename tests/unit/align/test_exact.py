"""Logarithms and powers of additions and products: near the true ones, and the same bits wherever they are computed."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from rac.encode.quantise.trellis import _samples
from rac.linalg import exact

GRID = np.ldexp(1 + np.arange(4096) / 4096, np.arange(4096) % 200 - 100)


def digest(x):
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def test_logarithms():
    assert np.allclose(exact.log2(GRID), [math.log2(x) for x in GRID], rtol=5e-16, atol=0)
    assert exact.log2([2.0**-300, 1, 8]).tolist() == [-300, 0, 3]
    assert exact.middle([2.0, 8.0, 32.0]) == 3


def test_powers():
    x = np.linspace(-70, 70, 4001)
    assert np.allclose(exact.exp2(x), [2.0**v for v in x], rtol=5e-16, atol=0)
    assert exact.exp2([-300, 0, 5]).tolist() == [2.0**-300, 1, 32]


def test_error_function():
    x = np.concatenate([np.linspace(-8, 8, 4001), [-1e3, 1e3]])
    assert np.abs(exact.erf(x) - [math.erf(v) for v in x]).max() < 1e-15


def test_quarter_octaves_are_exact():
    near = exact.exp2(np.arange(-801, 801, 2) / 8)  # halfway between two of them, but for rounding
    for x in np.concatenate([near, np.nextafter(near, 0), np.nextafter(near, np.inf), GRID]):
        q, eighth = int(exact.quarters(x)), Fraction(float(x)) ** 8
        assert Fraction(2) ** (2 * q - 1) < eighth < Fraction(2) ** (2 * q + 1)


@pytest.mark.parametrize(
    ("found", "known"),
    [
        (lambda: exact.log2(GRID), "35ff1bcf87b44ebf"),
        (lambda: exact.exp2(np.arange(-4096, 4096) / 128), "89587ff25d2dce69"),
        (lambda: exact.erf(np.arange(-1024, 1024) / 128), "9b7f84eb9cabea83"),
        (_samples, "11d4fc4393a420ea"),
    ],
    ids=["log2", "exp2", "erf", "the Gaussians of the coders, which are numpy's"],
)
def test_the_same_bits_on_every_machine(found, known):
    assert digest(found()) == known
