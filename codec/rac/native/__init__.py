"""The C kernels through ctypes, and numba or numpy in their place where they were not built.

`kernel()` says which is in use. The package works with either, bit for bit the same. ctypes releases the GIL, so
threads that decode different tiles run side by side.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import ChecksumError, FormatError

Array = NDArray[Any]
MAX_LANES = 1024


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library, or None (with one warning) where it was not built, or RAC_NO_NATIVE is set."""
    if os.environ.get("RAC_NO_NATIVE"):
        return None
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            lib = ctypes.CDLL(str(path))
        except OSError:
            continue
        lib.rac_escapes.restype = ctypes.c_int64
        return lib
    warnings.warn("rac: the C kernel was not built; decoding runs in numba, several times slower", stacklevel=3)
    return None


def kernel() -> str:
    """Name of the decode kernel in use."""
    lib = library()
    return "numba" if lib is None else "C, AVX-512" if lib.rac_features() else "C"


def _p(a: Array | None) -> ctypes.c_void_p | None:
    return None if a is None else ctypes.c_void_p(a.ctypes.data)


_n = ctypes.c_int64
_i = ctypes.c_int


def tables(data: bytes, out: NDArray[np.uint16], order: int) -> int:
    """Decode exp-Golomb frequency tables into `out` (T, n). 0 done, 1 bits missing or left over, 2 bad sum."""
    lib = library()
    if lib is not None:
        return int(lib.rac_tables(data, _n(len(data)), _n(out.shape[0]), _n(out.shape[1]), _i(order), _p(out)))
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


