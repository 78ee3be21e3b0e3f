"""A matrix in another basis of its columns (format_spec/stages/basis.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.native import product


def join(v: NDArray[np.float32], u: NDArray[np.float32], reference: bool = False) -> NDArray[np.float32]:
    """V U in the order of section 3: v (h, C), u (C, w), some or all columns of the basis, float32; returns (h, w)."""
    out = np.zeros((len(v), u.shape[1]), np.float32)
    product.add(out, v, u, reference)
    return out
