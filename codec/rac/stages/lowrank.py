"""A product of two thin matrices and a residual (format_spec/stages/lowrank.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.native import product


def join(
    v: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32], reference: bool = False
) -> NDArray[np.float32]:
    """V + A B in the order of section 3: v (h, w), which is changed and returned, a (h, r), b (r, w), float32.

    Rows of `v` go with those of `a`, columns with those of `b`, so that any part of the whole is to be had alone.
    """
    product.add(v, a, b, reference)
    return v
