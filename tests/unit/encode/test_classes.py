"""Scale classes: exact integer logarithms and clustering."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rac.encode.code import classes as cl
from support import kernels


@pytest.fixture(params=kernels.ALL, autouse=True)
def kernel(request):
    with kernels.using(request.param):
        yield


def test_log2_exactly():
    """floor(1024 log2 n) of the upper 12 bits of n: m >= 2**(k / 1024) is m**1024 >= 2**k, in whole numbers."""
    for n in [*range(1, 300), 2047, 2048, 2049, 4095]:
        k = int(cl.log2(np.array([n]))[0])
        assert 1 << k <= n**1024 < 1 << (k + 1)
    for n in (4096, 4097, 1 << 30, (1 << 52) + 12345, (1 << 53) - 1):
        upper = n >> (n.bit_length() - 12)
        k = int(cl.log2(np.array([n]))[0]) - 1024 * (n.bit_length() - 12)
        assert 1 << k <= upper**1024 < 1 << (k + 1)
    assert cl.log2(np.array([0, 1, 2, 1 << 52])).tolist() == [0, 0, 1024, 52 * 1024]


def test_code_length_is_about_the_entropy():
    counts = np.array([[1000, 500, 250, 125, 125], [0, 0, 0, 0, 77]])
    entropy = -sum(n * math.log2(n / 2000) for n in counts[0].tolist())
    data = cl.code_length(counts, 0)
    assert abs(int(data[0]) / cl.UNIT - entropy) < 2000 / cl.UNIT * 2
    assert data[1] == 0
    assert (cl.code_length(counts, 2) - data == 2 * (cl.code_length(counts, 1) - data)).all()


def weights(groups, n, s, seed=0):
    """Histograms (n, 1, s) of rows that belong to `groups` kinds, and their kinds."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, groups, n)
    p = np.array([[0.5 ** abs(x - 3 * k - 2) for x in range(s)] for k in range(groups)])
    p /= p.sum(1, keepdims=True)
    return np.stack([rng.multinomial(2000, p[k]) for k in kind])[:, None].astype(np.uint32), kind


def cluster(hist, k, rounds):
    return cl.cluster(lambda a, b: hist[a:b], len(hist), hist[0].size, k, rounds)


def test_cluster_finds_the_kinds(monkeypatch):
    hist, kind = weights(4, 120, 16)
    found, agg = cluster(hist, 8, 4)
    assert len(agg) == 4
    assert len({(a, b) for a, b in zip(kind.tolist(), found.tolist(), strict=True)}) == 4
    for k in range(4):
        assert (agg[k] == hist[found == k].sum(0)).all()
    monkeypatch.setattr(cl, "HELD", 16 * 7)  # counted in pieces of 7 vectors
    again, sums = cluster(hist, 8, 4)
    assert again.tolist() == found.tolist()
    assert (sums == agg).all()


def test_one_kind_is_one_class():
    hist = np.repeat(weights(1, 1, 16)[0], 60, axis=0)
    found, agg = cluster(hist, 8, 3)
    assert not found.any()
    assert (agg == hist.sum(0)).all()
    found, agg = cluster(hist, 1, 0)
    assert (len(agg), found.any()) == (1, False)


def test_join():
    counts = np.array([[900, 90, 9], [9, 90, 900], [899, 91, 10], [0, 0, 0]])[:, None]
    assert cl.join(counts).tolist() == [0, 1, 0, 0]
    assert cl.join(np.zeros((3, 1, 4), np.int64)).tolist() == [0, 0, 0]
    assert cl.join(counts[:1]).tolist() == [0]
    given = counts.copy()
    cl.join(given)
    assert (given == counts).all()
    assert cl.sum_groups(counts, np.array([0, 1, 0, 0], np.uint8), 2).tolist() == [[[1799, 181, 19]], [[9, 90, 900]]]