def lookup(freq: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """(T, 4096) entries symbol | (slot - cumulative) << 8 | frequency << 20 of tables (T, n) that sum to 4096."""
    out = np.empty((len(freq), 4096), np.uint32)
    lib = library()
    if lib is not None:
        lib.rac_lookup(_p(freq), _n(freq.shape[0]), _n(freq.shape[1]), _p(out))
        return out
    slot = np.arange(4096, dtype=np.uint32)
    sym = np.arange(freq.shape[1], dtype=np.uint32)
    for k, f in enumerate(freq.astype(np.uint32)):
        start = np.cumsum(f) - f
        out[k] = np.repeat(sym | f << 20, f) | (slot - np.repeat(start, f)) << 8
    return out


def ans_decode(luts: Array, words: Array, counts: Array, segments: Array, n: int) -> NDArray[np.uint8]:
    """Symbols (n,) of one tile in sequence order.

    luts (T, 4096) uint32, words (W,) uint32, counts (L,) uint16 words per lane with L <= 1024, segments (S, 2)
    int64 of (symbols, table). The caller has checked that counts sum to W and segments to n. ChecksumError where
    a lane does not end empty in state 0.
    """
    out = np.empty(n, np.uint8)
    lib = library()
    if lib is not None:
        bad = lib.rac_ans_decode(
            _p(luts), _p(words), _p(counts), _n(len(counts)), _p(segments), _n(len(segments)), _p(out)
        )
    else:
        from rac.native.fallback import ans_decode as decode

        bad = decode(luts, words, counts, segments, out)
    if bad:
        raise ChecksumError("ANS lane does not end in its initial state")
    return out


def escapes(
    sym: Array, lanes: int, segments: Array, first: int, bases: Array, data: Array, counts: Array
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Positions and tops of the symbols >= `first`: bases[symbol - first] + the next byte of their lane."""
    total = int(counts.sum(dtype=np.int64))
    pos, top = np.empty(len(sym) if total else 0, np.int64), np.empty(len(sym) if total else 0, np.uint32)
    lib = library()
    if lib is not None:
        if total == 0 and first >= 256:
            return pos, top
        pos, top = np.empty(total + 1, np.int64), np.empty(total + 1, np.uint32)
        found = lib.rac_escapes(
            _p(sym), _n(lanes), _p(segments), _n(len(segments)), _n(first), _p(bases), _p(data), _p(counts),
            _p(pos), _p(top),
        )  # fmt: skip
        if found != total:
            raise FormatError("escape counts do not match the symbols")
        return pos[:total], top[:total]
    pos = np.flatnonzero(sym >= first)
    starts = np.concatenate([[0], np.cumsum(segments[:, 0])])
    lane = (pos - starts[np.searchsorted(starts, pos, side="right") - 1]) % lanes
    if (np.bincount(lane, minlength=lanes) != counts).any():
        raise FormatError("escape counts do not match the symbols")
    top = bases[sym[pos].astype(np.int64) - first].astype(np.uint32)
    top[np.argsort(lane, kind="stable")] += data
    return pos, top


def merge(
    sym: Array, at: int, rows: int, cols: int, row: Array | None, col: Array | None, dst: Array, stride: int,
    value: NDArray[np.uint32], zero: int, sign: bool, shift: int, planes: Array, starts: Array, raw: int,
    pos: Array, top: Array, escape: Array,
) -> bool:  # fmt: skip
    """Words of one segment straight to their place in `dst`; False where the C kernel is not there.

    `dst` is a view whose first element is the tile's origin; row, col int32 orders or None; `escape` (1,) int64 is
    the next escape, moved on.
    """
    lib = library()
    if lib is None:
        return False
    f = getattr(lib, f"rac_merge{dst.dtype.itemsize}")
    f(
        _p(sym), _n(at), _n(rows), _n(cols), _p(row), _p(col), _p(dst), _n(stride), _p(value), _i(zero), _i(sign),
        _i(shift), _p(planes), _p(starts), _i(raw), _p(pos), _p(top), _n(len(pos)), _p(escape),
    )  # fmt: skip
    return True


def scan(words: Array, mask: int, shift: int, hist: NDArray[np.uint32]) -> int:
    """Add (word & mask) >> shift of all contiguous `words` to `hist` (65536,); returns the OR of all words."""
    lib = library()
    if lib is None:
        t = words.dtype.type
        hist += np.bincount(((words & t(mask)) >> t(shift)).ravel(), minlength=65536).astype(np.uint32)
        return int(np.bitwise_or.reduce(words, axis=None)) if words.size else 0
    f = getattr(lib, f"rac_scan{words.itemsize}")
    f.restype = ctypes.c_uint64
    return int(f(_p(words), _n(words.size), ctypes.c_uint64(mask), _i(shift), _p(hist)))


def tops(words: Array, zero: int, sign: bool, shift: int) -> Array:
    """(magnitude of words >> zero) >> shift, dtype and shape kept."""
    t = words.dtype.type
    return ((words >> t(zero)) & t((1 << (words.itemsize * 8 - zero - sign)) - 1)) >> t(shift)


def symbols(words: Array, zero: int, sign: bool, shift: int, lut: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """lut[top of word], shape kept; `lut` (65536,) uint8."""
    lib = library()
    if lib is None:
        out: NDArray[np.uint8] = lut[tops(words, zero, sign, shift)]
        return out
    words = np.ascontiguousarray(words)
    out = np.empty(words.shape, np.uint8)
    f = getattr(lib, f"rac_symbols{words.itemsize}")
    f(_p(words), _n(words.size), _i(zero), _i(sign), _i(shift), _p(lut), _p(out))
    return out


def histogram(
    sym: NDArray[np.uint8], row: NDArray[np.int32] | None, col: NDArray[np.int32] | None, keys: int, size: int
) -> NDArray[np.uint32]:
    """(keys, size) counts of the symbols (R, C) of each key; the key of an element is row[r] + col[c]."""
    lib = library()
    out = np.zeros((keys, size), np.uint32)
    if lib is not None:
        lib.rac_hist(_p(sym), _n(sym.shape[0]), _n(sym.shape[1]), _p(row), _p(col), _n(size), _p(out))
        return out
    flat = sym.astype(np.int64)
    flat += 0 if row is None else row.astype(np.int64)[:, None] * size
    flat += 0 if col is None else col.astype(np.int64) * size
    return np.bincount(flat.ravel(), minlength=keys * size).reshape(keys, size).astype(np.uint32)


def to_lanes(symbols: NDArray[np.uint8], lanes: int, segments: Array, start: Array) -> NDArray[np.uint8]:
    """Symbols in sequence order to lane-major order; lane l starts at start[l]."""
    out = np.empty(len(symbols), np.uint8)
    lib = library()
    if lib is not None:
        lib.rac_to_lanes(_p(symbols), _n(lanes), _p(segments), _n(len(segments)), _p(start), _p(out))
        return out
    pos, at = start.copy(), 0
    for n, _ in segments:
        for lane in range(lanes):
            piece = symbols[at + lane : at + n : lanes]
            out[pos[lane] : pos[lane] + len(piece)] = piece
            pos[lane] += len(piece)
        at += n
    return out
