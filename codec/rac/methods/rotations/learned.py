"""An orthogonal transform of a layer's input axis, learned to cost the fewest bits at a given output error.

W' = W U^T is quantised instead of W, with U S U^T the second moment of its inputs. Columns are quantised with their
errors fed back (align/triangular.py): with steps inverse to the diagonal of the Cholesky factor the output error is the
same for every U as long as steps are small, and what U can change is the entropy of the coefficients alone.

The rate is differentiable: uniform noise in the place of rounding, and a mixture of logistic laws (Balle et al., arXiv
1611.01704; 1802.01436 for the scales). What is reported is not that rate: codes are really made and counted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rac.align import pca
from rac.errors import DivergedError
from rac.linalg import hadamard
from rac.linalg.triangular import Triangular, damped, triangular
from rac.methods.gptq import Floats
from rac.methods.rotations.cayley import CayleyAdam

Array = NDArray[np.float64]
Coordinates = tuple[Array, Array, Triangular]
"""Coefficients (R, C), the second moment (C, C) of what they are multiplied by, and the order of its columns."""
LR = 1.0
"""Longest step of Cayley Adam at the start; it falls linearly to 0."""
STORED = 16
"""Bits of an element of U in a file."""
SCALE = 8
"""Bits of the scale of a row or column."""
DAMP = 0.01
OCTAVES = 2
"""Classes of codes per octave of their expected scale."""
_COMPONENTS = 3
_NEAR = 0.002
"""How near, as a share, an error comes to the wanted one."""


class Axis(NamedTuple):
    """A learned transform."""

    u: Array
    """(C, C), orthogonal."""
    bits_saved: float
    """Bits that all codes together take less than those of W as it is, with feedback, at the same output error."""
    cost_bits: float
    """Bits that U takes in the file: nothing is gained unless `bits_saved` is more."""


def learn_axis(
    w: Floats,
    second: Floats,
    *,
    bits: float = 3.0,
    block: int | None = None,
    steps: int = 300,
    rows: int = 1024,
    seed: int = 0,
) -> Axis:
    """Learn U of a weight w (R, C) whose inputs have the second moment E[x x^T], (C, C), by `steps` of Cayley Adam.

    `bits` per weight of W as it is, with feedback, set the output error at which both are compared. U has blocks of
    `block` columns, a divisor of C, on its diagonal; None: one block. A step looks at so many `rows` of W, drawn anew
    for each by `seed`, as the noise is.

    DivergedError where the rate is no number, ValueError where `block` does not divide C.
    """
    wide, s = _checked(w, second)
    columns = wide.shape[1]
    block = block or columns
    if columns % block:
        raise ValueError(f"blocks of {block} do not divide {columns} columns")
    step, error, before = _at_bits(wide, s, bits)
    u = _learn(wide, damped(s, DAMP), step, block, steps, rows, seed)
    after = _at_error(_coordinates(wide, s, u), error, step)
    return Axis(u, (before - after) * wide.size, float(columns * block * STORED))


def compare_axes(
    w: Floats, second: Floats, u: Array | None = None, *, bits: float = 3.0, seed: int = 0
) -> dict[str, float]:
    """Bits per weight of w (R, C) at one output error, that of "triangular" at `bits`; no transform's own are in it.

    `second` (C, C) is E[x x^T] of the inputs. Steps of "original" are inverse to the root of each input's energy, and
    nothing is fed back; "triangular" are the same coordinates with feedback, "hadamard" those of a randomised Hadamard
    matrix of `seed`, with feedback, "pca" principal directions, in which feedback has nothing to do. "learned" is there
    where there is a `u`, with feedback.
    """
    wide, s = _checked(w, second)
    step, error, own = _at_bits(wide, s, bits)
    mixed = hadamard.matrix(wide.shape[1]) * hadamard.signs(seed, wide.shape[1])
    turned = {"hadamard": mixed, "pca": pca(s, DAMP).basis} | ({} if u is None else {"learned": u})
    plain = wide, s, triangular(np.diag(np.diag(s)), DAMP)
    out = {"original": _at_error(plain, error, step), "triangular": own}
    return out | {name: _at_error(_coordinates(wide, s, v), error, step) for name, v in turned.items()}


def _checked(w: Floats, second: Floats) -> tuple[Array, Array]:
    wide, s = np.asarray(w, np.float64), np.asarray(second, np.float64)
    if wide.ndim != 2 or s.shape != (wide.shape[1],) * 2:
        raise ValueError(f"a weight {wide.shape} and a second moment {s.shape} do not fit")
    if not np.isfinite(wide).all() or not np.isfinite(s).all() or not wide.any():
        raise ValueError("a weight of nothing but zeros, or NaN or infinity")
    return wide, s


def quantise(v: Array, t: Triangular, step: float) -> tuple[NDArray[np.int32], Array]:
    """Codes (R, C) and errors (R, C) of coefficients v (R, C), the step of place j being step / weight_j.

    Columns are taken in the order of `t`, from the last place to the first; errors are fed back.
    """
    target = np.ascontiguousarray(v[:, t.order].T)
    error, codes = np.zeros_like(target), np.empty(target.shape, np.int32)
    for j in range(len(target) - 1, -1, -1):
        wanted = target[j] - t.feed[j, j + 1 :].astype(np.float64) @ error[j + 1 :]
        width = step / t.weight[j]
        codes[j] = np.rint(wanted / width)
        error[j] = codes[j] * width - target[j]
    back = np.argsort(t.order)
    return codes[back].T, error[back].T


def coded_bits(codes: NDArray[np.int32]) -> float:
    """Bits of codes (R, C): by the entropy within classes of similar scale.

    Scales are counted too, and of the frequencies that are not 0 half a logarithm of the class's size each (Rissanen:
    Modeling by shortest data description, 1978).
    """
    z = codes.astype(np.float64)
    energy = z * z + 1e-3
    expected = np.log2(energy.mean(1))[:, None] + np.log2(energy.mean(0))[None] - math.log2(energy.mean())
    kind = np.rint(OCTAVES / 2 * expected).astype(np.int64)
    kind -= kind.min()
    symbol = codes.astype(np.int64) - codes.min()
    span = int(symbol.max()) + 1
    found, counts = np.unique(kind * span + symbol, return_counts=True)
    in_class = np.bincount(found // span, counts)[found // span]
    return float((counts * np.log2(in_class / counts) + np.log2(in_class) / 2).sum()) + SCALE * sum(codes.shape)


def _tried(at: Coordinates, step: float) -> tuple[float, float]:
    """Bits per weight, and output error."""
    v, s, t = at
    codes, error = quantise(v, t, step)
    return coded_bits(codes) / v.size, float(((error @ s) * error).sum())


def _coordinates(w: Array, s: Array, u: Array | None = None) -> Coordinates:
    v, turned = (w, s) if u is None else (w @ u.T, u @ s @ u.T)
    return v, turned, triangular(turned, DAMP)


def _at_bits(w: Array, s: Array, bits: float) -> tuple[float, float, float]:
    """Step, output error and bits per weight of W as it is, near `bits` per weight."""
    v, _, t = at = _coordinates(w, s)
    step = float(np.exp(np.log(np.maximum(np.abs(v[:, t.order]) * t.weight, 1e-30)).mean()))
    for _ in range(12):
        rate, error = _tried(at, step)
        if abs(rate - bits) < 0.01:
            break
        step *= 2 ** (rate - bits)
    return step, error, rate


def _at_error(at: Coordinates, error: float, step: float) -> float:
    """Bits per weight at which an output error is reached."""
    for _ in range(12):
        rate, found = _tried(at, step)
        if abs(found / error - 1) < _NEAR:
            break
        step *= math.sqrt(error / max(found, 1e-300))
    return rate + math.log2(found / error) / 2  # what little is left, at 6 dB per bit


def _learn(w: Array, s: Array, step: float, block: int, steps: int, rows: int, seed: int) -> Array:
    """(C, C) U, from the identity."""
    import torch

    columns = w.shape[1]
    blocks = torch.eye(block, dtype=torch.float64).repeat(columns // block, 1, 1).requires_grad_()
    weights, moment = torch.from_numpy(w).float(), torch.from_numpy(s)
    law = torch.zeros(2, _COMPONENTS, dtype=torch.float64)
    law[1] = torch.linspace(-2, 0, _COMPONENTS)
    law.requires_grad_()
    optimiser, laws = CayleyAdam([blocks], LR), torch.optim.Adam([law], 0.02)
    noise, order = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    for k in range(steps):
        chosen = torch.from_numpy(order.choice(len(w), min(rows, len(w)), replace=False))
        u = torch.block_diag(*blocks)
        weight = torch.linalg.cholesky(u @ moment @ u.mT).diagonal()
        loss = rate(weights[chosen] @ (u * (weight / step)[:, None]).float().mT, law.float(), noise)
        if not bool(torch.isfinite(loss)):
            raise DivergedError(f"learning an axis diverged at step {k + 1}: the rate is {float(loss)} (lr {LR:g})")
        loss.backward()
        optimiser.lr = LR * (1 - k / steps)
        optimiser.step()
        laws.step()
        laws.zero_grad()
    return np.asarray(torch.block_diag(*blocks.detach()).numpy())


def rate(z: Any, law: Any, noise: Any = None) -> Any:
    """Bits per coefficient of z (R, C), in steps, and what the error is worth beyond that of small steps.

    `z` is a torch tensor; `law` (2, K) are logits of the shares of K logistic laws, and the logarithms of their scales.
    `noise` is the generator of the noise; None: there is none.
    """
    import torch

    energy = z.square()
    mean = energy.mean()
    scale = (energy.mean(1, keepdim=True) * energy.mean(0, keepdim=True) / mean).clamp(min=1e-8)
    x = (z if noise is None else z + torch.rand(z.shape, generator=noise, dtype=z.dtype) - 0.5).abs()[..., None]
    spread = scale.sqrt()[..., None] * law[1].exp() + 0.05
    inside = torch.sigmoid((0.5 - x) / spread) - torch.sigmoid((-0.5 - x) / spread)
    bits = -((inside * torch.softmax(law[0], 0)).sum(-1).clamp(min=1e-9)).log2().mean()
    error = (scale / (12 * scale + 1)).mean()  # of a step's square: 1/12, less where all is rounded to 0
    return bits + 12 * error / (2 * math.log(2))
