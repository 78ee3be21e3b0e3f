"""Scale classes of rows and columns: entropy-constrained clustering of symbol histograms.

After Chou, Lookabaugh & Gray, "Entropy-constrained vector quantization" (1989), with histograms as the vectors and
code length as the distance. Every number that decides is an integer, so that every machine finds the same classes.
Code lengths are in units of 2**-10 bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native

UNIT = 1024
Counts = NDArray[np.int64]


def _fractions() -> Counts:
    y = np.arange(2048, 4096, dtype=np.uint64) << np.uint64(20)
    out = np.zeros(2048, np.int64)
    for bit in range(10):  # binary digits of the logarithm by repeated squaring
        y = (y * y) >> np.uint64(31)
        carry = y >> np.uint64(32)
        out |= carry.astype(np.int64) << (9 - bit)
        y >>= carry
    return out


FRACTION = _fractions()
"""Fractions of the logarithm, by 11 bits of the number."""


def log2(n: NDArray[Any]) -> Counts:
    """floor(1024 log2 n) of positive integers below 2**53, to 11 bits of n; 0 for n = 0."""
    done = native.log2(n.astype(np.int64), FRACTION)
    if done is not None:
        return done
    exponent = np.frexp(n.astype(np.float64))[1].astype(np.int64) - 1  # exact for integers below 2**53
    up, down = np.maximum(11 - exponent, 0), np.maximum(exponent - 11, 0)
    fraction = ((n.astype(np.int64) << up) >> down) & 2047
    return np.where(n > 0, (exponent << 10) + FRACTION[fraction], 0)


def code_length(counts: NDArray[Any], weight: int = 1) -> Counts:
    """Bits (...), in units, that the best code for `counts` (..., S) spends on them and on `weight` times the table."""
    c = counts.astype(np.int64)
    done = native.code_length(np.ascontiguousarray(c).reshape(-1, c.shape[-1]), FRACTION, weight)
    if done is not None:
        return done.reshape(c.shape[:-1])
    total: Counts = c.sum(-1)
    # the table in the file: noise of a count is its root, in 12-bit frequencies
    share = 1 + c * 4096 // np.maximum(1, total)[..., None]
    table: Counts = UNIT * 3 // 2 * c.shape[-1] + (log2(share) // 2).sum(-1)
    out: Counts = total * log2(total) - (c * log2(c)).sum(-1) + weight * table
    return out


def _sum(hist: NDArray[Any], classes: NDArray[np.uint8], k: int) -> Counts:
    """(k, G, S) counts of the members of each class."""
    out = np.zeros((k, *hist.shape[1:]), np.int64)
    if native.sum_classes(hist, np.ascontiguousarray(classes), out):
        return out
    used, starts = np.unique(classes[order := np.argsort(classes, kind="stable")], return_index=True)
    out[used] = np.add.reduceat(hist[order], starts, 0, np.int64)
    return out


ONE_THREAD = 1 << 18  # multiplications up to which a BLAS starts no threads, which would fight with those that pack


def nearest(hist: NDArray[Any], agg: Counts, members: Counts) -> NDArray[np.uint8]:
    """Cheapest class of each vector of `hist` (n, G, S) given the classes' counts (K, G, S) and sizes (K,)."""
    total = 16 * agg.sum(-1, keepdims=True) + agg.shape[-1]
    # code length (G * S, K) of a symbol under each class
    cost = (log2(total) - log2(16 * agg + 1)).reshape(len(agg), -1).astype(np.float64).T.copy()
    bias = (log2(np.maximum(1, members.sum())) - log2(np.maximum(1, members))).astype(np.float64)
    flat = hist.reshape(len(hist), -1)
    out = np.empty(len(flat), np.uint8)
    step = max(1, min(1024, ONE_THREAD // cost.size))
    for a in range(0, len(flat), step):
        out[a : a + step] = (flat[a : a + step].astype(np.float64) @ cost + bias).argmin(1)
    return out


Vectors = Callable[[int, int], NDArray[Any]]  # histograms (b - a, G, S) of the vectors [a, b)
HELD = 1 << 24  # counters that are held at once; where there are more, histograms are counted again in every round


def cluster(
    vectors: Vectors, n: int, size: int, k: int, rounds: int, weight: int = 1
) -> tuple[NDArray[np.uint8], Counts]:
    """Classes (n,) of `n` vectors of `size` = G S counters each, and the classes' counts (K', G, S), K' <= k.

    Starts from quantiles of the mean symbol, refines `rounds` times, then joins classes while that shortens the
    file, tables and class lists counted.
    """
    k, step = min(k, n), max(1, HELD // size)
    if step >= n and (found := native.cluster(whole := vectors(0, n), k, rounds, FRACTION)):
        classes, agg = found
    elif step >= n:
        classes, agg = _refined(lambda a, b: whole[a:b], [(0, n)], k, rounds)
    else:
        classes, agg = _refined(vectors, [(a, min(n, a + step)) for a in range(0, n, step)], k, rounds)
    groups = join(agg, np.bincount(classes, minlength=k), weight)
    return groups[classes], sum_groups(agg, groups, int(groups.max()) + 1)


def _refined(vectors: Vectors, bounds: list[tuple[int, int]], k: int, rounds: int) -> tuple[NDArray[np.uint8], Counts]:
    """`native.cluster` of vectors that are counted in pieces."""
    n = bounds[-1][1]

    def count(classes: NDArray[np.uint8]) -> Counts:
        out: Counts = sum(_sum(vectors(a, b), classes[a:b], k) for a, b in bounds)  # type: ignore[assignment]
        return out

    classes = np.zeros(n, np.uint8)
    if k > 1:
        plain = np.concatenate([vectors(a, b).sum(1, dtype=np.int64) for a, b in bounds])
        mean = (plain @ np.arange(plain.shape[1], dtype=np.int64) << 16) // np.maximum(1, plain.sum(1))
        classes[np.argsort(mean, kind="stable")] = np.arange(n) * k // n
    agg = count(classes)
    for _ in range(rounds if k > 1 else 0):
        members = np.bincount(classes, minlength=k)
        new = np.concatenate([nearest(vectors(a, b), agg, members) for a, b in bounds])
        if (new == classes).all():
            break
        classes = new
        agg = count(classes)
    return classes, agg


def sum_groups(agg: Counts, groups: NDArray[np.uint8], kept: int) -> Counts:
    """(kept, ...) counts of the groups of the classes that `agg` (K, ...) counts."""
    if kept == len(agg):
        return agg
    out = np.zeros((kept, *agg.shape[1:]), np.int64)
    np.add.at(out, groups, agg)
    return out


def join(agg: Counts, members: Counts | None = None, weight: int = 1) -> NDArray[np.uint8]:
    """Group (K,) of each class of counts (K, G, S): joined while lists of members and `weight` tables get shorter."""
    k = len(agg)
    groups = np.arange(k)
    agg = agg.astype(np.int64).copy()
    size = np.zeros(k, np.int64) if members is None else members.astype(np.int64).copy()
    alive: NDArray[np.bool_] = np.asarray(agg.any(axis=(1, 2)))
    if not alive.any():
        return np.zeros(k, np.uint8)
    groups[~alive] = int(np.flatnonzero(alive)[0])
    if native.join(agg, size, alive, groups, FRACTION, weight):
        return np.unique(groups, return_inverse=True)[1].astype(np.uint8)
    own = code_length(agg, weight).sum(-1)
    gain = np.full((k, k), np.iinfo(np.int64).min)

    def update(i: int) -> None:
        other = np.flatnonzero(alive)
        other = other[other != i]
        both, members = code_length(agg[other] + agg[i], weight).sum(-1), size[other] + size[i]
        # the list is n log n - sum m log m long
        lists = members * log2(members) - size[other] * log2(size[other]) - size[i] * log2(size[i : i + 1])
        gain[np.minimum(other, i), np.maximum(other, i)] = own[other] + own[i] - both + lists

    for first in np.flatnonzero(alive):
        update(int(first))
    while alive.sum() > 1:
        i, j = divmod(int(gain.argmax()), k)
        if gain[i, j] <= 0:
            break
        agg[i] += agg[j]
        size[i] += size[j]
        alive[j] = False
        groups[groups == j] = i
        gain[j, :] = gain[:, j] = np.iinfo(np.int64).min
        own[i] = code_length(agg[i], weight).sum()
        update(i)
    return np.unique(groups, return_inverse=True)[1].astype(np.uint8)


def classify(
    symbols: NDArray[np.uint8], n: int, weight: int, rounds: int, most: tuple[int, int, bool]
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None, Counts, NDArray[np.uint8]] | None:
    """Row classes, column classes (None: one class), symbol counts (Kr, Kc, n) and table (Kr, Kc) of each pair.

    `weight` is the length of a table against one of n symbols; `most`: row classes, column classes, and whether rows
    are classed again where columns have classes. None without the C kernel, and where counters take too much memory.
    """
    r, c = symbols.shape
    if max(r * n * (most[1] if most[2] else 1), c * n * most[0]) > HELD:
        return None
    return native.classify(symbols, n, weight, rounds, most, FRACTION)
