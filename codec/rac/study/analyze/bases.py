"""A linear layer in several bases: y = W x = V (T x) with V = W T^-1.

Rotations are those of the papers. Columns of W are rotated, since this is what a rotation of the residual stream does
to the weights that read it, and an online Hadamard matrix to the others (QuaRot, arXiv 2404.00456; SpinQuant, arXiv
2405.16406); the gain of the norm in front is fused first, as there, where the architecture is known. "hadamard2"
rotates rows too, as QuaRot does to what writes the residual stream, and QuIP# (arXiv 2402.04396) to every layer.
Quantised are V's columns by steps that are inverse to `weight`: the root of what a unit error of each costs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.align import Pca, pca
from rac.errors import SourceError
from rac.linalg.transform import Transform
from rac.linalg.triangular import Triangular, damped, triangular
from rac.records import Online

Array = NDArray[Any]
F32 = np.float32
SEED = 0  # seed of the signs of the Hadamard matrix of the inputs; that of the outputs has the next
NAMES = {
    "original": "original",
    "hadamard": "Hadamard, inputs",
    "hadamard2": "Hadamard, both sides",
    "hadamard-feedback": "Hadamard + error feedback",
    "pca": "PCA of the inputs",
    "triangular": "triangular (RAC)",
}
"""For people; learned rotations have the names they were given."""
TEXTS = {
    "original": "The weights as they are, one step for all.",
    "hadamard": "Columns rotated by a randomised Hadamard matrix (QuaRot's R1, or its online maps), the gain of the "
    "norm in front fused first where the architecture is known; one step for all.",
    "hadamard2": "The same, and rows rotated by another one (QuIP#; QuaRot for what writes the residual stream).",
    "hadamard-feedback": "Columns rotated, then quantised one after the other with errors fed back, one step for all "
    "(QuaRot with GPTQ).",
    "pca": "Coordinates are the principal directions of the layer's inputs, steps inverse to the root of their energy. "
    "A file needs this basis: n x n numbers for each input.",
    "triangular": "The columns as they are, errors fed back through the Cholesky factor L of the inputs' second "
    "moment, steps inverse to L_jj (WaterSIC, arXiv 2603.04956). A file needs nothing more.",
}
ALIGNED = ("pca", "triangular")  # those that follow the inputs


@dataclass(frozen=True, slots=True)
class Basis:
    """A matrix in one basis, and what errors cost there."""

    id: str
    matrix: NDArray[np.float32]  # (R, C) V
    weight: NDArray[np.float64]  # (C,) what steps are inverse to
    second: Array  # (C, C), or (C,) where it is diagonal: second moment of T x
    cost: float  # mean cost of an error of one step, 1 / weight, in each element: less where errors are fed back
    recursion: Triangular | None = None
    whitened: NDArray[np.float32] | None = None  # (R, C) with the singular values of the outputs; None: `coded` has
    entries: int = 0  # numbers that a file must hold for this basis alone

    @property
    def coded(self) -> NDArray[np.float32]:
        """(R, C) in units of the steps: what the quantiser sees, but for what is fed back."""
        if (self.weight == 1).all():
            return self.matrix
        return np.asarray(self.matrix * self.weight.astype(F32))

    def output(self, e: Array) -> float:
        """tr(E S E^T) of an error, or the matrix itself, (R, C) in these coordinates."""
        if self.second.ndim == 1:
            return float(np.einsum("ij,ij->j", e, e, dtype=np.float64) @ self.second)
        return float(np.vdot(e @ self.second, e))

    def shares(self) -> NDArray[np.float64]:
        """(C,) energies that each coordinate would give the outputs by itself: |V_j|^2 E[(T x)_j^2]."""
        s = self.second if self.second.ndim == 1 else np.diag(self.second)
        return np.asarray(np.einsum("ij,ij->j", self.matrix, self.matrix, dtype=np.float64) * s)


@dataclass(frozen=True, slots=True)
class Rotations:
    """Learned rotations of one file: R1 of the residual stream, R2 of the values of each layer's heads."""

    name: str
    r1: NDArray[np.float32]  # (hidden, hidden): what reads the stream has W R1^T, its input is R1 x
    r2: Mapping[str, NDArray[np.float32]]  # by layer: (head, head), of the output projection's inputs, head by head


def read_rotations(path: str, name: str) -> Rotations:
    """Rotations that `rac.methods.rotations` has learned: a .rac file that carries them, or a file of theirs alone."""
    from rac.methods.rotations import load

    found = load(path)
    return Rotations(name, found.r1.astype(F32), {str(i): r.astype(F32) for i, r in enumerate(found.r2)})


def turned(x: Array, seed: int) -> Array:
    """Multiply x (..., n) by the randomised Hadamard matrix, (D H^T) on the right."""
    n = x.shape[-1]
    return np.asarray(Transform(Online("hadamard/1", n, 1, seed), n).apply(x))


def _both(x: Array, seed: int) -> NDArray[np.float32]:
    """H D x D H^T of a symmetric matrix."""
    return np.ascontiguousarray(turned(turned(x, seed).T, seed), F32)


def _blocks(x: Array, r: Array) -> Array:
    """Multiply x (..., a * h) by I_a (x) R^T."""
    return (x.reshape(-1, len(r)) @ r.T).reshape(x.shape)


