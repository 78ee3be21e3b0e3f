"""Frequency tables of lanes/1, between their bytes, integers and look-up entries: C kernels, or numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library

Array = NDArray[Any]


def tables(data: bytes, out: NDArray[np.uint16], order: int) -> int:
    """Decode exp-Golomb frequency tables into `out` (T, n). 0 done, 1 bits missing or left over, 2 bad sum."""
    lib = library()
    if lib is not None:
        return int(lib.rac_tables(data, len(data), out.shape[0], out.shape[1], order, out))
    bits = "".join(f"{b:08b}" for b in data)
    at = 0
    for row in out:
        prev = 0
        for i in range(len(row)):
            k = max(0, prev.bit_length() // 2 + order)
            q = bits.find("1", at) - at
            if not 0 <= q <= 13 or at + 2 * q + k + 1 > len(bits):
                return 1
            v = int(bits[at + q : at + 2 * q + k + 1], 2) - (1 << k)
            at += 2 * q + k + 1
            prev += (v >> 1) ^ -(v & 1)
            if not 0 <= prev <= 4095:
                return 2
            row[i] = prev
        if int(row.sum(dtype=np.int64)) != 4096:
            return 2
    return int(len(bits) - at >= 8 or "1" in bits[at:])


def lookup(freq: NDArray[np.uint16], code: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(T, 4096) entries code[symbol] | (slot - cumulative) << 8 | frequency << 20 of tables (T, n) that sum to 4096."""
    out = np.empty((len(freq), 4096), np.uint32)
    lib = library()
    if lib is not None:
        lib.rac_lookup(freq, freq.shape[0], freq.shape[1], np.ascontiguousarray(code), out)
        return out
    slot = np.arange(4096, dtype=np.uint32)
    sym = code.astype(np.uint32)
    for k, f in enumerate(freq.astype(np.uint32)):
        start = np.cumsum(f) - f
        out[k] = np.repeat(sym | f << 20, f) | (slot - np.repeat(start, f)) << 8
    return out


def golomb(freq: NDArray[np.uint16], order: int, write: bool = True) -> tuple[int, bytes] | None:
    """(bits, bytes) of the tables (T, n) in exponential-Golomb code; None where the C kernel is not there."""
    lib = library()
    if lib is None:
        return None
    freq = np.ascontiguousarray(freq)
    args = (freq, freq.shape[0], freq.shape[1], order)
    bits = int(lib.rac_golomb(*args, None))
    if not write:
        return bits, b""
    out = np.zeros((bits + 7) // 8, np.uint8)
    lib.rac_golomb(*args, out)
    return bits, out.tobytes()
