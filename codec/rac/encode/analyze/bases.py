"""A linear layer in several bases: y = W x = V (T x) with V = W T^-1.

Rotations are those of the papers. Rows of W are rotated on the input side, since this is what a rotation of the residual
stream does to the weights that read it, and an online Hadamard matrix to the others (QuaRot, arXiv 2404.00456;
SpinQuant, arXiv 2405.16406); the gain of the norm in front is fused first, as there, where the architecture is known.
"hadamard2" rotates outputs too, as QuaRot does to what writes the residual stream and QuIP# (arXiv 2402.04396) to every
layer. Quantised are V's columns by steps that are inverse to `weight`: the root of what a unit error of each costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.align import hadamard
from rac.align.pca import pca
from rac.align.triangular import Triangular, damped, triangular
from rac.errors import SourceError

Array = NDArray[Any]
F32 = np.float32
SEED = 0
"""Of the signs of inputs; outputs have the next."""
ORTHOGONAL = 1e-3
"""Most that R^T R of a given rotation may be off 1."""
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
    "hadamard": "Columns rotated by a randomised Hadamard matrix (QuaRot's R1, or its online maps), the gain of the norm "
    "in front fused first where the architecture is known; one step for all.",
    "hadamard2": "The same, and rows rotated by another one (QuIP#; QuaRot for what writes the residual stream).",
    "hadamard-feedback": "Columns rotated, then quantised one after the other with errors fed back, one step for all "
    "(QuaRot with GPTQ).",
    "pca": "Coordinates are the principal directions of the layer's inputs, steps inverse to the root of their energy. "
    "A file needs this basis: n x n numbers for each input.",
    "triangular": "The columns as they are, errors fed back through the Cholesky factor L of the inputs' second moment, "
    "steps inverse to L_jj (WaterSIC, arXiv 2603.04956). A file needs nothing more.",
}
ALIGNED = ("pca", "triangular")
"""Those that follow the inputs."""


@dataclass(frozen=True, slots=True)
class Basis:
    """A matrix in one basis, and what errors cost there."""

    id: str
    matrix: NDArray[np.float32]
    """(R, C) V."""
    weight: NDArray[np.float64]
    """(C,) what steps are inverse to."""
    second: Array
    """(C, C), or (C,) where it is diagonal: second moment of T x."""
    cost: float
    """Mean cost of an error of one step in each element, steps being 1 / weight: less where errors are fed back."""
    recursion: Triangular | None = None
    whitened: NDArray[np.float32] | None = None
    """(R, C) whose singular values are those of the outputs; None: those of `coded` are meant."""
    entries: int = 0
    """Numbers that a file must hold for this basis alone."""

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
        return np.einsum("ij,ij->j", self.matrix, self.matrix, dtype=np.float64) * s


@dataclass(frozen=True, slots=True)
class Rotations:
    """Learned rotations of one file: R1 of the residual stream, R2 of the values of each layer's heads."""

    name: str
    r1: NDArray[np.float32]
    """(hidden, hidden): what reads the stream has W R1^T, its input is R1 x."""
    r2: Mapping[str, NDArray[np.float32]]
    """By layer number: (head, head), of the inputs of the output projection, head by head."""


def read_rotations(path: str, name: str) -> Rotations:
    """A safetensors file with "R1" and, where wanted, "R2.<layer>".

    Raises:
        SourceError: It cannot be read, lacks R1, or holds a matrix that is not orthogonal.
    """
    from rac.decode.frameworks import to_framework
    from rac.encode.sources import open_source

    found: dict[str, Array] = {}
    for t in open_source(path).tensors:
        if t.name != "R1" and not t.name.startswith("R2."):
            continue
        r = np.asarray(to_framework(t.read(0, t.nbytes), t.dtype, t.shape, "np")).astype(F32)
        if r.ndim != 2 or r.shape[0] != r.shape[1] or not np.isfinite(r).all():
            raise SourceError(f"{t.name!r} is no square matrix of numbers", file=path)
        if (off := float(np.abs(r.T @ r - np.eye(len(r))).max())) > ORTHOGONAL:
            raise SourceError(f"{t.name!r} is no rotation: R^T R differs from 1 by {off:.1e}", file=path)
        found[t.name] = r
    if "R1" not in found:
        raise SourceError("holds no tensor 'R1'", file=path)
    return Rotations(name, found["R1"], {n[3:]: r for n, r in found.items() if n != "R1"})


def turned(x: Array, seed: int) -> Array:
    """x (..., n) times the randomised Hadamard matrix, (D H^T) on the right."""
    n = x.shape[-1]
    return np.asarray(hadamard.transform(x * hadamard.signs(seed, n), n))


