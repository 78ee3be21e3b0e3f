"""Words of a tensor to symbols and bit planes and back, and codes of groups to numbers: C kernels, or numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library
from rac.native.prototypes import Array


def scan(words: Array, mask: int, shift: int, hist: NDArray[np.uint32]) -> int:
    """Add (word & mask) >> shift of all contiguous `words` to `hist`; returns the OR of all words."""
    lib = library()
    if lib is None:
        t = words.dtype.type
        hist += np.bincount(((words & t(mask)) >> t(shift)).ravel(), minlength=len(hist)).astype(np.uint32)
        return int(np.bitwise_or.reduce(words, axis=None)) if words.size else 0
    return int(getattr(lib, f"rac_scan{words.itemsize}")(words, words.size, mask, shift, hist))


def tops(words: Array, zero: int, sign: bool, shift: int) -> Array:
    """(magnitude of words >> zero) >> shift, dtype and shape kept."""
    t = words.dtype.type
    out: Array = ((words >> t(zero)) & t((1 << (words.itemsize * 8 - zero - sign)) - 1)) >> t(shift)
    return out


def symbols(words: Array, zero: int, sign: bool, shift: int, lut: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """lut[top of word], shape kept; `lut` (65536,) uint8."""
    lib = library()
    if lib is None:
        return np.asarray(lut[tops(words, zero, sign, shift)])
    words = np.ascontiguousarray(words)
    out = np.empty(words.shape, np.uint8)
    getattr(lib, f"rac_symbols{words.itemsize}")(words, words.size, zero, sign, shift, lut, out)
    return out


def planes(
    words: Array, zero: int, sign: bool, shift: int, sizes: list[tuple[int, int, int]], total: int
) -> NDArray[np.uint8]:
    """Raw planes of contiguous `words` (n,) in `total` bytes; `sizes` has (bits, lowest bit, start) of each."""
    out = np.zeros(total, np.uint8)
    lib = library()
    if lib is not None:
        starts = np.array([s for *_, s in sizes], np.int64)
        getattr(lib, f"rac_planes{words.itemsize}")(words, len(words), zero, sign, shift, out, starts)
        return out
    t = words.dtype.type
    v = words >> t(zero)
    raw = v & t((1 << shift) - 1)
    if sign:
        raw |= (v >> t(words.itemsize * 8 - zero - 1)) << t(shift)
    for b, low, start in sizes:
        piece = (raw >> t(low)) & t((1 << b) - 1)
        if b >= 8:
            packed = piece.astype(f"<u{b // 8}").view(np.uint8)
        else:
            per = 8 // b
            each = np.append(piece.astype(np.uint8), np.zeros(-len(piece) % per, np.uint8)).reshape(-1, per)
            packed = np.bitwise_or.reduce(each << (np.arange(per, dtype=np.uint8) * np.uint8(b)), axis=1)
        out[start : start + len(packed)] = packed
    return out


def unpack(unit: NDArray[np.uint8], n: int, bits: int) -> NDArray[np.uint8] | None:
    """`n` words of `bits` bits out of the planes of a unit, contiguous and of the right size; None without a kernel."""
    lib = library()
    if lib is None:
        return None
    out = np.empty(n, np.uint8)
    lib.rac_unbits(unit, n, bits, out)
    return out


def ungroup(codes: Array, scales: Array, zeros: Array, group: tuple[int, int], dst: Array, dtype: str) -> int | None:
    """Codes (h, w) of groups/1 to words of F32 or BF16 in `dst` (h, w); the bits that occur in any code.

    All have unit column stride: `scales` (h, G) float32 of the groups that the columns lie in, `zeros` (h, G), or one
    for all. `group`: columns of a group, and place of column 0 in its own. None where no kernel is there for the type.
    """
    lib = library()
    if lib is None or dtype not in ("F32", "BF16"):
        return None
    return int(lib.rac_ungroup(codes, scales, zeros, dst, *group, dst.itemsize))
