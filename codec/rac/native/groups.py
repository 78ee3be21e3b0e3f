"""The kernels of groups/1 and bits/1 through ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native

Array = NDArray[Any]
_n = ctypes.c_int64
_i = ctypes.c_int
_p = native._p


def numbers(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.uint8] | None,
    zero: int,
    group: int,
    first: int,
    dst: Array,
    dtype: str,
) -> int | None:
    """Codes (h, w) to words of the data type in `dst` (h, w), unit column stride.

    Args:
        codes: Contiguous.
        scales: (h, G) of the groups that the columns lie in, unit column stride.
        zeros: The same, or None: `zero` is that of all.
        zero: Of all groups.
        group: Columns of a group.
        first: Place of column 0 in its group.
        dst: Written to.
        dtype: "F32" or "BF16".

    Returns:
        The bits that occur in any code; None where no kernel is there for the type.
    """
    lib = native.library()
    if lib is None or dtype not in ("F32", "BF16"):
        return None
    h, w = codes.shape
    step = 0 if zeros is None else zeros.strides[0]
    out: int = lib.rac_ungroup(
        _p(codes),
        _n(h),
        _n(w),
        _p(scales),
        _n(scales.strides[0] // 4),
        _p(zeros),
        _n(step),
        _i(zero),
        _n(group),
        _n(first),
        _p(dst),
        _i(dst.itemsize),
        _n(dst.strides[0] // dst.itemsize),
    )
    return out


def words(unit: NDArray[np.uint8], n: int, bits: int) -> NDArray[np.uint8] | None:
    """`n` words of `bits` bits out of the planes of a unit, contiguous and of the right size; None without a kernel."""
    lib = native.library()
    if lib is None:
        return None
    out = np.empty(n, np.uint8)
    lib.rac_unbits(_p(unit), _n(n), _i(bits), _p(out))
    return out