def _mean_cost(second: Array) -> float:
    return float(np.diag(second).mean(dtype=np.float64)) if second.ndim == 2 else float(second.mean())


class Inputs:
    """What is known of the C = `width` inputs of matrices that share them; what is made of it is made once.

    `fit` is their second moment (C, C), from which bases are made, `judge` that on other text, by which errors are
    measured; both None: not known, errors of weights count. `gain` (C,) is that of the norm in front; one with an
    element near 0 is not fused. `damp` is as in `rac.linalg.triangular`.
    """

    def __init__(self, width: int, fit: Array | None, judge: Array | None, gain: Array | None, damp: float) -> None:
        self.width, self.damp = width, damp
        self.fit: Any = fit
        self.judge: Any = judge
        near = gain is None or float(np.abs(gain).min()) <= 1e-6 * float(np.abs(gain).max())
        self.gain = None if near or gain is None else gain.astype(np.float64)

    def without_gain(self, second: Array) -> Array:
        """(C, C) of what stands behind the norm but for its gain."""
        return second if self.gain is None else np.asarray(second / np.outer(self.gain, self.gain))

    def fused(self, w: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weight with the gain."""
        return w if self.gain is None else np.asarray(w * self.gain.astype(F32))

    @functools.cached_property
    def plain(self) -> Array:
        """(C, C) that judges behind a gain; of no known inputs what an error of a weight is worth."""
        return self.without_gain(np.eye(self.width) if self.judge is None else self.judge)

    @functools.cached_property
    def turned(self) -> Array:
        """`plain` of inputs behind a Hadamard matrix; (C,) where it is diagonal."""
        if self.judge is None and self.gain is None:
            return np.ones(self.width)
        return _both(self.plain, SEED)

    @functools.cached_property
    def feedback(self) -> Triangular:
        """The recursion behind a Hadamard matrix."""
        return triangular(_both(self.without_gain(damped(self.fit, self.damp)), SEED), 0.0)

    @functools.cached_property
    def triangular(self) -> Triangular:
        """The recursion of the columns as they are."""
        return triangular(self.fit, self.damp)

    @functools.cached_property
    def pca(self) -> tuple[Pca, NDArray[np.float32]]:
        """Principal directions, and `judge` in their coordinates."""
        p = pca(self.fit, self.damp)
        return p, _conjugate(p.basis.astype(F32), self.judge)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix and what is known of its place in the model."""

    w: NDArray[np.float32]  # (R, C)
    inputs: Inputs
    layer: str = ""  # number of the layer, as text
    values: bool = False  # whether it reads the values of the heads
    reads: bool = False  # whether it reads the residual stream


def bases(m: Matrix, rotations: Sequence[Rotations] = ()) -> list[Basis]:
    """The matrix in every basis that its inputs allow: without a second moment no aligned ones, and no feedback.

    With a gain and no second moment an error behind the gain counts as the one of the weight that it comes to.
    """
    w, x, one = m.w, m.inputs, np.ones(m.w.shape[1])
    judge: Array = one if x.judge is None else x.judge
    out = [Basis("original", w, one, judge, _mean_cost(judge))]
    v, cost = turned(x.fused(w), SEED), _mean_cost(x.turned)
    out.append(Basis("hadamard", v, one, x.turned, cost))
    out.append(Basis("hadamard2", np.ascontiguousarray(turned(v.T, SEED + 1).T), one, x.turned, cost))
    out += [_learned(m, r) for r in rotations]
    if x.fit is None or x.judge is None:
        return out
    t = x.feedback
    out.append(Basis("hadamard-feedback", v, one, x.turned, float(np.square(t.weight).mean()), t))
    p, second = x.pca
    found = w @ p.basis.astype(F32).T
    whitened = np.asarray(found * p.weight.astype(F32))
    out.append(Basis("pca", found, p.weight, second, 1.0, None, whitened, len(one) ** 2))
    t = x.triangular
    out.append(Basis("triangular", w, t.by_column, judge, 1.0, t, whitened))
    return out


def _conjugate(u: Array, s: Array) -> NDArray[np.float32]:
    return np.asarray(u @ s @ u.T, F32)


def _learned(m: Matrix, r: Rotations) -> Basis:
    """The matrix behind learned rotations; the Hadamard matrix where the file has none for its inputs."""
    x, c = m.inputs, m.w.shape[1]
    v = x.fused(m.w)
    r2 = r.r2.get(m.layer) if m.values else None
    if m.reads:
        if len(r.r1) != c:
            raise SourceError(f"R1 of rotation {r.name!r} is of {len(r.r1)} inputs, the residual stream has {c}")
        v, s = v @ r.r1.T, _conjugate(r.r1, x.plain)
    elif r2 is not None and c % len(r2) == 0:
        v, s = _blocks(v, r2), _blocks(_blocks(x.plain, r2).T, r2)
    else:
        v, s = turned(v, SEED), x.turned
    return Basis(r.name, np.ascontiguousarray(v, F32), np.ones(c), np.asarray(s, F32), _mean_cost(s))


def exponents(weight: Array) -> tuple[NDArray[np.int8], float]:
    """Steps inverse to `weight` as the format has them: quarter octaves, and log2 of the step where they are 0."""
    logs = np.log2(weight)
    middle = float(logs.mean())
    return np.clip(np.rint(-4 * (logs - middle)), -60, 60).astype(np.int8), -middle
