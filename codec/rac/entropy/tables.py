"""Integer frequency tables: 12 bits, sum 4096, entry below 4096 (format_spec/stages/lanes.md, "Tables")."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.errors import FormatError

BITS, TOTAL = 12, 4096


def normalise(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Counts (n,) to frequencies (n,) that sum to 4096; every counted symbol gets at least 1.

    Integer arithmetic only, so every machine finds the same table. Starts from the floor of the exact share and
    gives or takes single units where the cost, c/f to first order, changes best.
    """
    c = counts.astype(np.int64)
    total = int(c.sum())
    if total == 0:
        c, total = c + 1, len(c)
    f = np.where(c > 0, np.maximum(1, c * TOTAL // total), 0)
    while (left := TOTAL - int(f.sum())) != 0:
        if left > 0:
            # the gain of one more unit is about c / (f + 1/2): pick the largest, in integers
            gain = (c << 20) // (2 * f + 1)
            f[np.argsort(-gain, kind="stable")[: min(left, max(1, int((c > 0).sum()) // 8))]] += 1
        else:
            loss = np.where(f > 1, (c << 20) // np.maximum(1, 2 * f - 1), np.iinfo(np.int64).max)
            f[np.argsort(loss, kind="stable")[: min(-left, max(1, int((f > 1).sum()) // 8))]] -= 1
    if int(f.max()) == TOTAL:  # the look-up entry has 12 bits for the frequency
        k = int(f.argmax())
        f[k], f[k - 1 if k else 1] = TOTAL - 1, 1
    return f.astype(np.uint16)


def to_bytes(tables: NDArray[np.uint16], order: int) -> bytes:
    """Exponential-Golomb code of the zigzag differences along each row of `tables` (T, n); MSB first.

    The order of one difference grows with the frequency before it, as counting noise does:
    max(0, bit_length(previous) // 2 + order).
    """
    if done := native.golomb(tables, order):
        return done[1]
    f = tables.astype(np.int64)
    prev = np.concatenate([np.zeros((len(f), 1), np.int64), f[:, :-1]], axis=1).ravel()
    d = f.ravel() - prev
    k = np.maximum(0, _bit_length(prev) // 2 + order)
    v = ((d << 1) ^ (d >> 63)) + (1 << k)
    q = _bit_length(v) - 1 - k
    width = 2 * q + k + 1
    ends = np.cumsum(width)
    bits = np.zeros(int(ends[-1]), np.uint8)
    for b in range(int((q + k).max()) + 1):
        use = q + k >= b
        bits[ends[use] - 1 - b] = (v[use] >> b) & 1
    return np.packbits(bits).tobytes()


def _bit_length(v: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.frexp(v.astype(np.float64))[1].astype(np.int64)  # exact below 2**53


def from_bytes(data: bytes, count: int, size: int, order: int) -> NDArray[np.uint16]:
    """Inverse of `to_bytes`. Returns (count, size) uint16; FormatError unless each row sums to 4096."""
    out = np.empty((count, size), np.uint16)
    code = native.tables(data, out, order)
    if code == 1:
        raise FormatError("frequency tables are cut off, or bits follow them")
    if code == 2:
        raise FormatError("frequency table does not sum to 4096")
    return out


lookup = native.lookup  # (T, 4096) uint32 entries: code[symbol] | (slot - cumulative) << 8 | frequency << 20
