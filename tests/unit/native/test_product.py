"""The product kernel against numpy: bit for bit, whatever the numbers and the settings of the processor."""

from __future__ import annotations

import numpy as np
import pytest

from rac import native
from rac.native import product
from rac.stages.words import DTYPES, put_words
from support import kernels


def any_bits(seed, *shape):
    """Random bits: NaN, infinities, subnormals, all exponents."""
    return np.frombuffer(np.random.default_rng(seed).bytes(4 * int(np.prod(shape))), np.float32).reshape(shape)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def both(t, a, b):
    out = t.copy(), t.copy()
    product.add(out[0], a, b)
    with native.using(None):
        product.add(out[1], a, b)
    return out


def same(x, y):
    nan = np.isnan(x)
    return (nan == np.isnan(y)).all() and (x.view(np.uint32)[~nan] == y.view(np.uint32)[~nan]).all()


SIZES = [(1, 1, 1), (3, 63, 5), (4, 64, 256), (5, 65, 257), (17, 130, 700), (2, 200, 1), (70, 3, 40)]


@pytest.mark.parametrize(("h", "w", "n"), SIZES)
@pytest.mark.parametrize("make", [numbers, any_bits])
@pytest.mark.parametrize("cpu", kernels.CPUS)
def test_kernel_and_numpy_agree(make, h, w, n, cpu):
    with kernels.using(cpu):
        assert same(*both(make(1, h, w), make(2, h, n), make(3, n, w)))


def test_views():
    """Rows that lie further apart than they are long."""
    t, a, b = numbers(4, 20, 300), numbers(5, 20, 90), numbers(6, 90, 300)
    whole, _ = both(t, a, b)
    out = t.copy()
    product.add(out[3:9, 40:170], a[3:9], b[:, 40:170])
    assert (out[3:9, 40:170] == whole[3:9, 40:170]).all()
    out[3:9, 40:170] = t[3:9, 40:170]
    assert (out == t).all()


def test_the_order_and_no_fusing():
    t = np.array([[-1]], np.float32)
    product.add(t, np.array([[1 + 3 * 2**-23]], np.float32), np.array([[1 + 3 * 2**-23]], np.float32))
    assert t.tolist() == [[6 * 2**-23]]  # fused: 6 * 2**-23 + 2**-43
    t = np.array([[1]], np.float32)
    product.add(t, np.full((1, 1000), 2**-24, np.float32), np.ones((1000, 1), np.float32))
    assert t.tolist() == [[1]]


def test_subnormal_numbers_whatever_the_thread_does_with_them():
    torch = pytest.importorskip("torch")
    v, a, b = np.zeros((1, 3), np.float32), np.full((1, 1), 2.0**-75, np.float32), np.full((1, 3), 2.0**-70, np.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("no such setting here")
    try:
        product.add(v, a, b)
    finally:
        torch.set_flush_denormal(False)
    assert v.tolist() == [[2.0**-145] * 3]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_words(dtype):
    """Kernel and numpy; every NaN is the one of the text, and all else is what ml_dtypes and numpy round to."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    v = np.concatenate([any_bits(7, 1, 5000), numbers(8, 1, 5000)], 1)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)[None]
    for x in (v, ties):
        fast, slow = (np.empty(x.shape, f"<u{DTYPES[dtype].itemsize}") for _ in range(2))
        put_words(x, dtype, fast)
        with native.using(None):
            put_words(x, dtype, slow)
        assert (fast == slow).all()
        nan = np.isnan(x)
        assert (fast[nan] == {"F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}[dtype]).all()
        with np.errstate(all="ignore"):
            kind = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
            assert (fast[~nan] == x[~nan].astype(kind).view(fast.dtype)).all()
