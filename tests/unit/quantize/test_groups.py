"""Grids of groups: what they stand for, what is stored of them, what is refused."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest

from rac.errors import FormatError, UnsupportedError
from rac.grid import Box
from rac.stages import bits as bt
from rac.stages import groups as gr
from rac.stages.base import Context
from rac.stages.bits import Bits
from rac.stages.words import to_words
from support import grids, kernels

F32 = np.float32


def test_values_are_exact():
    g = grids.random(np.random.default_rng(1), 9, 23, 8, 5)
    exact = [
        [(int(g.codes[i, j]) - int(g.zeros[i, j // 5])) * float(g.scales[i, j // 5]) for j in range(23)]
        for i in range(9)
    ]
    assert gr.values(g).dtype == F32
    assert (gr.values(g).astype(np.float64) == np.array(exact)).all()


def test_rounding_to_nearest_is_near():
    w = grids.normal(2, 40, 100)
    for bits in range(1, 9):
        for group in (1, 7, 64, 100):
            for symmetric in (False, True):
                g = grids.nearest(w, bits, group, symmetric)
                # half a step, half a step where the rounded zero cuts an end off, and the rounding of the scale
                assert (np.abs(gr.values(g) - w) <= 1.2 * gr.spread(g.scales, group, 100)).all()


def test_storable():
    given = np.array([0, 1e-9, 2.0**-14, 1 / 3, 1, 1e5], F32)
    found = gr.storable(given)
    assert found.dtype == F32
    assert found.tolist() == [2.0**-14, 2.0**-14, 2.0**-14, float(np.float16(1 / 3)), 1, 65504]
    assert (gr.storable(found) == found).all()
    for wrong in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="finite and at least 0"):
            gr.storable([1, wrong])


@pytest.mark.parametrize("exponent", [-60, -3, 0, 1, 60])
def test_unit(exponent):
    g = grids.random(np.random.default_rng(3), 30, 50, 4, 16)
    g = replace(g, scales=g.scales * F32(2.0**exponent))
    p, unit = gr.build_unit(g)
    t = p.open(unit, Context("F32", 30, 50, 1))
    assert (t.scales == g.scales).all() and (t.zeros == g.zeros).all()
    assert gr.Groups.from_head(p.to_head(), Context("BF16", 30, 50, 1)) == p
    one = replace(g, zeros=np.full_like(g.zeros, 8))
    p, unit = gr.build_unit(one)
    assert (p.zero, p.sizes[2]) == (8, 0)
    assert p.open(unit, Context("F32", 30, 50, 1)).zeros.tolist() == [[8]]


def test_scales_compress():
    w = grids.normal(4, 256, 1024)
    p, unit = gr.build_unit(grids.nearest(w, 4, 64))
    n = 256 * 16
    assert p.exponent == 0 and len(unit) < 0.87 * 3 * n
    p, unit = gr.build_unit(replace(grids.nearest(w, 4, 64), scales=np.full((256, 16), 0.25, F32)))
    assert p.sizes[0] < 40 and p.sizes[1] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 3},
        {"group": 0},
        {"group": 51},
        {"group": 12},
        {"scales": np.ones((30, 3), F32)},
        {"zeros": np.zeros((30, 5), np.uint8)},
        {"zeros": np.zeros((30, 4), int)},
        {"codes": np.zeros((30, 50), int)},
        *({"scales": np.full((30, 4), v, F32)} for v in (0, -1, np.nan, np.inf, 1.0001, 2.0**-80, 2.0**80)),
    ],
)
def test_what_cannot_be_stored(wrong):
    g = replace(grids.random(np.random.default_rng(3), 30, 50, 4, 16), **wrong)
    with pytest.raises(ValueError, match=r"codes|scale"):
        gr.build_unit(g)


def test_scales_too_far_apart():
    g = grids.random(np.random.default_rng(3), 2, 50, 4, 50)
    with pytest.raises(ValueError, match="storable"):
        gr.build_unit(replace(g, scales=np.array([[2.0**-20], [2.0**15]], F32)))
    p, _ = gr.build_unit(replace(g, scales=np.array([[2.0**-20], [2.0**5]], F32)))
    assert p.exponent == -10


def test_a_code_that_is_too_large():
    g = grids.random(np.random.default_rng(3), 2, 50, 4, 50)
    p, unit = gr.build_unit(g)
    out = np.empty((2, 50), "<u4")
    with pytest.raises(FormatError, match="larger"):
        p.open(unit, Context("F32", 2, 50, 1)).decode(g.codes | np.uint8(16), Box(0, 2, 0, 50), out)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("cpu", kernels.ALL)
def test_tiles(dtype, cpu):
    rng = np.random.default_rng(6)
    for bits in range(1, 9):
        for group, one in ((1, True), (3, False), (16, True), (17, False), (50, True)):
            g = grids.random(rng, 30, 50, bits, group, one)
            p, unit = gr.build_unit(g)
            t, whole = p.open(unit, Context(dtype, 30, 50, 1)), to_words(gr.values(g), dtype)
            found = np.zeros_like(whole)
            for box in ((0, 7, 0, 33), (7, 30, 0, 33), (0, 7, 33, 50), (7, 30, 33, 50)):
                a, b, c, d = box
                codes = np.ascontiguousarray(g.codes[a:b, c:d])
                with kernels.using(cpu):
                    t.decode(codes, Box(*box), found[a:b, c:d])
            assert (found == whole).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes(bits):
    rng = np.random.default_rng(bits)
    for n in (1, 7, 8, 9, 31, 64, 1000):
        words = rng.integers(0, 1 << bits, n).astype(np.uint8)
        unit = np.frombuffer(bt.pack(words, bits), np.uint8)
        assert len(unit) == bt.planes(n, bits)[1]
        assert (bt.unpack(unit, n, bits) == words).all()
        for i in range(8 * len(unit)):
            changed = unit.copy()
            changed[i // 8] ^= 1 << i % 8
            with contextlib.suppress(FormatError):
                assert (bt.unpack(changed, n, bits) != words).any()
        for wrong in (unit[:-1], np.append(unit, np.uint8(0)), unit[:0]):
            with pytest.raises(FormatError):
                bt.unpack(wrong, n, bits)


def test_parameters():
    assert Bits.from_head({"id": "bits/1", "bits": 3}, Context("U8", 1, 1, 1)) == Bits(3)
    for head, word, error in (
        ({"id": "bits/1"}, 1, FormatError),
        ({"id": "bits/1", "bits": 9}, 1, FormatError),
        ({"id": "bits/1", "bits": 3}, 2, FormatError),
        ({"id": "bits/1", "bits": 3, "a": 1}, 1, UnsupportedError),
    ):
        with pytest.raises(error):
            Bits.from_head(head, Context("U8", 1, 1, word))
    good = {"id": "groups/1", "bits": 4, "group": 5, "zero": 8, "exponent": 0, "sizes": [9, 9, 0]}
    assert gr.Groups.from_head(good, Context("F16", 1, 5, 1)).to_head() == good
    for wrong, cols, error in (
        ({}, 4, FormatError),
        ({"zero": 1, "sizes": [9, 9, 9]}, 5, FormatError),
        ({"x-a": 1}, 5, UnsupportedError),
        ({"exponent": 61}, 5, FormatError),
    ):
        with pytest.raises(error):
            gr.Groups.from_head(good | wrong, Context("F16", 1, cols, 1))
