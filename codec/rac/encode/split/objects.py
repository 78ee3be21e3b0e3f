"""Tensors that need objects: a part of low rank beside the trellis, or a basis behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.align import Pca
from rac.encode import record as rec
from rac.encode.align.recipe import Aligned, Recipe, matrix_of
from rac.encode.encoded import Encoded
from rac.encode.quantise import trellis as lossy
from rac.encode.sources import SourceTensor
from rac.grid import Box
from rac.linalg import exact
from rac.linalg.triangular import Triangular
from rac.split import low_rank
from rac.stages import products, trellis
from rac.stages.base import Product
from rac.stages.words import to_words

Array = NDArray[Any]
F32 = np.float32
SHORT = 64  # rows below which an object has no trellis: its lanes would be too short to gain anything
CELL = lossy.LAMBDA / (2 * math.log(2))  # mean squared error in squared units of a column of high rate
WIDE = 24  # most units that are the deviation of a row of B or a column of A
COARSE = 1 / 64  # most that the error of a basis may add to the output error, as a share of it
HARM = 4.5  # bits per weight that such a share costs, per share: weak directions are no longer free of strong ones


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
    first: str  # name of the first tensor that uses the basis: its bytes include those of the basis


def _object(name: str, w: Array, scale: float, scales: lossy.Scales, states: int, r: Triangular | None) -> Object:
    """Quantise an object (R, C) by a trellis, or at units that cost the same."""
    if len(w) < SHORT or states == 1:
        states, scale = 1, scale + lossy.ALONE
    q = lossy.quantise(np.ascontiguousarray(w, F32), "F32", scale, scales, lossy.Effort(states), r)
    return Object(rec.encoded_object(name, *q.coded(), q.trellis, q.digest), q)


def clipped(x: Array) -> NDArray[np.int8]:
    """Quarter octaves as the format has them."""
    return np.clip(np.rint(x), -trellis.MOST, trellis.MOST).astype(np.int8)


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
    return (None, products.Basis(), products.LowRank())[len(objects)]


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
    r, unit = a.triangular(), trellis.power(a.scales.rows)[:, None]
    left, right = low_rank(w / unit, a.second(), min(a.rank, *w.shape))
    weight, size = r.by_column, np.maximum(np.linalg.norm(left, axis=0), 1e-30)
    scale, middle = a.base + recipe.scale, exact.middle(size)
    one, rows = scale + exact.middle(weight), -4 * (np.log2(size) - middle)
    # What would leave the range of words is coarser: the residual makes up for it
    more = [np.maximum(0, 4 * (np.log2(size / math.sqrt(n) / WIDE) - one)) for n in w.shape]
    of_a = lossy.Scales(a.scales.rows, clipped(more[0]))
    of_b = lossy.Scales(clipped(rows + more[1]), inverse(weight))
    a_hat = _object(f"{name}.A", left * unit, one, of_a, recipe.states, None)
    return a_hat, _object(f"{name}.B", right, scale - middle, of_b, recipe.states, r)


def inverse(weight: Array) -> NDArray[np.int8]:
    """Quarter octaves of steps inverse to the weights."""
    return clipped(-4 * (np.log2(weight) - exact.middle(weight)))


def basis_of(name: str, p: Pca, r: Triangular, rows: int, states: int) -> Basis:
    """The quantised basis of an input, for `rows` rows of weights that share it, `name` the first of them.

    An error e of direction j adds e S e^T to the lam_j that an error of column j costs: it may add a share of it, which
    is the one of the fewest bits (half a log2 of it for each of the n^2 entries against HARM times it for each of
    rows x n), but no more than COARSE.
    """
    n, middle = len(p.weight), exact.middle(p.weight)
    scale = 0.5 * math.log2(share_of(n, rows) / (n * CELL)) + middle - exact.middle(r.weight)
    scales = lossy.Scales(clipped(4 * (np.log2(p.weight) - middle)), inverse(r.by_column))
    return Basis(_object(f"{name}.U", p.basis, scale, scales, states, r), name)


def share_of(n: int, rows: int) -> float:
    """What the error of a basis of n directions may add to the output error of so many rows, as a share of it."""
    return min(COARSE, n / rows / (2 * math.log(2) * HARM))
