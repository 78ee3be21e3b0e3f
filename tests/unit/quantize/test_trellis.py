"""trellis/1: the example of the text, the kernel against numpy, and the search against all there is to choose from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rac import native
from rac.errors import FormatError, UnsupportedError
from rac.grid import Box
from rac.native import trellis as kernel
from rac.stages import trellis as tr
from rac.stages.base import Context
from rac.stages.words import DTYPES, from_words, to_words
from support import kernels

HEAD = {"id": "trellis/1", "states": 4, "zero": 10, "low": 9, "scale": 0x3F000000, "sizes": [3, 4, 2, 10]}
BF16 = Context("BF16", 4, 2, 1)
UNIT = bytes.fromhex("0008f8 00000400 0080 03000000 00000000 803f")
WORDS = np.array([[10, 10], [11, 10], [9, 10], [10, 10]], np.uint8)
DENSE = bytes.fromhex("a03e0000 983f0000 c03f0000 803f0000")
"""Worked example of format_spec/stages/trellis.md, section 8."""


def decoded(words, p, unit, dtype, cpu):
    dst = np.zeros(words.shape, f"<u{DTYPES[dtype].itemsize}")
    numbers = p.open(unit, Context(dtype, *words.shape, 1))
    with kernels.using(cpu):
        numbers.decode(words, Box(0, words.shape[0], 0, words.shape[1]), dst)
    return dst


@pytest.mark.parametrize("cpu", kernels.ALL)
def test_the_example_of_the_text(cpu):
    p = tr.Trellis.from_head(HEAD, BF16)
    assert p.to_head() == HEAD
    assert decoded(WORDS, p, UNIT, "BF16", cpu).tobytes() == DENSE


@pytest.mark.parametrize("cpu", kernels.ALL)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_gains_multiply_rows_and_outliers(cpu, dtype):
    rng = np.random.default_rng(0)
    words, gains = rng.integers(120, 137, (200, 20)).astype(np.uint8), rng.integers(-128, 128, 200).astype(np.int8)
    rows, cols = (rng.integers(-9, 9, n).astype(np.int8) for n in words.shape)
    places, value = np.array([[3, 5], [150, 0]]), np.array([100, -7.5], np.float32)
    args = np.zeros(0, np.int8), rows, cols, places
    sizes, unit = tr.build_unit(*args, to_words(value, dtype))
    plain = tr.Trellis(16, 128, 0, 0x3F000000, sizes)
    assert "gains" not in plain.to_head()
    p, more = tr.with_gains(plain, unit, gains, dtype)
    assert tr.Trellis.from_head(p.to_head(), Context(dtype, 200, 20, 1)) == p
    opened, before = (q.open(u, Context(dtype, 200, 20, 1)) for q, u in ((p, more), (plain, unit)))
    assert np.array_equal(opened.rows, before.rows * (np.float32(1) + gains.astype(np.float32) / 256))
    got = from_words(decoded(words, p, more, dtype, cpu), dtype)
    own = from_words(decoded(words, plain, unit, dtype, cpu), dtype)
    near = own * (1 + gains[:, None] / np.float32(256))
    exact = {"F32": 2**-22, "F16": 2**-9, "BF16": 2**-6}[dtype]  # it is rounded once, and not in between
    assert (np.abs(got - near) <= exact * np.abs(near)).all()
    assert got[3, 5] == from_words(to_words(np.float32([100 * (1 + gains[3] / 256)]), dtype), dtype)[0]
    assert tr.with_gains(plain, unit, np.zeros(200, np.int8), dtype) == (plain, unit)


def test_powers():
    e = np.arange(-60, 61).astype(np.int8)
    assert np.allclose(tr.power(e), 2.0 ** (np.arange(-60, 61) / 4), rtol=1e-7)
    assert tr.power(np.array([-4, -8, 0, 4, 60], np.int8)).tolist() == [0.5, 0.25, 1.0, 2.0, 2.0**15]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("states", [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("corrected", [0, 1, 100])
@pytest.mark.parametrize(("zero", "scale"), [(128, 0x3C23D70A), (0, 0x21800000), (255, 0x5D800000), (101, 0x3F7FFFFF)])
def test_kernel_and_numpy_agree(states, dtype, corrected, zero, scale):
    rng = np.random.default_rng(states)
    r, c = 53, 101
    most = 20 if zero == 128 else tr.MOST
    lists = [rng.integers(-most, most + 1, n).astype(np.int8) for n in (r, c)]
    lists[1][3] = tr.DEAD
    corrections = rng.integers(-48, 49, corrected).astype(np.int8)
    unit = corrections.tobytes() + lists[0].tobytes() + lists[1].tobytes()
    p = tr.Trellis(states, zero, 78, scale, (corrected, r, c, 0))
    for span in (256, 60, 31):  # of words, the few of them in registers
        words = rng.integers(0, span, (r, c)).astype(np.uint8)
        expected = decoded(words, p, unit, dtype, None)
        for cpu in kernels.here():
            assert (decoded(words, p, unit, dtype, cpu) == expected).all()


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 33, 63, 64, 65, 129])
def test_kernels_stay_within_columns_of_any_number(width, dtype):
    rng = np.random.default_rng(width)
    word = DTYPES[dtype].itemsize
    words = rng.integers(120, 136, (21, width)).astype(np.uint8)
    rows, cols = (tr.power(rng.integers(-9, 9, n).astype(np.int8)) for n in words.shape)
    rec = tr.magnitudes(256, 128)
    found = []
    for cpu in kernels.here():
        with kernels.using(cpu):
            numbers = kernel.dequant(rec, tr.CODES[256], 128, dtype)
            assert numbers is not None
            wide = np.full((21, width + 5), 7, f"<u{word}")
            kernel.decode(words, numbers, cols, rows, wide[:, 2:-3])
            found.append(wide)
    assert (found[0][:, :2] == 7).all() and (found[0][:, -3:] == 7).all()
    assert all((a == found[0]).all() for a in found)
    p = tr.Trellis(256, 128, 0, 0x3F800000, (0, 21, width, 0))
    expected = np.empty((21, width), f"<u{word}")
    tr.OpenTrellis(p, dtype, tr.Lists(rec, rows, cols, np.zeros((0, 2), np.int64), expected[:0]))._decode(
        words, cols, rows, expected
    )
    assert (found[0][:, 2:-3] == expected).all()


def search(states, x, rec, rate, lane=1000):
    most = len(rec) // 2
    how = kernel.Search(states, tr.CODES[states], lane, rec, rate.reshape(1, 1, -1), 2.0 * most)
    feed, step = np.zeros((1, 1), np.float32), np.ones(1, np.float32)
    done = kernel.block(how, x[None], x[None].copy(), feed, step)
    for cpu in kernels.here():
        with kernels.using(cpu):
            again = kernel.block(how, x[None], x[None].copy(), feed, step)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(done, again, strict=True))
    return done[0][0], done[1][0]


def walk(states, k, rec):
    """Values of integers along the trellis."""
    h0, h1 = tr.CODES[states]
    s, out = 0, []
    for v in k:
        out.append(-rec[v + len(rec) // 2] if s & 1 else rec[v + len(rec) // 2])
        s = (s >> 1) ^ (h0 if s & 1 else 0) ^ (h1 if v & 1 else 0)
    return np.array(out, np.float32)


def test_blocks_of_rows_have_feeds_of_their_own():
    rng = np.random.default_rng(5)
    n, own, groups = 6, 40, 3
    x = (5 * rng.standard_normal((n, groups * own))).astype(np.float32)
    feed = np.triu(rng.standard_normal((groups, n, n)) / 4, 1).astype(np.float32)
    rec = np.arange(-9, 10, dtype=np.float32) * 2 + 0.5
    rate = np.abs(rec / 4).astype(np.float32).reshape(1, 1, -1)

    def block(x, feed):
        how = kernel.Search(8, tr.CODES[8], own, rec, rate, 18.0)
        return kernel.block(how, x, x.copy(), feed, np.ones(n, np.float32))

    together = block(x, feed)
    for g in range(groups):
        mine = slice(g * own, (g + 1) * own)
        alone = block(np.ascontiguousarray(x[:, mine]), feed[g])
        for a, b in zip(together[:3], alone[:3], strict=True):
            assert (a[:, mine] == b).all()


@pytest.mark.parametrize("states", [4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_search_finds_the_best_path(states):
    """Against all paths of five samples; the integers at hand are the two nearest of each subset."""
    most = 4
    rec = (2 * np.arange(-most, most + 1) + 0.5).astype(np.float32)
    rng = np.random.default_rng(states)
    for _ in range(3):
        x = (2.5 * rng.standard_normal(5)).astype(np.float32)
        rate = (0.35 * rng.random(2 * most + 1)).astype(np.float32)
        k, value = search(states, x, rec, rate)
        assert (walk(states, k, rec) == value).all()
        cost = float(((x - value) ** 2 + rate[k + most]).sum())
        best = min(
            float(((x - walk(states, path, rec)) ** 2 + rate[np.array(path) + most]).sum())
            for path in itertools.product(range(-most, most + 1), repeat=5)
        )
        assert cost == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("states", [4, 16, 32, 256, 512, 1024])
def test_lanes_begin_anew(states):
    rec = (2 * np.arange(-9, 10) + 0.5).astype(np.float32)
    x = np.random.default_rng(1).standard_normal(90).astype(np.float32) * 4
    rate = np.zeros(19, np.float32)
    k, _ = search(states, x, rec, rate, lane=40)
    parts = [search(states, x[a : a + 40], rec, rate)[0] for a in (0, 40, 80)]
    assert k.tolist() == np.concatenate(parts).tolist()


def test_what_is_refused():
    def bad(match, error=FormatError, dtype="BF16", **change):
        with pytest.raises(error, match=match):
            tr.Trellis.from_head(HEAD | change, Context(dtype, 4, 2, 1))

    for key in ("states", "zero", "low", "scale", "sizes"):
        with pytest.raises(FormatError, match="incomplete"):
            tr.Trellis.from_head({k: v for k, v in HEAD.items() if k != key}, BF16)
    bad("unknown", UnsupportedError, more=1)
    for states in (0, 2, 3, 768, 2048, True, "4"):
        bad("states", states=states)
    bad("zero is out", zero=256)
    bad("low is out", low=-1)
    for scale in (0x21800000 - 1, 0x5D800000 + 1, 0x7FC00000, -1):
        bad("scale", scale=scale)
    bad("sizes", sizes=[3, 4, 2])
    bad("cannot be", dtype="F64")
    bad("corrections", low=254)
    for gains in (0, -1, True, "4", (1 << 40) + 1):
        bad("gains is out", gains=gains)

    def unit(match, data, rows=4, cols=2):
        with pytest.raises(FormatError, match=match):
            tr.Trellis.from_head(HEAD, BF16).open(data, Context("BF16", rows, cols, 1))

    unit("size of its sections", UNIT[:-1])
    unit("size of its sections", UNIT + b"\0")
    unit("out of range", UNIT[:5] + b"\x3d" + UNIT[6:])
    unit("out of range", UNIT[:7] + b"\x81" + UNIT[8:])
    unit("outside", UNIT[:9] + b"\4" + UNIT[10:])
    unit("outside", UNIT[:13] + b"\2" + UNIT[14:])
    unit("zstd", UNIT, rows=5)


def test_the_kernel_is_there():
    assert native.available()
