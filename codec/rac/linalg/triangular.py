"""Triangular alignment: successive cancellation through the Cholesky factor of the inputs' second moment.

With S = L L^T, L lower triangular, and columns quantised from the last to the first, each after the errors of those
before it are fed back, the output error is the sum over j of L_jj^2 |error of column j|^2: every column counts alike
when its step is proportional to 1 / L_jj (WaterSIC, arXiv 2603.04956; GPTQ is the same recursion with equal steps). A
decoder needs to know nothing of it.

Errors of different rows add up in what follows too. With G the second moment of the gradients at the outputs, the loss
is near tr(G E S E^T) (a Kronecker-factored Fisher; YAQA, arXiv 2505.22988): with G = M M^T, M upper triangular, and
rows quantised from the first to the last, the same holds along the rows, and the factors multiply.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rac.linalg import exact
from rac.native.product import cholesky, factor

_ROWS = 64  # rows of a second moment that are looked at once


@dataclass(frozen=True, slots=True)
class Triangular:
    """The recursion of one second moment; or those of G blocks of rows that have inputs of their own (experts)."""

    order: NDArray[np.int64]  # (n,) column at each place; places are quantised from the last to the first
    weight: NDArray[np.float64]  # (n,) or (G, n), L_jj: root of what a unit error of the column at a place costs
    feed: NDArray[np.float32]
    """(n, n) or (G, n, n), [j, i], i > j: weight of the error at i in the target at j. Columns lie one after the other
    in memory, as those of L do."""
    device: str = "cpu"  # where errors are fed back

    @property
    def by_column(self) -> NDArray[np.float64]:
        """(n,) or (G, n), `weight` in the order of the columns."""
        out = np.empty_like(self.weight)
        out[..., self.order] = self.weight
        return out


def damped(second: NDArray[np.floating], damp: float) -> NDArray[np.float64]:
    """A copy of a second moment (n, n) with `damp` times its mean diagonal added to the diagonal."""
    s = np.array(second, np.float64)
    s[np.diag_indices_from(s)] += damp * max(float(np.trace(s)) / len(s), 1e-30)
    return s


def triangular(second: NDArray[np.floating], damp: float = 0.01, sort: bool = True) -> Triangular:
    """The recursion for inputs of second moment E[x x^T] (n, n), symmetric, of any rank.

    `damp` is the share of the mean diagonal that is added to the diagonal. With `sort` columns are quantised in
    descending order of their energy, else from the last to the first. It takes 8 n^2 bytes while it works.
    """
    order = np.argsort(diagonal(second), kind="stable") if sort else np.arange(len(second))
    return Triangular(order, *_factor(second, damp, order))


def blocks(seconds: Sequence[NDArray[np.floating]], damp: float = 0.01) -> Triangular:
    """The recursions of blocks whose inputs have second moments `seconds` (n, n), in the order of the mean energy."""
    order = np.argsort(np.mean([diagonal(s) for s in seconds], 0), kind="stable")
    n = len(order)
    weight, feed = np.empty((len(seconds), n)), np.empty((len(seconds), n, n), np.float32).swapaxes(1, 2)
    for g, second in enumerate(seconds):
        weight[g], feed[g] = _factor(second, damp, order)
    return Triangular(order, weight, feed)


def diagonal(second: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) mean energies of the inputs."""
    return np.diag(np.asarray(second)).astype(np.float64)


def _factor(
    second: NDArray[np.floating], damp: float, order: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """L_jj and the feeds of the columns in their order: read, factored and divided in one buffer of float64."""
    n = len(order)
    held = np.empty(n * n)
    lower = held.reshape(n, n)
    _read(second, damp, order, lower)
    factor(lower)
    weight = np.diag(lower).copy()
    feeds = held.view(np.float32)[: n * n].reshape(n, n)
    for a in range(0, n, _ROWS):  # row i of float64 lies behind all of the rows of float32 up to it
        b = min(n, a + _ROWS)
        feeds[a:b, :b] = np.tril(lower[a:b, :b] / weight[:b], a - 1)
        feeds[a:b, b:] = 0
    del lower, feeds  # they would be of no memory
    held.resize(-(-n * n // 2), refcheck=False)
    return weight, held.view(np.float32)[: n * n].reshape(n, n).T


def _read(second: NDArray[np.floating], damp: float, order: NDArray[np.int64], out: NDArray[np.float64]) -> None:
    """The lower triangle of a damped second moment in an order of its columns; what is above is left as it is."""
    s, energy = np.asarray(second), diagonal(second)
    for a in range(0, len(s), _ROWS):
        b = min(len(s), a + _ROWS)
        out[a:b, :b] = s[order[a:b]].take(order[:b], 1)
        _forget(second)
    out[np.diag_indices_from(out)] = energy[order] + damp * max(float(energy.sum()) / len(s), 1e-30)


def _forget(second: NDArray[np.floating]) -> None:
    """Let the system have the memory of an array that is mapped from a file, whose numbers stay in the file."""
    file = getattr(second, "_mmap", None)
    if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Rows:
    """The recursion of the rows."""

    weight: NDArray[np.float64]
    """(m,) M_ii: the square root of what a unit error of that row costs."""
    feed: NDArray[np.float32]
    """(m, m), [i, k], k < i: weight of the error of row k in the target of row i; or (G, m / G, m / G): within each
    block of rows."""
    gain: float = 0.0  # bits a row that feedback promises, against steps by the diagonal alone


LEAST = 1e-4  # share of the mean that every output is taken to matter


def rows(second: NDArray[np.floating], shrink: float) -> Rows:
    """The recursion for gradients of second moment (m, m); a share `shrink` > 0 off the diagonal counts as chance."""
    g = np.asarray(second, np.float64)
    own = np.maximum(np.diag(g), max(np.diag(g).mean() * LEAST, 1e-30))
    g = (1 - shrink) * g
    g[np.diag_indices_from(g)] = own
    upper = cholesky(g[::-1, ::-1])[::-1, ::-1]
    weight = np.diag(upper).copy()
    gain = float((exact.log2(np.sqrt(own)) - exact.log2(weight)).mean())
    return Rows(weight, np.tril((upper / weight).T, -1).astype(np.float32), gain)
