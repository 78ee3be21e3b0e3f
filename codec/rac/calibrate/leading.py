"""A second moment of many inputs while tokens come, as its leading directions and its diagonal.

Rows are gathered up to twice as many as are kept; then those of the largest singular values stay (an incremental
singular value decomposition), and what the others were leaves its diagonal. So the diagonal is exact but for rounding,
and a layer with fewer tokens than RANK is held as it is. Sums are made by torch in the order in which they are asked
for, where the tokens are: on a device there too, but for the decomposition of a matrix (2 RANK, 2 RANK).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

RANK = 64


@dataclass(frozen=True, slots=True, eq=False)
class Leading:
    """R^T R and a diagonal: tensors (k, n), k at most 2 RANK, and (n,), float32 where they were made."""

    rows: Any
    rest: Any

    @staticmethod
    def of(x: Any) -> Leading:
        """The sum of the outer products of rows (tokens, n)."""
        out = Leading(x[:0], torch.zeros(x.shape[1], device=x.device))
        for piece in x.split(RANK):
            out = out.plus(Leading(piece, torch.zeros_like(out.rest)))
        return out

    @staticmethod
    def from_array(array: NDArray[np.float32]) -> Leading:
        """What `array` made."""
        every = torch.from_numpy(array)
        return Leading(every[:-1], every[-1])

    @property
    def array(self) -> NDArray[np.float32]:
        """(k + 1, n): rows, and the diagonal."""
        return np.asarray(torch.cat([self.rows, self.rest[None]]).cpu().numpy())

    def plus(self, other: Leading) -> Leading:
        """The sum of both, whose order decides about the last bits."""
        return _cut(torch.cat([self.rows, other.rows]), self.rest + other.rest, 2 * RANK)

    def least(self) -> Leading:
        """What it is with no more than RANK rows."""
        return _cut(self.rows, self.rest, RANK)


def _cut(rows: Any, rest: Any, most: int) -> Leading:
    if len(rows) <= most:
        return Leading(rows, rest)
    gram = (rows @ rows.mT).cpu().numpy().astype(np.float64)
    if not np.isfinite(gram).all():  # told by the diagonal
        return Leading(rows[:RANK], rest + rows.square().sum(0))
    top = np.ascontiguousarray(np.linalg.eigh(gram)[1][:, -RANK:].T, np.float32)
    kept = torch.from_numpy(top).to(rows.device) @ rows
    lost = rows.square().sum(0) - kept.square().sum(0)
    return Leading(kept, rest + lost.clamp_(min=0))
