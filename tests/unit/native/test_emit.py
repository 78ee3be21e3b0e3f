"""Words of every form out of their symbols and planes, sorted by class or not, under every instruction set."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import rac
from rac.encode.pack import pack_source
from rac.encode.sources import from_arrays
from support import kernels

BF16 = ml_dtypes.bfloat16


def masked(a, bits):
    """The array with its lowest `bits` bits cleared."""
    words = a.view(f"u{a.itemsize}")
    return (words >> words.dtype.type(bits) << words.dtype.type(bits)).view(a.dtype)


def gap(a):
    """The array without the exponents in the middle of those that it has."""
    return np.where(np.abs(a) < 1, a * 2.0**-40, a)


FORMS = {
    "bf16": lambda a: a.astype(BF16),
    "bf16-short": lambda a: masked(a.astype(BF16), 3),
    "bf16-positive": lambda a: np.abs(a).astype(BF16),
    "bf16-runs": lambda a: gap(a).astype(BF16),
    "f16": lambda a: a.astype("f2"),
    "f16-short": lambda a: masked(a.astype("f2"), 5),
    "f32": lambda a: a.astype("f4"),
    "f32-positive": lambda a: np.abs(a).astype("f4"),
    "f32-of-bf16": lambda a: a.astype(BF16).astype("f4"),
    "f32-of-f16": lambda a: a.astype("f2").astype("f4"),
    "f32-runs": lambda a: gap(a).astype("f4"),
    "f8": lambda a: a.astype(ml_dtypes.float8_e4m3fn),
    "f64": lambda a: a.astype("f8"),
}
SHAPES = {"plain": (61, 331, 0), "rows": (203, 72, 1), "classes": (130, 148, 4), "many": (96, 157, 24)}
"""Rows, columns, and how far the scales of the columns lie apart, in powers of two."""


@pytest.mark.parametrize("level", ["default", "max"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_words(form, shape, level, tmp_path):
    rows, cols, spread = SHAPES[shape]
    rng = np.random.default_rng(rows)
    a = rng.standard_normal((rows, cols)).clip(-3, 3)
    if spread:
        a *= np.exp2(rng.integers(-3, 3, (rows, 1))) * np.exp2(rng.integers(-spread, spread, cols) / 2)
    a.flat[:: 977 if form != "f8" else 31] *= 2.0**-20  # escapes
    dense = FORMS[form](a)
    pack_source(from_arrays({"a": dense}), tmp_path / "a.rac", level=level)
    for cpu in kernels.here():
        with kernels.using(cpu):
            assert rac.load_file(tmp_path / "a.rac", threads=1)["a"].tobytes() == dense.tobytes(), cpu
