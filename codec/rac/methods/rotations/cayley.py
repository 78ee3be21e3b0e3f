"""Gradient descent on orthogonal matrices by the Cayley transform.

Li, Fuxin and Todorovic: Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform, ICLR 2020,
arXiv 2002.01113: algorithms 1 (SGD with momentum) and 2 (Adam), for square matrices. SpinQuant learns its rotations by
the former.

With a direction M at the orthogonal X, W = A - A^T, A = M X^T - X (X^T M X^T) / 2, is skew-symmetric, and

    Y(a) = (I - a W / 2)^-1 (I + a W / 2) X

is a curve of orthogonal matrices through X with Y'(0) = W X. The paper approximates it by two fixed-point iterations,
for matrices whose inverse is too dear. Here the system is solved: for the sizes of rotations it costs less than what
finds the gradient, and matrices stay orthogonal to machine precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Q = 0.5
"""The paper's q: a step is at most 2 q / |W|."""
BETAS = 0.9, 0.99
"""Decay of the mean of gradients, and of the mean of their squared lengths."""
_TINY = 1e-8


def skew(m: Any, x: Any) -> Any:
    """(..., n, n) W of a direction m (..., n, n) at the orthogonal matrix x (..., n, n)."""
    mx = m @ x.mT
    a = mx - x @ (x.mT @ mx) / 2
    return a - a.mT


def cayley(x: Any, w: Any, step: Any) -> Any:
    """The point at `step` (a number, or (..., 1, 1)) of the curve through x (..., n, n) with skew-symmetric w."""
    import torch

    half = w * (step / 2)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(eye - half, x + half @ x)


class _Cayley:
    """Matrices of a batch (..., n, n), each with a step length of its own."""

    def __init__(self, params: Sequence[Any], lr: float) -> None:
        if lr <= 0:
            raise ValueError("lr must be above 0")
        self.params, self.lr, self._steps = list(params), lr, 0
        self._directions: list[Any] = [0.0] * len(self.params)

    def step(self) -> None:
        """Move every matrix along its gradient, and forget the gradient."""
        import torch

        self._steps += 1
        with torch.no_grad():
            for i, x in enumerate(self.params):
                w, r = self._way(i, x)
                self._directions[i] = r * (w @ x)
                norm = w.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)  # the largest sum of a column
                x.copy_(cayley(x, w, (2 * Q / (norm + _TINY)).clamp(max=self.lr)))
                x.grad = None

    def _way(self, i: int, x: Any) -> tuple[Any, Any]:
        """Skew-symmetric W of matrix `i`, and the factor that makes W x the direction that is remembered."""
        raise NotImplementedError


class CayleySGD(_Cayley):
    """Algorithm 1: SGD with `momentum`, the share of the last direction that is kept.

    `params` are orthogonal matrices (..., n, n), leaves that gradients are taken of; float64 keeps them orthogonal
    best. `lr` is the longest step.
    """

    def __init__(self, params: Sequence[Any], lr: float, momentum: float = 0.0) -> None:
        super().__init__(params, lr)
        if not 0 <= momentum < 1:
            raise ValueError("momentum must be from 0 to below 1")
        self.momentum = momentum

    def _way(self, i: int, x: Any) -> tuple[Any, Any]:
        return skew(self.momentum * self._directions[i] - x.grad, x), 1


class CayleyAdam(_Cayley):
    """Algorithm 2: the direction is divided by the root of the mean squared length of gradients."""

    def __init__(self, params: Sequence[Any], lr: float) -> None:
        super().__init__(params, lr)
        self._squares: list[Any] = [0.0] * len(self.params)

    def _way(self, i: int, x: Any) -> tuple[Any, Any]:
        first, second = BETAS
        m = first * self._directions[i] + (first - 1) * x.grad
        square = x.grad.square().sum((-2, -1), keepdim=True)
        self._squares[i] = second * self._squares[i] + (1 - second) * square
        mean = self._squares[i] / (1 - second**self._steps)
        r = (1 - first**self._steps) * (mean + _TINY**2).sqrt()
        return skew(m, x) / r, r
