"""Matrices as a sum: a part of low rank that explains most of a layer's output, and what is left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["low_rank"]

_MORE = 8  # directions beyond the rank that are carried along: they make the others converge
_ENOUGH = 1e-10  # relative change of the explained energy at which the search ends


def low_rank(
    w: NDArray[np.floating], second: NDArray[np.floating], rank: int, rounds: int = 200
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A (R, r) and B (r, C), float64, with the least output error tr(E S E^T), E = W - A B, for r = `rank`.

    They are the truncated singular value decomposition of W S^1/2 = P diag(s) Q^T (Eckart & Young, 1936; with these
    weights QERA, arXiv 2410.06040, and SVD-LLM, arXiv 2403.07378; quantised factors: CALDERA, arXiv 2405.18886):
    A = P s and B = Q^T S^-1/2 = s^-1 P^T W, so that only P is to be found, the first directions of W S W^T: by subspace
    iteration (Halko, Martinsson & Tropp, SIAM Review 53, 2011) from a fixed start, of so many `rounds` at most.

    `w` is (R, C), `second` (C, C) is S, symmetric, of any rank; `rank` is 1 to min(R, C), ValueError otherwise. Columns
    of A have the singular values as norms, descending.
    """
    if not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank must be 1 to {min(w.shape)}, not {rank}")
    w, s = np.asarray(w, np.float64), np.asarray(second, np.float64)
    start = np.random.default_rng(0).standard_normal((w.shape[1], min(rank + _MORE, *w.shape)))
    p = np.linalg.qr(w @ start)[0]
    before = -1.0
    for left in reversed(range(max(1, rounds))):
        x = w.T @ p
        y = s @ x
        energy, turn = np.linalg.eigh(x.T @ y)
        found = float(energy[-rank:].sum())
        if not left or found - before <= _ENOUGH * found:
            break
        before = found
        p = np.linalg.qr(w @ y)[0]
    p, size = (p @ turn)[:, ::-1][:, :rank], np.sqrt(np.maximum(energy[::-1][:rank], 0))
    inverse = np.divide(1.0, size, out=np.zeros_like(size), where=size > 1e-7 * max(size[0], 1e-300))
    return p * size, inverse[:, None] * (p.T @ w)
