"""Weights to codes on a grid: round to nearest, and GPTQ (Frantar et al., arXiv 2210.17323).

The grid of a group of columns is found from its numbers: a scale and a zero from minimum and maximum, or from the
shrunk range with the least squared error. Where the columns go in another order (act-order), groups keep the columns
they have in the file, and their grids are those of the weights that were given (static groups).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import SourceError
from rac.stages.groups import MOST, Grouped, storable

DAMP = 0.01
"""Share of the mean diagonal that is added to the Hessian: the paper's."""
BLOCK = 128
"""Columns between updates of all the columns behind them: the paper's."""
SHRINKS = np.linspace(1, 0.3, 36)
"""Shares of the range that `search` tries, the whole of it first."""
Floats = NDArray[np.floating[Any]]
Scales = NDArray[np.float32]
Codes = NDArray[np.uint8]


def rtn(w: Floats, bits: int, group: int | None = None, *, symmetric: bool = False, search: bool = False) -> Grouped:
    """Round each weight of w (R, C) to the nearest number of its group's grid.

    `bits` are those of a code, 1 to 8; `group` columns share a scale (None: all of them). The zero of a `symmetric`
    grid is its middle, code 2**(bits - 1), and the range is that of the largest magnitude; otherwise from the least to
    the largest weight, and 0. With `search` the range is the one with the least squared error, of SHRINKS of it.

    SourceError where NaN or infinity is among the weights, or some are too large for binary16 scales; ValueError where
    `bits` or `group` is out of range, or `w` is no matrix.
    """
    w, group = _checked(w, bits, group)
    scales, zeros = _grids(w, bits, group, symmetric, search)
    codes = np.empty(w.shape, np.uint8)
    for g in range(scales.shape[1]):  # a group after the other: little memory beside the weights
        at = slice(g * group, (g + 1) * group)
        codes[:, at] = _codes(w[:, at], scales[:, g, None], zeros[:, g, None], bits)
    return Grouped(codes, scales, zeros, group, bits)


def gptq(
    w: Floats,
    hessian: Floats,
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = False,
    search: bool = False,
    act_order: bool = True,
    static_groups: bool = True,
    damp: float = DAMP,
    block: int = BLOCK,
) -> Grouped:
    """Round column by column, and let the columns behind make up for the error (arXiv 2210.17323, algorithm 1).

    The error tr(E H E^T), E = w - what is stored, is made small. With U upper triangular and H^-1 = U^T U, a column's
    error over U[j, j] times row j of U is taken from the columns that follow. Columns whose inputs were always 0 are
    made 0. `w` is (R, C); `bits`, `group`, `symmetric` and `search` are those of `rtn`, and so are the errors, for NaN
    or infinity among inputs too.

    `hessian` is the (C, C) second moment of the inputs, in any unit, to whose diagonal `damp` of its mean is added.
    `act_order` takes columns with large inputs first (descending diagonal). `static_groups` are grids of the weights as
    they were given; otherwise a group has the grid of what it is when its first column is reached, which columns in
    another order do not allow. `block` columns lie between updates of all the columns behind them: speed alone.
    """
    w, group = _checked(w, bits, group)
    rows, cols = w.shape
    if hessian.shape != (cols, cols):
        raise ValueError(f"a Hessian of {hessian.shape} for {cols} columns")
    if act_order and not static_groups and group < cols:
        raise ValueError("act-order needs static groups")
    if block < 1 or not damp >= 0:
        raise ValueError("block is at least 1, damp at least 0")
    live = np.diag(hessian) > 0
    rest = np.where(live, w, 0).T.copy()  # (C, R): what is left to store, a column in a row
    scales, zeros = _grids(rest.T, bits, group, symmetric, search)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(cols)
    u = _factor(hessian, live, order, damp)
    rest = rest[order]
    codes = np.empty((cols, rows), np.uint8)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        errors = np.empty((end - start, rows))
        for i in range(start, end):
            before, j = errors[: i - start], int(order[i])
            column, g = rest[i] - u[start:i, i] @ before, j // group
            if not static_groups and j % group == 0:
                now = rest[i : i + group] - u[start:i, i : i + group].T @ before
                scales[:, g : g + 1], zeros[:, g : g + 1] = _grids(now.T, bits, group, symmetric, search)
            codes[j] = _codes(column, scales[:, g], zeros[:, g], bits)
            errors[i - start] = (column - _stored(codes[j], scales[:, g], zeros[:, g])) / u[i, i]
        rest[end:] -= u[start:end, end:].T @ errors
    return Grouped(np.ascontiguousarray(codes.T), scales, zeros, group, bits)


