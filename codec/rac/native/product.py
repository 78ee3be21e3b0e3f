"""Products in the one order of additions that the format allows, and numbers to words, through ctypes or in numpy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native

Array = NDArray[Any]
_n = ctypes.c_int64
_p = native._p


def add(t: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32], reference: bool = False) -> None:
    """t[i, j] += a[i, k] * b[k, j] for k = 0, 1, ..., each product and each sum rounded to binary32.

    Args:
        t: (h, w) float32, unit column stride; changed.
        a: (h, n) float32, unit column stride.
        b: (n, w) float32, unit column stride.
        reference: In numpy, whether the kernel is there or not.
    """
    lib = None if reference else native.library()
    if lib is not None:
        (h, w), n = t.shape, len(b)
        lib.rac_product(
            _p(t),
            _n(h),
            _n(w),
            _n(t.strides[0] // 4),
            _p(a),
            _n(a.strides[0] // 4),
            _p(b),
            _n(b.strides[0] // 4),
            _n(n),
        )
        return
    with np.errstate(all="ignore"):  # an infinity or a NaN is a result like any other
        for k in range(len(b)):
            t += a[:, k, None] * b[k]


def rounded(v: NDArray[np.float32], dtype: str, dst: Array) -> bool:
    """Contiguous numbers to as many words of the data type in `dst`; False where no kernel is there for it."""
    lib = native.library()
    if lib is None or dtype not in ("F32", "BF16"):
        return False
    lib.rac_round(_p(v), _n(v.size), _p(dst), ctypes.c_int(dst.itemsize))
    return True
