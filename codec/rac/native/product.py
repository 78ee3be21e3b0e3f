"""Products in the one order of additions that the format allows, and numbers to words, in C or numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library

Array = NDArray[Any]


def add(t: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32], reference: bool = False) -> None:
    """t[i, j] += a[i, k] * b[k, j] for k = 0, 1, ..., each product and each sum rounded to binary32.

    Args:
        t: (h, w) float32, unit column stride; changed.
        a: (h, n) float32, unit column stride.
        b: (n, w) float32, unit column stride.
        reference: In numpy, whether the kernel is there or not.
    """
    lib = None if reference else library()
    if lib is not None:
        lib.rac_product(t, a, b)
        return
    with np.errstate(all="ignore"):  # an infinity or a NaN is a result like any other
        for k in range(len(b)):
            t += a[:, k, None] * b[k]


def rounded(v: NDArray[np.float32], dtype: str, dst: Array) -> bool:
    """Contiguous numbers to as many words of the data type in `dst`; False where no kernel is there for it."""
    lib = library()
    if lib is None or dtype not in ("F32", "BF16"):
        return False
    lib.rac_round(v, v.size, dst, dst.itemsize)
    return True
