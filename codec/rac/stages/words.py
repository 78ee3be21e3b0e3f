"""Binary32 numbers and the words of the data types that lossy stages restore."""

from __future__ import annotations

from typing import Any

import numpy as np

from rac.native import product
from rac.native.prototypes import F32, Array

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
QUIET = {"F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}  # the NaN that a computed one becomes


def from_words(words: Array, dtype: str) -> F32:
    """Words of F32, F16 or BF16, shape kept, as the binary32 numbers that they are."""
    if dtype == "BF16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view("<f4" if dtype == "F32" else "<f2").astype(np.float32)


def to_words(v: F32, dtype: str) -> Array:
    """Binary32 to words of the data type, to nearest, ties to even; any NaN to the quiet one."""
    bits: Array = v.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            bits = v.astype(np.float16).view(np.uint16)
    elif dtype == "BF16":
        bits = ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(v)
    return np.where(nan, bits.dtype.type(QUIET[dtype]), bits) if nan.any() else bits


def put_words(v: F32, dtype: str, dst: Array) -> None:
    """`to_words` of contiguous numbers into `dst`, contiguous words of their shape."""
    if not product.rounded(v, dtype, dst):
        dst[...] = to_words(v, dtype)
