"""The kernels of groups/1 and bits/1."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library

Array = NDArray[Any]


def numbers(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.uint8],
    group: int,
    first: int,
    dst: Array,
    dtype: str,
) -> int | None:
    """Codes (h, w) to words of the data type in `dst` (h, w), unit column stride.

    Args:
        codes: Contiguous.
        scales: (h, G) of the groups that the columns lie in, unit column stride.
        zeros: (h, G), unit column stride, or (1, 1): that of all.
        group: Columns of a group.
        first: Place of column 0 in its group.
        dst: Written to.
        dtype: "F32" or "BF16".

    Returns:
        The bits that occur in any code; None where no kernel is there for the type.
    """
    lib = library()
    if lib is None or dtype not in ("F32", "BF16"):
        return None
    return int(lib.rac_ungroup(codes, scales, zeros, dst, group, first, dst.itemsize))


def words(unit: NDArray[np.uint8], n: int, bits: int) -> NDArray[np.uint8] | None:
    """`n` words of `bits` bits out of the planes of a unit, contiguous and of the right size; None without a kernel."""
    lib = library()
    if lib is None:
        return None
    out = np.empty(n, np.uint8)
    lib.rac_unbits(unit, n, bits, out)
    return out
