"""In which coordinates tensors are quantised, and beside what: triangular or principal ones, with a part of low rank.

Costs are those of Gaussians: rate and distortion of reverse water-filling at one slope.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rac.align import pca
from rac.container import zstd
from rac.encode import ties
from rac.encode.align.recipe import Aligned, Recipe, input_of, matrix_of
from rac.encode.sources import SourceTensor
from rac.encode.sources.tables import is_table
from rac.encode.split.objects import HARM, Array, basis_of, inverse, share_of
from rac.errors import BudgetError
from rac.linalg import exact
from rac.records import Limits
from rac.split import low_rank
from rac.stages import trellis

F32 = np.float32
RANKS = (1, 2, 4, 8, 16, 32)  # ranks that `choose_rank` considers, beside 0
MARGIN = 0.25 + 0.05  # bits per weight by which a scalar, and a coded trellis, stay above `_bits`: of short objects
GAUSSIAN = 0.9166  # log2 of the deviation of a Gaussian less the mean of log2 of its magnitudes
HEADS = 2 * 8 * 320  # bits of two object records beside their weights and lists: heads, tables, padding
TALL = 16  # rows for each column from which on auto looks at PCA: a basis takes 3 bits per entry and more


def choose(recipe: Recipe, groups: Sequence[ties.Group], rank: int | None, align: str, rate: float) -> Recipe:
    """The recipe with the alignment (of ALIGNMENTS) and rank (None: what pays at `rate` bits) that were asked for."""
    out = dict(recipe.aligned)
    known = {
        g.tensor.name: g.tensor
        for g in groups
        if (a := out.get(g.tensor.name)) and a.layer and not (a.layer.transposed or a.layer.experts or a.zeros)
    }
    sharing: dict[str | bytes, dict[str, SourceTensor]] = {}  # tensors by their input
    for name, t in ({} if align == "triangular" else known).items():
        if align == "auto" and is_table(t):  # single rows are read, and a basis would be in the way
            continue
        a = out[name]
        if align == "identity":  # no steps of columns, no feedback; errors cost on average what they did
            second = a.second()
            base = a.base + exact.middle(a.triangular().weight) - 0.5 * float(exact.log2(np.diag(second).mean()))
            flat = replace(a.scales, cols=np.zeros_like(a.scales.cols))
            out[name] = replace(a, base=base, scales=flat, alignment="identity")
        else:
            sharing.setdefault(_input(a), {})[name] = t
    for tensors in sharing.values():
        out |= _turned(tensors, out, recipe.states, rate if align == "auto" else None)
    for name, t in known.items():
        a = out[name]
        if a.alignment == "triangular" and rank != 0 and not (rank is None and is_table(t)):
            most = min(len(a.scales.rows), len(a.scales.cols))
            out[name] = replace(a, rank=choose_rank(matrix_of(t), a, rate) if rank is None else min(rank, most))
    size = 0
    for name, a in out.items():
        rows, cols = len(a.scales.rows), len(a.scales.cols)
        size += 4 * a.rank * (rows + cols) + (4 * cols**2 if a.basis and a.basis.first == name else 0)
    if size > Limits().objects:
        raise BudgetError(f"matrices beside the tensors would take {size} bytes of memory, more than readers allow")
    return replace(recipe, aligned=out)


def _input(a: Aligned) -> str | bytes:
    """What tells the inputs of a tensor from others: what is known of them, or their numbers."""
    assert a.layer is not None  # noqa: S101
    return input_of(a.layer) or zstd.digest(np.ascontiguousarray(a.second()).view(np.uint8).reshape(-1).data)


def choose_rank(w: NDArray[np.float32], a: Aligned, rate: float) -> int:
    """The rank of RANKS, or 0, with the fewest bits at equal error where the model takes about `rate` bits a weight."""
    rows, cols = w.shape
    weight = a.triangular().by_column
    level = 2.0 ** (a.base - rate + exact.middle(weight))  # root of the error where columns count 1
    x = w / trellis.power(a.scales.rows)[:, None]
    second = a.second()
    for most in (4, RANKS[-1]):
        left, right = low_rank(x, second, min(most, rows, cols), 4)
        size = np.linalg.norm(left, axis=0)
        bits = {0: _bits(x, weight, level)}
        for rank in (n for n in RANKS if n <= len(size)):
            one, two = left[:, :rank], right[:rank]
            bits[rank] = _bits(x - (one @ two).astype(F32), weight, level) + _bits(one, np.ones(rank), level)
            bits[rank] += _bits(two * size[:rank, None], weight, level) + MARGIN * rank * (rows + cols)
            bits[rank] += HEADS + rows + cols
        best = min(bits, key=lambda n: bits[n])
        if best < most:  # higher ranks, which take long to find, do not come into question
            break
    return best


def _bits(m: Array, weight: Array, level: float) -> float:
    """Bits of a matrix (R, C) whose columns count `weight`, the root of the error where one counts 1 being `level`.

    As much of the error as would undo it is counted as bits. Deviations of columns are taken from logarithms: rows that
    are larger, which the coder knows apart, count as such.
    """
    x = 2 ** (np.log2(np.maximum(np.abs(m) * (weight / level), 1e-2)).mean(0) + GAUSSIAN)
    price = np.maximum(0, np.log2(np.maximum(x, 1e-30))) + np.minimum(1, x * x) / (2 * math.log(2))
    return float(price.sum()) * len(m)


def _turned(
    sharing: Mapping[str, SourceTensor], every: Mapping[str, Aligned], states: int, rate: float | None
) -> dict[str, Aligned]:
    """Tensors of one input in their principal directions; with a `rate` only where that pays for the basis there."""
    aligned = {name: every[name] for name in sharing}
    first, a = next(iter(aligned.items()))
    rows = sum(len(b.scales.rows) for b in aligned.values())
    if rate is not None and rows < TALL * len(a.scales.cols):
        return {}
    assert a.layer is not None  # noqa: S101
    p, r = pca(a.layer.second, a.damp), a.triangular()
    if (
        rate is not None
    ):  # bits that are saved against triangular alignment at equal error, those of the basis taken off
        n, share = len(p.weight), share_of(len(p.weight), rows)
        saved = -n * n * (0.15 - 0.5 * math.log2(share)) - HARM * share * n * rows - HEADS / 2
        for name, b in aligned.items():
            w = matrix_of(sharing[name]) / trellis.power(b.scales.rows)[:, None].astype(np.float64)
            level = 2.0 ** (b.base - rate + exact.middle(r.weight))
            saved += _bits(w[:, r.order], r.weight, level) - _bits(w @ p.basis.T, p.weight, level)
        if saved <= 0:
            return {}
    basis = basis_of(first, p, r, rows, states)
    s, u = a.second(), basis.object.values.astype(np.float64)
    weight = np.sqrt(np.einsum("ij,ij->i", u @ s, u))  # of the directions that a decoder has
    cols, base = inverse(weight), exact.middle(r.weight) - exact.middle(weight)
    return {
        name: replace(b, base=b.base + base, scales=replace(b.scales, cols=cols), alignment="pca", basis=basis)
        for name, b in aligned.items()
    }
