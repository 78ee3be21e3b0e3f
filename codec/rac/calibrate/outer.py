"""Second moments of the gradients at the outputs of a layer, and what of them is chance.

Batches of a text are samples of it: what is off the diagonal and not chance is there in all of them. By how much the
batches' own squares are above what that alone would give, it is drawn to 0 (Ledoit and Wolf, A well-conditioned
estimator for large-dimensional covariance matrices, 2004, with a diagonal target).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDEST = 2  # times as many outputs as inputs, beyond which none are kept: they would be most of a calibration
FEWEST = 0.5  # share of what is off the diagonal that is to be no chance
_ROWS = 64  # rows that are looked at once


def size(outputs: int, inputs: int) -> int:
    """Bytes of the second moment that is kept of a layer's outputs; 0 where none is."""
    return 4 * outputs**2 if outputs <= WIDEST * inputs else 0


@dataclass(slots=True)
class Outer:
    """The sum of g g^T over tokens: of one batch, or of many one after the other."""

    total: NDArray[np.float32]  # (out, out)
    chance: float  # sum over batches of the squares off the diagonal of each
    batches: int = 1

    @classmethod
    def of(cls, total: NDArray[np.float32]) -> Outer:
        """The sum of one batch."""
        return cls(total, _squares(total))

    def plus(self, other: Outer) -> Outer:
        """The sum with that of the batches that follow, which is used up."""
        with np.errstate(all="ignore"):  # not finite is told by the result
            total = np.add(self.total, other.total, other.total)
        return Outer(total, self.chance + other.chance, self.batches + other.batches)

    @property
    def share(self) -> float:
        """Share of what is off the diagonal that is no chance, 0 to 1; 0 where one batch cannot tell."""
        every, n = _squares(self.total), self.batches
        if n < 2 or not (0 < every < math.inf):
            return 0.0
        return min(1.0, max(0.0, (1 - self.chance / every) * n / (n - 1)))

    def mean(self, tokens: int) -> NDArray[np.float32] | None:
        """(out, out) mean over so many tokens, drawn to its diagonal by what is chance; None where most of it is."""
        if (share := self.share) < FEWEST:
            return None
        out = self.total * np.float32(share / tokens)
        out[np.diag_indices_from(out)] = np.diag(self.total) / np.float32(tokens)
        return out


def _squares(total: NDArray[np.float32]) -> float:
    """Sum of the squares off the diagonal."""
    with np.errstate(all="ignore"):
        every = [np.square(total[a : a + _ROWS], dtype=np.float64).sum() for a in range(0, len(total), _ROWS)]
        return float(np.sum(every) - np.square(np.diag(total), dtype=np.float64).sum())
