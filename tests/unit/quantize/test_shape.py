"""The search that feeds errors of rows to later rows: all versions of the kernel, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest

from rac.linalg.triangular import rows
from rac.native import trellis
from rac.stages import trellis as tr
from support import kernels

MOST = 127


def search(x, states, below, lane=None, lag=6):
    """(integers, values, outliers) of columns (n, m) in units, at the costs of a Gaussian."""
    n, m = x.shape
    rec = tr.magnitudes(states, 128)[128 - MOST : 129 + MOST].copy()
    rate = (0.35 * 0.7213 * (rec / 4.0) ** 2).astype(np.float32).reshape(1, 1, -1)
    how = trellis.Search(states, tr.CODES[states], lane or m, rec, rate, 2.0 * MOST, below=below, lag=lag)
    groups = () if below is None else below.shape[:-2]
    return trellis.block(how, x, x.copy(), np.zeros((*groups, n, n), np.float32), np.ones(n, np.float32))[:3]


def gradients(m):
    """Second moment of gradients that have much in common."""
    g = np.random.default_rng(1).standard_normal((4 * m, m))
    return (g + 2 * g @ np.random.default_rng(2).standard_normal((m, m)) / np.sqrt(m)).T @ g / (4 * m)


def columns(n, m):
    return (4 * np.random.default_rng(0).standard_normal((n, m))).astype(np.float32)


@pytest.mark.parametrize("states", [32, 64, 128, 256])
@pytest.mark.parametrize(("m", "lane", "lag"), [(200, 200, 6), (130, 64, 2), (15, 15, 1)])
def test_all_versions_agree(states, m, lane, lag):
    g = gradients(m)
    x = columns(3, m)
    x[1, m // 2] = 1e4  # an outlier
    x[2, 3] = 180  # integers beyond the tables of the fast version
    below = rows((g + g.T) / 2 + 4 * np.eye(m), 0.1).feed
    ours = search(x, states, below, lane, lag)
    for cpu in kernels.here():
        with kernels.using(cpu):
            for a, b in zip(ours, search(x, states, below, lane, lag), strict=True):
                assert a.tobytes() == b.tobytes()
    k, value, wild = ours
    assert wild.sum() == 1 and wild[1, m // 2]
    for column, numbers, out in zip(k, value, wild, strict=True):  # what the decoder makes of the integers
        state = 0
        for i, number in enumerate(column):
            state = 0 if i % lane == 0 else state
            if not out[i]:
                assert numbers[i] == (-1) ** (state & 1) * (2 * int(number) + 0.5)
            h0, h1 = tr.CODES[states]
            state = (state >> 1) ^ (h0 if state & 1 else 0) ^ (h1 if number & 1 else 0)


def test_without_weights_it_is_the_plain_search():
    x = columns(4, 100)
    plain = search(x, 32, None)
    shaped = search(x, 32, np.zeros((100, 100), np.float32), lag=7)  # 100 rows are within reach of every survivor
    for a, b in zip(plain, shaped, strict=True):
        assert a.tobytes() == b.tobytes()


def test_what_the_outputs_see_gets_smaller():
    m = 256
    g = np.random.default_rng(3).standard_normal((m, 8 * m))
    g = g @ g.T / (8 * m) + 0.5 * np.outer(*[np.random.default_rng(4).standard_normal(m)] * 2)
    r = rows(g, 1e-3)
    scale = 1 / r.weight
    scale /= np.exp(np.log(scale).mean())
    x = columns(32, m) * 1.0
    errors = {}
    for name, below in (("plain", None), ("fed", np.ascontiguousarray(r.feed * (scale / scale[:, None]), np.float32))):
        _, value, _ = search(x.astype(np.float32), 32, below)
        e = (x - value) * scale
        errors[name] = np.einsum("ci,ij,cj->", e, g, e)
    possible = np.mean(np.diag(g) * scale**2) / np.mean((r.weight * scale) ** 2)
    assert errors["plain"] / errors["fed"] > 0.8 * possible > 1.1


@pytest.mark.parametrize("cpu", kernels.CPUS)
def test_blocks_of_rows_are_apart(cpu):
    with kernels.using(cpu):
        blocks_of_rows()


def blocks_of_rows():
    """Rows of one block feed none of another; with lanes as long as blocks each is as if it were alone."""
    n = 100
    x = columns(2, 3 * n)
    g = gradients(n)
    below = np.stack([rows((g + g.T) / 2 + (4 + i) * np.eye(n), 0.1).feed for i in range(3)])
    ours = search(x, 32, below, n)
    for g in range(3):
        mine = slice(g * n, g * n + n)
        alone = search(np.ascontiguousarray(x[:, mine]), 32, below[g], n)
        for a, b in zip(ours, alone, strict=True):
            assert (a[:, mine] == b).all()
    # a lane that runs through the blocks: no more than what one block may feed into the next is left out
    apart = np.zeros((3 * n, 3 * n), np.float32)
    for g in range(3):
        apart[g * n : g * n + n, g * n : g * n + n] = below[g]
    one, other = (search(x, 32, b, 3 * n) for b in (below, apart))
    assert (one[0] == other[0]).mean() > 0.999  # sums of other lengths are rounded otherwise


@pytest.mark.parametrize("fed", [False, True])
def test_zeros_stay_in_sparse_columns(fed):
    """Without a trellis, in all versions; and each number is what rounding leaves of what it is fed."""
    m = 150
    x = np.where(np.random.default_rng(3).random((4, m)) < 0.6, np.float32(0), columns(4, m))
    g = gradients(m)
    below = rows((g + g.T) / 2 + 4 * np.eye(m), 0.1).feed.astype(np.float32) if fed else None
    rec = np.arange(-MOST, MOST + 1, dtype=np.float32)
    free = np.zeros((1, 1, len(rec)), np.float32)
    how = trellis.Search(1, tr.CODES[1], m, rec, free, MOST + 0.5, below=below, sparse=True)
    found = []
    for cpu in kernels.here():
        with kernels.using(cpu):
            k, value, *_ = trellis.block(how, x, x.copy(), np.zeros((4, 4), np.float32), np.ones(4, np.float32))
        found.append((k.tobytes(), value.tobytes()))
    assert len(set(found)) == 1 and (value == k).all() and not k[x == 0].any()
    error = np.where(x == 0, np.float32(0), x - value)
    target = x + (0 if below is None else error @ np.tril(below, -1).T)
    assert np.abs(target - value)[x != 0].max() <= 0.5 + 1e-3


def test_errors_of_rows_are_fed_back_with_256_states_at_most():
    rec, rate = np.zeros(9, np.float32), np.zeros((1, 1, 9), np.float32)
    with pytest.raises(ValueError, match="at most 256 states, not 512"):
        trellis.Search(512, tr.CODES[512], 4, rec, rate, 8.0, below=np.zeros((4, 4), np.float32))
