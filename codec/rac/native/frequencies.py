"""Frequency tables of lanes/1, and classes of counts (encode/code/classes.py): C kernels, or numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library
from rac.native.prototypes import Array

Counts = NDArray[np.int64]


def tables(data: bytes, out: NDArray[np.uint16], order: int) -> int:
    """Decode exp-Golomb frequency tables into `out` (T, n). 0 done, 1 bits missing or left over, 2 bad sum."""
    lib = library()
    if lib is not None:
        return int(lib.rac_tables(data, len(data), *out.shape, order, out))
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
        lib.rac_lookup(freq, *freq.shape, np.ascontiguousarray(code), out)
        return out
    slot = np.arange(4096, dtype=np.uint32)
    for k, f in enumerate(freq.astype(np.uint32)):
        out[k] = np.repeat(code | f << 20, f) | (slot - np.repeat(np.cumsum(f) - f, f)) << 8
    return out


def golomb(freq: NDArray[np.uint16], order: int) -> tuple[int, bytes] | None:
    """(bits, bytes) of the tables (T, n) in exponential-Golomb code; None where the C kernel is not there."""
    lib = library()
    if lib is None:
        return None
    freq = np.ascontiguousarray(freq)
    out = np.zeros(4 * freq.size, np.uint8)  # a frequency takes 29 bits at most
    bits = int(lib.rac_golomb(freq, *freq.shape, order, out))
    return bits, out[: (bits + 7) // 8].tobytes()


def code_length(counts: Counts, fraction: Counts, weight: int) -> Counts | None:
    """Twin of encode.classes.code_length for contiguous (n, S) counts; None where the C kernel is not there."""
    lib = library()
    if lib is None:
        return None
    out = np.empty(len(counts), np.int64)
    lib.rac_code_length(counts, *counts.shape, fraction, weight, out)
    return out


def sum_classes(hist: NDArray[np.uint32], classes: NDArray[np.uint8], out: Counts) -> bool:
    """Add contiguous vectors (n, G, S) to the counts of their classes (K, G, S); False without the C kernel."""
    lib = library()
    if lib is not None:
        lib.rac_sum(hist, classes, len(hist), hist[0].size, out)
    return lib is not None


def log2(n: Counts, fraction: Counts) -> Counts | None:
    """Twin of encode.classes.log2; None where the C kernel is not there."""
    lib = library()
    if lib is None:
        return None
    n = np.ascontiguousarray(n)
    out = np.empty(n.shape, np.int64)
    lib.rac_log2(n, n.size, fraction, out)
    return out


MOST_CLASSES = 16  # that `cluster` makes


def cluster(hist: NDArray[np.uint32], k: int, rounds: int, fraction: Counts) -> tuple[NDArray[np.uint8], Counts] | None:
    """Classes of vectors (n, G, S) and their counts (k, G, S), as encode.classes.cluster finds them before it joins.

    None without the C kernel, and for more classes than it makes.
    """
    lib = library()
    if lib is None or k > MOST_CLASSES:
        return None
    classes, agg = np.empty(len(hist), np.uint8), np.empty((k, *hist.shape[1:]), np.int64)
    if lib.rac_cluster(np.ascontiguousarray(hist), *hist.shape, k, rounds, fraction, classes, agg):
        raise MemoryError
    return classes, agg


def join(agg: Counts, size: Counts, alive: NDArray[np.bool_], groups: Counts, fraction: Counts, weight: int) -> bool:
    """Twin of the loop of encode.classes.join, which works on its arguments; False where the C kernel is not there."""
    lib = library()
    if lib is not None:
        k, g, s = agg.shape
        own, gain, tmp = np.zeros(k, np.int64), np.empty((k, k), np.int64), np.empty((g, s), np.int64)
        lib.rac_join(agg, size, alive, groups, own, gain, tmp, k, g, s, fraction, weight)
    return lib is not None


def classify(
    sym: NDArray[np.uint8], n: int, weight: int, rounds: int, most: tuple[int, int, bool], fraction: Counts
) -> tuple[Array | None, Array | None, Counts, NDArray[np.uint8]] | None:
    """Twin of encode.classes.classify for contiguous symbols (R, C) below `n`; None without the C kernel.

    `most`: classes of rows and of columns, and whether rows are classed a second time.
    """
    lib = library()
    if lib is None or max(most) > MOST_CLASSES:
        return None
    (r, c), pairs = sym.shape, most[0] * most[1]
    rows, cols, group = np.empty(r, np.uint8), np.empty(c, np.uint8), np.empty(pairs, np.uint8)
    cells, found = np.empty(pairs * n, np.int64), np.empty(3, np.int64)
    limits = np.array(most, np.int64)
    if lib.rac_classify(sym, r, c, n, weight, rounds, limits, fraction, rows, cols, cells, group, found):
        raise MemoryError
    kr, kc, _ = found.tolist()
    counts = cells[: kr * kc * n].reshape(kr, kc, n)
    return rows if kr > 1 else None, cols if kc > 1 else None, counts, group[: kr * kc].reshape(kr, kc)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The tables that symbols are coded under."""

    freq: NDArray[np.uint16]  # (T, symbols)
    odd: NDArray[np.bool_] | None  # (T, symbols): rare pairs, which are coded as two first escapes; None: none
    model: NDArray[np.uint32]  # (T, 256) at the code of each symbol: see src/encode.h
    escaping: NDArray[np.uint8]  # (T, 256) of the same
    order: int
    packed: bytes
    """The tables in exponential-Golomb code of this order."""
    length: int
    """Bits of all symbols under them, in units of 2**-10."""


def fit(counts: Counts, code: NDArray[np.uint8], both: int, whole: int, rare: int, fraction: Counts) -> Fitted | None:
    """Twin of encode.fitted.fit; None without the C kernel."""
    lib = library()
    if lib is None:
        return None
    t, n = counts.shape
    counts, freq, odd = counts.copy(), np.empty((t, n), np.uint16), np.empty((t, n), np.bool_)
    model, escaping = np.empty((t, 256), np.uint32), np.empty((t, 256), np.uint8)
    packed, found = np.zeros(4 * t * n, np.uint8), np.empty(4, np.int64)
    lib.rac_fit(counts, t, n, code, both, whole, rare, fraction, freq, odd, model, escaping, packed, found)
    order, bits, length, some = found.tolist()
    data = packed[: (bits + 7) // 8].tobytes()
    return Fitted(freq, odd if some else None, model, escaping, order, data, length)
