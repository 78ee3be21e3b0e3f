"""Low rank and bases: parts of the whole, and what the arithmetic promises."""

from __future__ import annotations

import numpy as np
import pytest

from rac.grid import Box
from rac.stages.products import Basis, LowRank
from rac.stages.words import to_words
from support import kernels


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("cpu", kernels.ALL)
def test_the_examples_of_the_text(cpu):
    """stages/lowrank.md and stages/basis.md, section 6."""
    a, b = np.array([[2**-24, 2**-24], [0.5, -3]], np.float32), np.array([[1, 0.25], [1, 1.5]], np.float32)
    whole = Box(0, 2, 0, 2)
    with kernels.using(cpu):
        out = LowRank().join(np.array([[1, 0], [-1, 2]], np.float32), [a, b], whole)
    assert out.tolist() == [[1, 7 * 2**-26], [-3.5, -2.375]]
    u = np.array([[0.75, 0.5], [0.5, 2**-11]], np.float32)
    with kernels.using(cpu):
        out = Basis().join(np.array([[1, -2], [3, 0]], np.float32), [u], whole)
    assert to_words(out, "BF16").tolist() == [[0xBE80, 0x3F00], [0x4010, 0x3FC0]]


def test_parts_are_those_of_the_whole():
    v, a, b, u = numbers(1, 40, 150), numbers(2, 40, 9), numbers(3, 9, 150), numbers(4, 150, 150)
    whole = Box(0, 40, 0, 150)
    low, turned = LowRank().join(v.copy(), [a, b], whole), Basis().join(v, [u], whole)
    for r0, r1, c0, c1 in ((0, 40, 0, 150), (3, 4, 70, 71), (11, 40, 63, 130), (0, 5, 0, 64)):
        box = Box(r0, r1, c0, c1)
        assert (LowRank().join(v[r0:r1, c0:c1].copy(), [a, b], box) == low[r0:r1, c0:c1]).all()
        assert (Basis().join(v[r0:r1], [u], box) == turned[r0:r1, c0:c1]).all()


def test_v_is_left_alone_by_a_basis():
    v, u = numbers(5, 3, 4), numbers(6, 4, 4)
    kept = v.copy()
    Basis().join(v, [u], Box(0, 3, 0, 4))
    assert (v == kept).all()


def test_close_to_exact():
    v, u = numbers(7, 30, 200), numbers(8, 200, 200)
    assert np.allclose(Basis().join(v, [u], Box(0, 30, 0, 200)), v.astype(np.float64) @ u, atol=1e-3)
