"""Tensors that need objects: a part of low rank beside the trellis, or a basis behind it, and when these pay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.encode import record as rec
from rac.encode import ties
from rac.encode.align.recipe import Aligned, Recipe, matrix_of
from rac.encode.code.plan import CODER, Level, Plan, grid_of
from rac.encode.encoded import Bytes, Encoded
from rac.encode.quantise import trellis as lossy
from rac.encode.sources import SourceTensor
from rac.errors import BudgetError
from rac.grid import Box
from rac.linalg import exact
from rac.linalg.pca import pca
from rac.linalg.triangular import Triangular, damped, triangular
from rac.records import Limits
from rac.split import low_rank
from rac.stages import products, trellis
from rac.stages.base import Product
from rac.stages.words import to_words

Array = NDArray[Any]
F32 = np.float32
RANKS = (1, 2, 4, 8, 16, 32)
"""Ranks that `choose_rank` considers, beside 0."""
SHORT = 64
"""Rows below which an object has no trellis: its lanes would be too short to gain anything."""
CELL = lossy.LAMBDA / (2 * math.log(2))
"""Mean squared error in squared units of a column of high rate: where a bit is worth LAMBDA."""
WIDE = 24
"""Most units that are the deviation of a row of B or a column of A."""
MARGIN = 0.25 + 0.05
"""Bits per weight by which a scalar, and by which a coded trellis, stay above what `_price` says: of short objects."""
GAUSSIAN = 0.9166
"""log2 of the deviation of a Gaussian less the mean of log2 of its magnitudes."""
HEADS = 2 * 8 * 320
"""Bits of two object records beside their weights and lists: heads, tables, padding."""
TALL = 16
"""Rows for each column from which on auto looks at PCA: a basis takes 3 bits per entry and more."""
COARSE = 1 / 64
"""Most that the error of a basis may add to the output error, as a share of it."""
HARM = 4.5
"""Bits per weight that such a share costs, per share: weak directions are no longer free of strong ones."""


@dataclass(frozen=True, slots=True)
class Object:
    """A matrix that tensors compute with, quantised."""

    encoded: Encoded
    quantised: lossy.Quantised

    @property
    def values(self) -> NDArray[np.float32]:
        """(R, C), what a decoder has. Decoded anew each time."""
        return np.asarray(self.quantised.dense).view(F32)


@dataclass(frozen=True, slots=True)
class Basis:
    """A basis that tensors of the same input share."""

    object: Object
    first: str
    """Name of the first tensor that uses the basis: its bytes include those of the basis."""


def lane_of(shape: tuple[int, ...], coder: Level = CODER) -> int:
    """Rows of the tiles of a matrix of integers, after which a trellis begins anew."""
    return grid_of("U8", shape, 1, coder).tr


def coded(q: lossy.Quantised, coder: Level = CODER) -> tuple[Plan, list[Bytes]]:
    """How the words of a quantised matrix are stored, and the units of its record."""
    plan, tiles = rec.coded(q.words, coder)
    return plan, [*plan.fronts, q.unit, *tiles]


def _object(
    name: str, w: Array, scale: float, rows: Array, cols: Array, states: int, recursion: Triangular | None
) -> Object:
    """Quantise an object (R, C) with units 2**(scale + rows / 4 + cols / 4) of a trellis, or such as cost the same."""
    states = states if len(w) >= SHORT else 1
    if states == 1:
        scale += 0.5 * math.log2(lossy.LAMBDA / lossy.worth(1))
    scales = lossy.Scales(_exponents(rows), _exponents(cols))
    lane = lane_of(w.shape)
    q = lossy.quantise(np.ascontiguousarray(w, F32), "F32", scale, scales, lane, states, 1, recursion)
    plan, units = coded(q)
    head = rec.object_head(name, plan, q.trellis, q.digest)
    return Object(Encoded(head, units, rec.object_fields(plan, units, q.trellis)), q)


def _exponents(x: Array) -> NDArray[np.int8]:
    """Quarter octaves as the format has them."""
    return np.clip(np.rint(x), -trellis.MOST, trellis.MOST).astype(np.int8)


def _middle(x: Array) -> float:
    """log2 of the geometric mean."""
    return float(exact.log2(x).mean())


def before(t: SourceTensor, recipe: Recipe) -> tuple[NDArray[np.float32], str, tuple[Object, ...]]:
    """What the trellis of a tensor of the recipe has to code: matrix (R, C), data type, and the objects behind it."""
    w, a = matrix_of(t), recipe.aligned[t.name]
    if a.basis is not None:
        u = a.basis.object.values.astype(np.float64)
        # In coordinates of the rows that a decoder has, which quantisation has left not quite orthonormal
        return np.linalg.solve(u.T, w.T.astype(np.float64)).T.astype(F32, order="C"), "F32", (a.basis.object,)
    if a.rank:
        objects = factors(t.name, w, a, recipe)
        return w - objects[0].values @ objects[1].values, "F32", objects
    return w, t.dtype, ()


def product_of(objects: Sequence[Object]) -> Product | None:
    """The stage that computes with the objects of a tensor: two are a product of low rank, one is a basis."""
    if not objects:
        return None
    return products.LowRank() if len(objects) == 2 else products.Basis()


def after(v: Array, dtype: str, objects: Sequence[Object]) -> Array:
    """Words (R, C) of the data type that a decoder makes of the trellis' words `v` and the objects."""
    product = product_of(objects)
    if product is None:
        return v
    found = np.asarray(v).view(F32)
    whole = Box(0, len(found), 0, found.shape[1])
    return to_words(product.join(found, [o.values for o in objects], whole), dtype)


