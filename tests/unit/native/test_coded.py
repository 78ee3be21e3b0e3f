"""Products with codes and words: the bits of numpy under every set of kernels, alone and shared, and no byte beyond."""

from __future__ import annotations

import copy
import gc
import os
import threading

import numpy as np
import pytest

from rac import native
from rac.native.coded import GREATEST, SMALLEST, Kind, Team, Weight, multiply
from rac.stages.words import from_words, to_words
from support import kernels
from support.fence import fenced

SIZES = [(1, 1, 1), (4, 16, 1), (5, 17, 1), (130, 259, 2), (7, 272, 3), (66, 33, 40), (3, 1000, 33)]


def weight(kind, out, width, apart, seed=0, keep=lambda a: a):
    r = np.random.default_rng(seed)
    if kind == Kind.WORDS:
        words = (r.standard_normal((out, width)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return Weight(kind, keep(words))
    codes = r.integers(-127, 128, (out, width)).astype(np.int8)
    scales = [np.exp2(r.uniform(-12, 3, n)).astype(np.float32) for n in (out, width)]
    places = np.stack([np.sort(r.integers(0, out, apart)), r.integers(0, width, apart)], axis=1)
    values = r.standard_normal(apart).astype(np.float32)
    return Weight(kind, *map(keep, (codes, *scales, places, values)))


def product(w, x, cpu, team=None):
    y = fenced(np.full((len(x), w.shape[0]), np.nan, np.float32))
    with kernels.using(cpu):
        multiply(w, x, y, team)
    return y


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("cpu", kernels.CPUS)
@pytest.mark.parametrize("before", [False, True])
def test_the_kernel_has_the_bits_of_its_twin(kind, cpu, before):
    for out, width, n in SIZES:
        w = weight(kind, out, width, 3, out, lambda a: fenced(a, before))
        x = fenced(np.random.default_rng(n).standard_normal((n, width)).astype(np.float32), before)
        found = product(w, x, cpu)
        assert np.array_equal(found.view(np.uint32), product(w, x, None).view(np.uint32))


def test_what_is_multiplied():
    for kind in Kind:
        w = weight(kind, 50, 70, 4, 1)
        dense = w.dense().astype(np.float64)
        x = np.random.default_rng(2).standard_normal((3, 70)).astype(np.float32)
        want = x @ dense.T
        for (row, column), value in zip(w.places, w.values, strict=True):
            want[:, row] += x[:, column] * value
        scale = np.abs(x) @ np.abs(dense).T
        assert (np.abs(product(w, x, native.cpus()[-1]) - want) <= 1e-6 * scale + 1e-5).all()
        assert product(w, x[:0], native.cpus()[-1]).shape == (0, 50) == product(w, x[:0], None).shape


@pytest.mark.parametrize("cpu", kernels.CPUS)
def test_a_weight_is_rounded_as_words_are(cpu):
    """All numbers of nine bits, whose ties go to even, those beside them, and the ends of the range."""
    near = (np.arange(256, 512)[:, None] + np.array([0, 2**-15, -(2**-15)])).ravel()
    columns = np.concatenate([near * 2.0**e for e in (-108, -9, 0, 91)]).astype(np.float32)
    w = Weight(Kind.ROUNDED, np.array([[1], [-1]], np.int8).repeat(len(columns), 1), np.ones(2, np.float32), columns)
    want = from_words(to_words(columns, "BF16"), "BF16")
    assert np.array_equal(w.dense(), [want, -want]) and want.min() >= SMALLEST and want.max() <= GREATEST
    for k in range(0, len(columns), 97):  # each of 97 columns by itself
        part = Weight(Kind.ROUNDED, w.codes[:, k : k + 97].copy(), np.ones(2, np.float32), columns[k : k + 97].copy())
        width = part.shape[1]
        assert np.array_equal(product(part, np.eye(width, dtype=np.float32), cpu), part.dense().T)


@pytest.mark.parametrize("cpu", native.cpus())
def test_threads_share_products(cpu):
    w, team = weight(Kind.ROUNDED, 1030, 530, 9), Team(3)
    x = np.random.default_rng(0).standard_normal((1, 530)).astype(np.float32)
    want = product(w, x, cpu)
    for _ in range(50):
        assert np.array_equal(product(w, x, cpu, team), want)
    found = []

    def many():
        y = np.empty_like(want)
        for _ in range(20):
            multiply(w, x, y, team)
            found.append(np.array_equal(y, want))

    threads = [threading.Thread(target=many) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [True] * 60


def test_threads_end_with_their_team():
    before = set(threading.enumerate())
    w, x = weight(Kind.EXACT, 600, 600, 0), np.ones((1, 600), np.float32)
    team = Team(2)
    y = np.empty((1, 600), np.float32)
    multiply(w, x, y, team)
    threads = set(threading.enumerate()) - before
    assert len(threads) == (2 if native.available() else 0)
    del team
    gc.collect()
    for t in threads:
        t.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    w, x, team = weight(Kind.EXACT, 600, 600, 0), np.ones((1, 600), np.float32), Team(1)
    y = np.empty((2, 1, 600), np.float32)
    multiply(w, x, y[0], team)
    child = os.fork()
    if child == 0:
        multiply(w, x, y[1], team)
        os._exit(0 if np.array_equal(*y) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_copies():
    w = weight(Kind.ROUNDED, 5, 7, 2)
    again = copy.deepcopy(w)
    assert again.at != w.at and again.codes is not w.codes and np.array_equal(again.dense(), w.dense())