def _grids(w: Floats, bits: int, group: int, symmetric: bool, search: bool) -> tuple[Scales, Codes]:
    """Scales and zeros (R, G) of groups of columns of finite weights (R, C); the ranges contain 0."""
    found = [_grid(w[:, at : at + group], bits, symmetric, search) for at in range(0, w.shape[1], group)]
    return np.stack([s for s, _ in found], 1), np.stack([z for _, z in found], 1)


def _grid(w: Floats, bits: int, symmetric: bool, search: bool) -> tuple[Scales, Codes]:
    """Scale and zero of each row of (R, n)."""
    low, high = np.minimum(w.min(1), 0.0), np.maximum(w.max(1), 0.0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scale, zero = _range(low, high, bits, symmetric)
    if search:
        least = _error(w, scale, zero, bits)
        for shrink in SHRINKS[1:]:
            s, z = _range(shrink * low, shrink * high, bits, symmetric)
            error = _error(w, s, z, bits)
            better = error < least
            least = np.where(better, error, least)
            scale, zero = np.where(better, s, scale), np.where(better, z, zero)
    return scale, zero


def _range(low: Floats, high: Floats, bits: int, symmetric: bool) -> tuple[Scales, Codes]:
    """The grid from `low` to `high`, as it is stored: the zero fits the rounded scale."""
    top = 2**bits - 1
    exact = (high - low) / top
    if exact.size and float(exact.max()) > MOST:
        raise SourceError(f"weights up to {float(np.maximum(-low, high).max()):.3g} need scales beyond binary16")
    scale = storable(exact)
    if symmetric:
        return scale, np.full(scale.shape, 2 ** (bits - 1), np.uint8)
    return scale, np.clip(np.rint(-low / scale), 0, top).astype(np.uint8)


def _codes(w: Floats, scale: Scales, zero: NDArray[Any], bits: int) -> Codes:
    found: Codes = np.clip(np.rint(w / scale) + zero, 0, 2**bits - 1).astype(np.uint8)
    return found


def _stored(codes: Codes, scale: Scales, zero: Codes) -> Floats:
    return (codes.astype(np.float64) - zero) * scale


def _error(w: Floats, scale: Scales, zero: Codes, bits: int) -> Floats:
    """Squared error of each row."""
    scale, zero = scale[:, None], zero[:, None]
    error: Floats = np.square(w - _stored(_codes(w, scale, zero, bits), scale, zero)).sum(1)
    return error


def _factor(hessian: Floats, live: NDArray[np.bool_], order: NDArray[np.int64], damp: float) -> NDArray[np.float64]:
    """U, upper triangular, with (H + damping)^-1 = U^T U, columns in `order`.

    Of H = R R^T with R upper triangular (a Cholesky factor taken from the last column on), U is R^-1: no inverse of H
    is made.
    """
    h = hessian.astype(np.float64)
    if not np.isfinite(h).all():
        raise SourceError("the inputs of the layer hold NaN or infinity")
    dead = np.flatnonzero(~live)
    h[dead, :] = h[:, dead] = 0
    h[dead, dead] = 1
    h = h[np.ix_(order, order)]
    h[np.diag_indices_from(h)] += damp * np.diag(h).mean()
    try:
        r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as e:
        raise ValueError(f"the Hessian is not positive definite with a damping of {damp:g}") from e
    u: NDArray[np.float64] = np.triu(np.linalg.inv(r))
    return u


def _checked(w: Floats, bits: int, group: int | None) -> tuple[Floats, int]:
    """The weights in float64, and the columns of a group."""
    if w.ndim != 2 or not w.size:
        raise ValueError(f"weights of shape {w.shape} are no matrix")
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    group = w.shape[1] if group is None else min(group, w.shape[1])
    if group < 1:
        raise ValueError(f"a group has at least one column, not {group}")
    w = w.astype(np.float64)
    if not np.isfinite(w).all():
        raise SourceError("the weights hold NaN or infinity")
    return w, group
