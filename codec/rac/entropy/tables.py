"""Integer frequency tables: 12 bits, sum 4096, entry below 4096 (format_spec/stages/lanes.md, "Tables")."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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


def check(tables: NDArray[np.uint16]) -> None:
    """FormatError unless every row of `tables` (T, n) sums to 4096 with no entry above 4095."""
    if (tables.astype(np.int64).sum(axis=1) != TOTAL).any() or (tables > TOTAL - 1).any():
        raise FormatError("frequency table does not sum to 4096")


def to_bytes(tables: NDArray[np.uint16]) -> bytes:
    """Row-wise differences, zigzag, low-byte plane then high-byte plane."""
    d = np.diff(tables.astype(np.int32), axis=1, prepend=0)
    z = ((d << 1) ^ (d >> 31)).astype(np.uint16).ravel()
    return (z & 255).astype(np.uint8).tobytes() + (z >> 8).astype(np.uint8).tobytes()


def from_bytes(data: bytes, count: int, size: int) -> NDArray[np.uint16]:
    """Inverse of `to_bytes`; checks the sums. Returns (count, size) uint16."""
    n = count * size
    if len(data) != 2 * n:
        raise FormatError("frequency tables have the wrong length")
    b = np.frombuffer(data, np.uint8).astype(np.int32)
    z = (b[:n] | b[n:] << 8).reshape(count, size)
    f = np.cumsum((z >> 1) ^ -(z & 1), axis=1)
    if (f < 0).any() or (f > TOTAL - 1).any():
        raise FormatError("frequency out of range")
    out = f.astype(np.uint16)
    check(out)
    return out


def lookup(tables: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """(T, 4096) uint32 entries: symbol | (slot - cumulative) << 8 | frequency << 20."""
    out = np.empty((len(tables), TOTAL), np.uint32)
    slot = np.arange(TOTAL, dtype=np.uint32)
    sym = np.arange(tables.shape[1], dtype=np.uint32)
    for k, f in enumerate(tables.astype(np.uint32)):
        start = np.cumsum(f) - f
        out[k] = np.repeat(sym | f << 20, f) | (slot - np.repeat(start, f)) << 8
    return out
