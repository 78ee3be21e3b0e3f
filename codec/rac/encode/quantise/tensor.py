"""One tensor of a recipe quantised and coded: what a worker does."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.layers import Layer
from rac.container import zstd
from rac.encode import record, ties
from rac.encode.align.recipe import Recipe, matrix_of
from rac.encode.code.plan import LEVELS, parted
from rac.encode.encoded import Encoded, Fidelity, decoded
from rac.encode.options import DECIBELS
from rac.encode.quantise import trellis as lossy
from rac.encode.sources import SourceTensor
from rac.encode.split import objects as split
from rac.linalg import exact
from rac.native import product
from rac.stages import trellis
from rac.stages.words import DTYPES, from_words

CLOSE = 0.9  # share of the bytes that lossless coding is thought to take from which on it is tried
ODD = 0.25  # the same where these are fewer than half of its bytes: what repeats or has few values is hard to foretell
SLIGHT = 256  # share of a tensor's bytes, one in so many, that is not worth a loss
FINE = -7.0  # scale below which there may be more outliers than a lossless tensor has bytes
CHUNK = 8192  # numbers that numpy widens and sums at once
PIECE = 1 << 20  # numbers of a matrix that are measured at once
PRODUCTS, FEWEST = (
    1 << 35,
    256,
)  # multiply-adds that measuring a matrix takes at most, and outputs that it looks at then
SHAPED = 32  # states of the trellis where errors of rows are fed back: every state carries its own


@dataclass(frozen=True, slots=True)
class Coded:
    """A quantised tensor."""

    quantised: lossy.Quantised  # by trellis/1: the tensor, or what the objects leave to it
    dtype: str
    objects: tuple[split.Object, ...]  # what a third stage computes with

    @property
    def dense(self) -> NDArray[Any]:
        """(R, C) words of the data type: what a decoder restores. Decoded anew each time."""
        return split.after(self.quantised.dense, self.dtype, self.objects)


def code(t: SourceTensor, recipe: Recipe) -> Coded:
    """Quantise a tensor of the recipe."""
    a, effort = recipe.aligned[t.name], replace(recipe.effort, coder=parted(recipe.coder, t.shape))
    columns = a.columns()  # first: no more memory than this takes while nothing else is there
    w, dtype, objects = split.before(t, recipe)
    below = None if (rows := a.rows()) is None else rows.feed
    scale = a.base + recipe.scale
    if a.zeros:
        effort, scale = replace(effort, states=1, sparse=True), scale + lossy.ALONE
    elif below is not None:
        effort = replace(effort, states=SHAPED)
    q = lossy.quantise(w, dtype, scale, a.scales, effort, columns, below)
    return Coded(q, t.dtype, objects)


def encode(group: ties.Group, recipe: Recipe, measured: bool = True) -> Encoded:
    """Quantise a tensor of the recipe; the result is all that is written of it, its SNR NaN unless `measured`."""
    e, dense = encode_with_words(group, recipe)
    return measure(e, group.tensor, recipe, dense) if measured and e.fidelity else e


def measure(e: Encoded, t: SourceTensor, recipe: Recipe, dense: NDArray[Any] | None = None) -> Encoded:
    """A quantised tensor with its SNR, which costs products as large as those of the search; the words are decoded."""
    start = time.perf_counter()
    w, restored = matrix_of(t), from_words(decoded(e) if dense is None else dense, t.dtype)
    ratio, zeros = _ratio(w, restored, recipe.aligned[t.name].layer), np.count_nonzero(restored[w == 0])
    assert e.fidelity is not None  # noqa: S101 - it was quantised
    seconds = e.fidelity.seconds + time.perf_counter() - start
    return replace(e, fidelity=replace(e.fidelity, snr=ratio, zeros=int(zeros), seconds=seconds))


def _words(t: SourceTensor, like: NDArray[Any]) -> NDArray[Any]:
    """The words of a tensor in the shape and type of others."""
    return t.read(0, t.nbytes).view(like.dtype).reshape(like.shape)


def encode_with_words(group: ties.Group, recipe: Recipe) -> tuple[Encoded, NDArray[Any]]:
    """A quantised tensor, not measured, or lossless where that is no larger, and the words (R, C) of a decoder."""
    start, t = time.perf_counter(), group.tensor
    a = recipe.aligned[t.name]
    size = record.estimate(t, recipe.lossless) if a.lossless is None else a.lossless
    if recipe.scale < FINE and _apart(t, recipe) > size:  # no need to quantise it to see that it takes more
        words = t.read(0, t.nbytes).view(f"<u{DTYPES[t.dtype].itemsize}")
        return record.whole(group, recipe.lossless), words.reshape(len(a.scales.rows), -1)
    coded = code(t, recipe)
    dense, q = coded.dense, coded.quantised
    plan, units = q.coded()
    uses = tuple(o.encoded.name for o in coded.objects)
    digest = zstd.digest(dense.reshape(-1).view(np.uint8).data)
    behind = record.Behind(q.trellis, digest, ties.digest(t), split.product_of(coded.objects), uses, a.name)
    objects = (*(o.encoded for o in coded.objects), *record.matrix_of(t, LEVELS["default"]))
    seconds = time.perf_counter() - start
    counts = {"outliers": q.outliers, "dead": q.dead, "lossless": size}
    fidelity = Fidelity(t.name, t.shape, a.name, a.rank, q.trellis.states, math.nan, **counts, seconds=seconds)
    e = record.encoded(group, plan, [bytes(unit) for unit in units], behind, objects, fidelity)
    most = size_of(e, recipe) + t.nbytes // SLIGHT
    if most >= size * (CLOSE if 2 * size > t.nbytes else ODD):
        exact = record.whole(group, recipe.lossless)
        if exact.size <= most:
            return exact, _words(t, dense)
    return e, dense


def _apart(t: SourceTensor, recipe: Recipe) -> int:
    """About the bytes that the outliers of a tensor take which nothing else is in the way of: the least it takes."""
    a = recipe.aligned[t.name]
    if a.rank or a.basis is not None:
        return 0
    scale, far = a.base + recipe.scale + bool(a.zeros) * lossy.ALONE, lossy.far(1 if a.zeros else recipe.states)
    most = far * exact.exp2(max(scale, -60)) * trellis.power(a.scales.rows)[:, None] * trellis.power(a.scales.cols)
    return (8 + DTYPES[t.dtype].itemsize) * int(np.count_nonzero(np.abs(matrix_of(t)) > most))


def size_of(e: Encoded, recipe: Recipe) -> int:
    """Bytes of a quantised tensor and its objects; an object that tensors share counts with the first of them."""
    basis = recipe.aligned[e.name].basis
    own = e.head.get("uses", ()) if basis is None or basis.first == e.name else ()
    return e.size + sum(o.size for o in e.objects if o.name in own)


def snr(t: SourceTensor, dense: NDArray[Any], recipe: Recipe) -> float:
    """Output signal to noise of restored words (R, C), dB: tr(W S W^T) / tr(E S E^T); S is 1 where none is known."""
    return _ratio(matrix_of(t), from_words(dense, t.dtype), recipe.aligned[t.name].layer)


def _ratio(w: NDArray[np.float32], restored: NDArray[np.float32], layer: Layer | None) -> float:
    if layer is None:
        energy, error = _energies(w, restored, None)
    else:
        energy = error = 0.0
        each = layer.experts or (layer,)
        for one, a, b in zip(each, np.split(w, len(each)), np.split(restored, len(each)), strict=True):
            second = np.ascontiguousarray(one.second, np.float32)
            if layer.transposed:
                a, b = a.T, b.T
            if len(a) > (few := max(FEWEST, PRODUCTS // second.size)):  # else it takes longer than all that was done
                at = np.arange(few) * len(a) // few
                a, b = a[at], b[at]
            more = _energies(a, b, second)
            energy, error = energy + more[0], error + more[1]
    return DECIBELS / 2 * float(exact.log2(energy / error)) if error > 0 and energy > 0 else math.inf


def _energies(
    w: NDArray[np.float32], restored: NDArray[np.float32], second: NDArray[np.float32] | None
) -> tuple[float, float]:
    """tr(W S W^T) and the same of the errors, in numpy's order of additions; S is 1 where there is none."""
    energy, error = np.float64(0), np.float64(0)
    step = CHUNK // math.gcd(CHUNK, w.shape[1])  # rows of whole chunks, which numpy sums one after the other
    step *= max(1, PIECE // (step * w.shape[1]))
    for at in range(0, len(w), step):
        a = np.ascontiguousarray(w[at : at + step])
        e = np.ascontiguousarray(restored[at : at + step]) - a
        energy, error = _energy(a, second, energy), _energy(e, second, error)
    return float(energy), float(error)


def _energy(a: NDArray[np.float32], second: NDArray[np.float32] | None, before: np.float64) -> np.float64:
    """What is `before`, and tr(A S A^T)."""
    if second is None:
        out = a * a
    else:
        product.add(out := np.zeros_like(a), a, second)
        out *= a
    return np.float64(np.add.reduce(out.reshape(-1), dtype=np.float64, initial=before))