def factors(name: str, w: NDArray[np.float32], a: Aligned, recipe: Recipe) -> tuple[Object, Object]:
    """The part of low rank of a matrix `w` (R, C): A (R, r) and B (r, C), quantised by what their errors cost.

    With A = P s and B = s^-1 P^T W and S = L L^T an error of column j of W costs L_jj^2, one in A 1, and one in B_kj
    (s_k L_jj)^2, all of them times what a row costs: at equal slope units are inverse to the roots of these.
    """
    r = a.recursion()
    assert a.layer is not None and r is not None  # noqa: PT018, S101
    unit = trellis.power(a.scales.rows)[:, None]
    left, right = low_rank(w / unit, damped(a.layer.second, a.damp), min(a.rank, *w.shape))
    weight = r.by_column
    size = np.maximum(np.linalg.norm(left, axis=0), 1e-30)
    scale = a.base + recipe.scale
    one, rows = scale + _middle(weight), -4 * (np.log2(size) - _middle(size))
    # What would leave the range of words is coarser: the residual makes up for it
    more = [np.maximum(0, 4 * (np.log2(size / math.sqrt(n) / WIDE) - one)) for n in w.shape]
    a_hat = _object(f"{name}.A", left * unit, one, a.scales.rows, more[0], recipe.states, None)
    rows, cols = rows + more[1], -4 * (np.log2(weight) - _middle(weight))
    return a_hat, _object(f"{name}.B", right, scale - _middle(size), rows, cols, recipe.states, r)


def _price(x: Array) -> Array:
    """Bits of a Gaussian of deviation `x`, the root of the error at high rate being 1, with the price of its error.

    Rate and distortion of reverse water-filling at one slope; as much of the error is bits as would undo it.
    """
    out: Array = np.maximum(0, np.log2(np.maximum(x, 1e-30))) + np.minimum(1, x * x) / (2 * math.log(2))
    return out


def _bits(m: Array, weight: Array, level: float) -> float:
    """`_price` of a matrix (R, C) whose columns count `weight`, the root of the error where one counts 1 being `level`.

    Deviations of columns are taken from logarithms: rows that are larger, which the coder knows apart, count as such.
    """
    x = np.log2(np.maximum(np.abs(m) * (weight / level), 1e-2)).mean(0)
    return float(_price(2 ** (x + GAUSSIAN)).sum()) * len(m)


def choose_rank(w: NDArray[np.float32], a: Aligned, rate: float) -> int:
    """The rank of RANKS, or 0, with the fewest bits at equal error, by what Gaussians would take.

    Args:
        w: The matrix (R, C).
        a: Alignment of the matrix, with a layer.
        rate: Bits per weight at which the model is coded, about: ranks cost less where all is finer.
    """
    r = a.recursion()
    if a.layer is None or r is None:
        return 0
    rows, cols = w.shape
    weight = r.by_column
    level = 2.0 ** (a.base - rate + _middle(weight))  # root of the error where columns count 1
    x = w / trellis.power(a.scales.rows)[:, None]
    second = damped(a.layer.second, a.damp)
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


def choose(recipe: Recipe, groups: Sequence[ties.Group], rank: int | None, align: str, rate: float) -> Recipe:
    """The recipe with the alignment and the ranks that were asked for, where the inputs are known.

    Args:
        recipe: As `recipe.calibrated` has it.
        groups: All tensors.
        rank: Rank of the low-rank part of every triangular tensor; None: what pays.
        align: One of ALIGNMENTS.
        rate: Bits per weight to expect.

    Raises:
        BudgetError: Objects would be more than a reader takes.
    """
    out = dict(recipe.aligned)
    known = {
        g.tensor.name: g.tensor
        for g in groups
        if (a := out.get(g.tensor.name)) and a.layer and not a.layer.transposed and not a.layer.experts
    }
    if align == "identity":
        out |= {name: _plain(out[name]) for name in known}
    elif align in ("auto", "pca"):
        for names in _sharing({name: out[name] for name in known}).values():
            out |= _turned(known, out, names, recipe.states, rate, align == "auto")
    for name, t in known.items():
        a = out[name]
        if a.alignment == "triangular" and rank != 0:
            w = matrix_of(t)
            out[name] = replace(a, rank=choose_rank(w, a, rate) if rank is None else min(rank, *w.shape))
    return _bounded(replace(recipe, aligned=out))


