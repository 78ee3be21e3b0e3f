"""Stages as plain functions, and the examples of docs/functions.md."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rac
from rac.errors import ChecksumError, FormatError

PAGE = (Path(__file__).parents[2] / "docs" / "functions.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_of_the_page(code):
    exec(compile(code, "docs/functions.md", "exec"), {})


def test_page_names_every_function():
    for stage in (rac.align, rac.split, rac.quantize, rac.entropy):
        for name in stage.__all__:
            assert f"{stage.__name__}.{name}(" in PAGE
            assert callable(getattr(stage, name)) and getattr(stage, name).__doc__
            assert any(f"{stage.__name__}.{name}(" in code for code in EXAMPLES)


def test_stages_load_when_they_are_named():
    code = """if True:
        import sys
        import rac
        assert not {"rac.align", "rac.split", "rac.quantize", "rac.entropy", "numpy"} & sys.modules.keys()
        assert rac.align.triangular([[2.0, 1.0], [1.0, 2.0]]).order.tolist() == [0, 1]
        rac.split, rac.quantize.dequantize, rac.entropy
        assert not {"constriction", "numba", "torch", "rac.encode", "rac.decode"} & sys.modules.keys()
        assert rac.entropy.decode(rac.entropy.encode([3, 4, 3]), (3,)).tolist() == [3, 4, 3]
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    for stage in (rac.quantize, rac.entropy):
        with pytest.raises(AttributeError, match="has no attribute 'melt'"):
            _ = stage.melt


# --- quantize --------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [4, 32, 256])
def test_values_are_those_of_the_integers(states):
    w, rows, cols = normal(0, 70, 45), np.linspace(0.5, 2, 70), np.geomspace(0.3, 3, 45)
    cols[7] = 0
    k, values = rac.quantize.quantize(w, 0.4, states, rows, cols)
    assert (k.shape, k.dtype, values.shape, values.dtype) == (w.shape, np.int8, w.shape, np.float32)
    assert rac.quantize.dequantize(k, 0.4, states, rows, cols).tobytes() == values.tobytes()
    assert not values[:, 7].any()
    error = np.abs(w - values) / (0.4 * rows[:, None] * np.where(cols, cols, np.inf))
    assert 0.2 < np.sqrt((error[:, cols > 0] ** 2).mean()) < 0.7  # steps; a uniform quantiser has 0.29
    magnitudes = np.abs(values) / (0.4 * rows[:, None] * np.where(cols, cols, 1))
    assert np.allclose(magnitudes[:, cols > 0], np.abs(2 * k + 0.5)[:, cols > 0], rtol=1e-5)


def test_more_states_and_no_slope_are_nearer():
    w = normal(1, 2000, 8)
    errors = [np.square(w - rac.quantize.quantize(w, 0.5, s, slope=0)[1]).mean() for s in (4, 256)]
    assert errors[1] < errors[0] < 0.5**2 / 12 * 4
    assert errors[1] < np.square(w - rac.quantize.quantize(w, 0.5, 256)[1]).mean()


def test_feedback_is_that_of_the_order():
    """Two equal inputs: what one column loses, the other makes up for."""
    w, second = normal(2, 500, 2), np.array([[1.0, 0.99], [0.99, 1.0]])
    r = rac.align.triangular(second, damp=0)
    alone, fed = (w - rac.quantize.quantize(w, 0.5, recursion=x)[1] for x in (None, r))
    assert np.square(fed.sum(1)).mean() < 0.6 * np.square(alone.sum(1)).mean()


def test_a_matrix_without_elements():
    for shape in ((0, 3), (3, 0), (0, 0)):
        k, values = rac.quantize.quantize(np.zeros(shape), 1.0)
        assert k.shape == values.shape == rac.quantize.dequantize(k, 1.0).shape == shape


def test_what_quantize_refuses():
    w = normal(3, 6, 4)
    wrong = {
        "unit": [(w, 0.0), (w, -1.0), (w, float("nan")), (w, float("inf"))],
        "states": [(w, 1.0, 1), (w, 1.0, 7)],
        "two dimensions": [(w[0], 1.0)],
        "finite": [(w * np.float32("inf"), 1.0)],
        "have 6 and 4": [(w, 1.0, 4, np.ones(4)), (w, 1.0, 4, None, np.ones(6))],
        "above 0": [(w, 1.0, 4, np.zeros(6)), (w, 1.0, 4, None, -np.ones(4)), (w, 1.0, 4, None, np.full(4, np.nan))],
        "not of 4 columns": [(w, 1.0, 4, None, None, rac.align.triangular(np.eye(5)))],
        "254 steps": [(w, 1e-3)],
        "column 2 .* zeros": [(w * [1, 1, 0, 1], 1.0)],
    }
    for words, calls in wrong.items():
        for args in calls:
            with pytest.raises(ValueError, match=words):
                rac.quantize.quantize(*args)
    for k in (np.full((2, 2), 128), np.full((2, 2), -128, np.int8), np.ones((2, 2))):
        with pytest.raises(ValueError, match="-127 to 127"):
            rac.quantize.dequantize(k, 1.0)


# --- entropy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "v",
    [
        np.zeros(0, np.int8),
        np.array(7),
        np.zeros((3, 0), np.int64),
        np.full(1000, -5),
        np.arange(256) - 128,
        np.arange(-32768, -32512),
        np.array([32767, 32766], np.uint16),
        np.random.default_rng(0).poisson(3, (50, 60, 7)),
        np.full(20, 255, np.uint8),
        np.array([0, 200], np.uint64),
    ],
)
def test_integers_come_back(v):
    data = rac.entropy.encode(v)
    back = rac.entropy.decode(data, v.shape)
    assert isinstance(data, bytes) and back.dtype == np.int16 and back.shape == v.shape
    assert (back == v).all()


def test_what_encode_refuses():
    for v in ([0.5], [0, 256], [-32769], [32768], [True]):
        with pytest.raises(ValueError, match=r"integers (are|from)"):
            rac.entropy.encode(np.array(v))


def test_damage_is_found():
    v = np.random.default_rng(1).poisson(2, 500)
    data = rac.entropy.encode(v)
    for n in range(len(data)):
        with pytest.raises((FormatError, ChecksumError)):
            rac.entropy.decode(data[:n], v.shape)
    with pytest.raises((FormatError, ChecksumError)):
        rac.entropy.decode(data + b"abcd", v.shape)
    for shape in ((499,), (501,), (5, 99)):
        with pytest.raises(FormatError, match="do not have the shape"):
            rac.entropy.decode(data, shape)
    for i in range(len(data)):
        bad = bytearray(data)
        bad[i] ^= 0x40
        with contextlib.suppress(FormatError, ChecksumError):  # a word may stand for other integers
            assert rac.entropy.decode(bytes(bad), v.shape).shape == v.shape
