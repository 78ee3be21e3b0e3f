"""The C kernels through ctypes, and numba in their place where they were not built.

`KERNEL` says which one is in use. The package works with either, bit for bit the same.
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

from rac.errors import ChecksumError

Array = NDArray[Any]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library, or None (with one warning) where it was not built or RAC_NO_NATIVE is set."""
    if os.environ.get("RAC_NO_NATIVE"):
        return None
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    warnings.warn("rac: the C kernel was not built; decoding runs in numba, at about half the speed", stacklevel=3)
    return None


def kernel() -> str:
    """Name of the decode kernel in use."""
    lib = library()
    return "numba" if lib is None else "C, AVX-512" if lib.rac_features() else "C"


def _p(a: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


def _n(v: int) -> ctypes.c_int64:
    return ctypes.c_int64(v)


def ans_decode(luts: Array, words: Array, counts: Array, segments: Array, n: int) -> NDArray[np.uint8]:
    """Symbols (n,) of one tile in sequence order.

    luts (T, 4096) uint32, words (W,) uint32, counts (L,) uint16 words per lane with L <= 1024, segments (S, 2)
    int64 of (symbols, table). The caller has checked that counts sum to W and segments to n. ChecksumError where
    a lane does not end empty in state 0.
    """
    out = np.empty(n, np.uint8)
    lib = library()
    words = np.ascontiguousarray(words)
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


def tops(words: Array, zero: int, sign: bool, shift: int) -> NDArray[np.uint16]:
    """(magnitude of words >> zero) >> shift as uint16, shape kept."""
    lib = library()
    words = np.ascontiguousarray(words)
    if lib is not None:
        out = np.empty(words.shape, np.uint16)
        f = getattr(lib, f"rac_tops{words.itemsize}")
        f(_p(words), _n(words.size), ctypes.c_int(zero), ctypes.c_int(sign), ctypes.c_int(shift), _p(out))
        return out
    t = words.dtype.type
    v = words >> t(zero)
    return ((v & t((1 << (words.itemsize * 8 - zero - sign)) - 1)) >> t(shift)).astype(np.uint16)


def histogram(values: NDArray[np.uint16], classes: NDArray[np.uint8] | None, k: int, size: int) -> NDArray[np.int64]:
    """(k, size) counts of `values` (R, C) below `size` by the class of the row."""
    lib = library()
    if lib is not None:
        out = np.zeros((k, size), np.uint32)
        cls = _p(classes) if classes is not None else None
        lib.rac_hist(_p(values), _n(values.shape[0]), _n(values.shape[1]), cls, _n(size), _p(out))
        return out.astype(np.int64)
    rows = np.zeros(len(values), np.int64) if classes is None else classes.astype(np.int64)
    return np.bincount((values + rows[:, None] * size).ravel(), minlength=k * size).reshape(k, size)


def assign(symbols: NDArray[np.uint8], cost: NDArray[np.int32], bias: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Class of each row of `symbols` (R, C): argmin over k < 16 of sum cost[symbol, k] + bias[k], first on ties."""
    lib = library()
    if lib is not None:
        out = np.empty(len(symbols), np.uint8)
        lib.rac_assign(
            _p(symbols), _n(symbols.shape[0]), _n(symbols.shape[1]), _p(cost), _p(bias), _n(len(bias)), _p(out)
        )
        return out
    total = np.empty((len(symbols), len(bias)), np.int64)
    for r, row in enumerate(symbols):
        total[r] = np.bincount(row, minlength=256) @ cost[:, : len(bias)].astype(np.int64)
    return (total + bias).argmin(1).astype(np.uint8)


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


def merge16_4(symbols: NDArray[np.uint8], values: NDArray[np.uint16], plane: Array) -> NDArray[np.uint16] | None:
    """16-bit words from symbols, symbol values (256,) and one nibble plane; None where C is not there."""
    lib = library()
    if lib is None:
        return None
    out = np.empty(len(symbols), np.uint16)
    lib.rac_merge16_4(_p(symbols), _p(values), _p(plane), _n(len(symbols)), _p(out))
    return out