def _bounded(recipe: Recipe) -> Recipe:
    """The recipe; BudgetError where its objects are larger than the limit of readers."""
    size = 0
    for name, a in recipe.aligned.items():
        if a.basis is not None and a.basis.first == name:
            size += 4 * len(a.scales.cols) ** 2
        size += 4 * a.rank * (len(a.scales.rows) + len(a.scales.cols))
    if size > Limits().objects:
        raise BudgetError(f"matrices beside the tensors would take {size} bytes of memory, more than readers allow")
    return recipe


def _plain(a: Aligned) -> Aligned:
    """Without steps of columns and feedback; its errors cost on average what they did."""
    assert a.layer is not None  # noqa: S101
    s = np.asarray(damped(a.layer.second, a.damp))
    base = a.base + _unit(a) - 0.5 * float(exact.log2(np.diag(s).mean()))
    return replace(a, base=base, scales=replace(a.scales, cols=np.zeros_like(a.scales.cols)), alignment="identity")


def _unit(a: Aligned) -> float:
    """log2 of the unit of a column that counts 1, less `base`."""
    assert a.layer is not None  # noqa: S101
    return _middle(triangular(a.layer.second, a.damp).weight)


def _sharing(aligned: Mapping[str, Aligned]) -> dict[tuple[bytes, float], list[str]]:
    """Names by the input that their layers share."""
    out: dict[tuple[bytes, float], list[str]] = {}
    for name, a in aligned.items():
        assert a.layer is not None  # noqa: S101
        second = np.ascontiguousarray(a.layer.second)
        out.setdefault((zstd.digest(second.view(np.uint8).reshape(-1).data), a.damp), []).append(name)
    return out


def _turned(
    known: Mapping[str, SourceTensor],
    aligned: Mapping[str, Aligned],
    names: Sequence[str],
    states: int,
    rate: float,
    auto: bool,
) -> dict[str, Aligned]:
    """Tensors of one input in their principal directions; with `auto` only where that pays for the basis."""
    n = len(aligned[names[0]].scales.cols)
    rows = sum(len(aligned[name].scales.rows) for name in names)
    if auto and (rows < TALL * n or _saved(known, aligned, names, rate) <= 0):
        return {}
    a = aligned[names[0]]
    assert a.layer is not None  # noqa: S101
    s, found = damped(a.layer.second, a.damp), basis_of(names[0], a, rows, states)
    u = found.object.values.astype(np.float64)
    weight = np.sqrt(np.einsum("ij,ij->i", u @ s, u))  # of the directions that a decoder has
    cols = _exponents(-4 * (np.log2(weight) - _middle(weight)))
    return {
        name: replace(
            b,
            base=b.base + _unit(b) - _middle(weight),
            scales=replace(b.scales, cols=cols),
            alignment="pca",
            basis=found,
        )
        for name in names
        if (b := aligned[name])
    }


def basis_of(name: str, a: Aligned, rows: int, states: int) -> Basis:
    """The quantised basis of the inputs of an aligned tensor `name`, for `rows` rows of weights that share it.

    An error e of direction j adds e S e^T to the lam_j that an error of column j costs: it may add a share of it, which
    is the one of the fewest bits (half a log2 of it for each of the n^2 entries against HARM times it for each of
    rows x n), but no more than COARSE.
    """
    assert a.layer is not None  # noqa: S101
    p, r = pca(a.layer.second, a.damp), triangular(a.layer.second, a.damp)
    n = len(p.weight)
    scale = 0.5 * math.log2(_share(n, rows) / (n * CELL)) + _middle(p.weight) - _middle(r.weight)
    weight = r.by_column
    by_row = 4 * (np.log2(p.weight) - _middle(p.weight))
    by_col = -4 * (np.log2(weight) - _middle(weight))
    return Basis(_object(f"{name}.U", p.basis, scale, by_row, by_col, states, r), name)


def _share(n: int, rows: int) -> float:
    return min(COARSE, n / rows / (2 * math.log(2) * HARM))


def _saved(
    known: Mapping[str, SourceTensor], aligned: Mapping[str, Aligned], names: Sequence[str], rate: float
) -> float:
    """Bits that PCA saves against triangular alignment at equal error, those of the basis taken off."""
    a = aligned[names[0]]
    assert a.layer is not None  # noqa: S101
    p, r = pca(a.layer.second, a.damp), triangular(a.layer.second, a.damp)
    n, total, saved = len(p.weight), 0, 0.0
    for name in names:
        b = aligned[name]
        w = matrix_of(known[name]) / trellis.power(b.scales.rows)[:, None].astype(np.float64)
        level = 2.0 ** (b.base - rate + _middle(r.weight))
        saved += _bits(w[:, r.order], r.weight, level) - _bits(w @ p.basis.T, p.weight, level)
        total += len(w)
    share = _share(n, total)
    return saved - n * n * (0.15 - 0.5 * math.log2(share)) - HARM * share * n * total - HEADS / 2