def _both(x: Array, seed: int) -> NDArray[np.float32]:
    """H D x D H^T of a symmetric matrix."""
    return np.ascontiguousarray(turned(turned(x, seed).T, seed), F32)


def _blocks(x: Array, r: Array) -> Array:
    """x (..., a * h) times I_a (x) R^T."""
    return (x.reshape(-1, len(r)) @ r.T).reshape(x.shape)


def _gained(w: Array, second: Array, gain: Array | None) -> tuple[Array, Array]:
    """The weight with the gain of the norm in front, and the second moment without it."""
    if gain is None:
        return w, second
    g = gain.astype(np.float64)
    return (w * g.astype(F32)), np.asarray(second / np.outer(g, g))


def _mean_cost(second: Array) -> float:
    return float(np.diag(second).mean(dtype=np.float64)) if second.ndim == 2 else float(second.mean())


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix and what is known of its place in the model."""

    w: NDArray[np.float32]
    """(R, C)"""
    fit: NDArray[np.float32] | None
    """(C, C) second moment of the inputs, from which bases are made; None: not known, errors of weights count."""
    judge: NDArray[np.float32] | None
    """The same of other text, by which errors are measured."""
    gain: Array | None = None
    """(C,) of the norm in front."""
    layer: str = ""
    """Its number."""
    values: bool = False
    """Whether it reads the values of the heads."""
    reads: bool = False
    """Whether it reads the residual stream."""


def bases(m: Matrix, damp: float, rotations: tuple[Rotations, ...] = ()) -> list[Basis]:
    """The matrix in every basis that its inputs allow: without a second moment no aligned ones, and no feedback."""
    w, c = m.w, m.w.shape[1]
    one = np.ones(c)
    judge: Array = one if m.judge is None else m.judge
    out = [Basis("original", w, one, judge, _mean_cost(judge))]
    gain = m.gain if m.gain is not None and float(np.abs(m.gain).min()) > 1e-6 * float(np.abs(m.gain).max()) else None
    v, s = _gained(w, np.diag(one) if m.judge is None else m.judge, gain)
    v, s = turned(v, SEED), _both(s, SEED) if gain is not None or m.judge is not None else one
    out.append(Basis("hadamard", v, one, s, _mean_cost(s)))
    both = np.ascontiguousarray(turned(v.T, SEED + 1).T)
    out.append(Basis("hadamard2", both, one, s, _mean_cost(s)))
    for r in rotations:
        if (basis := _learned(m, r, gain)) is not None:
            out.append(basis)
    if m.fit is None or m.judge is None:
        return out
    fit = _both(_gained(w, damped(m.fit, damp), gain)[1], SEED)
    t = triangular(fit, 0.0)
    out.append(Basis("hadamard-feedback", v, one, s, float(np.square(t.weight).mean()), t))
    p = pca(m.fit, damp)
    turn = p.basis.astype(F32)
    coordinates = w @ turn.T
    out.append(
        Basis("pca", coordinates, p.weight, _conjugate(turn, m.judge), 1.0, None, coordinates * p.weight, entries=c * c)
    )
    t = triangular(m.fit, damp)
    out.append(Basis("triangular", w, t.by_column, m.judge, 1.0, t, out[-1].whitened))
    return out


def _conjugate(u: Array, s: Array) -> NDArray[np.float32]:
    return np.asarray(u @ s @ u.T, F32)


def _learned(m: Matrix, r: Rotations, gain: Array | None) -> Basis | None:
    """The matrix behind learned rotations; what no matrix of the file reaches has the Hadamard matrix in its place."""
    c = m.w.shape[1]
    v, s = _gained(m.w, np.eye(c) if m.judge is None else m.judge, gain)
    r2 = r.r2.get(m.layer) if m.values else None
    if m.reads and len(r.r1) == c:
        v, s = v @ r.r1.T, _conjugate(r.r1, s)
    elif r2 is not None and c % len(r2) == 0:
        v, s = _blocks(v, r2), _blocks(_blocks(s, r2).T, r2)
    elif m.reads:
        return None
    else:
        v, s = turned(v, SEED), _both(s, SEED)
    v, s = np.ascontiguousarray(v, F32), np.ascontiguousarray(s, F32)
    return Basis(r.name, v, np.ones(c), s, _mean_cost(s))


def exponents(weight: Array) -> tuple[NDArray[np.int8], float]:
    """Steps inverse to `weight` as the format has them: quarter octaves, and log2 of the step where they are 0."""
    logs = np.log2(weight)
    middle = float(logs.mean())
    return np.clip(np.rint(-4 * (logs - middle)), -60, 60).astype(np.int8), -middle


def finest(x: Array) -> float:
    """log2 of a step that is far below anything in x."""
    return math.log2(max(float(np.abs(x).max()), 1e-30)) - 40
