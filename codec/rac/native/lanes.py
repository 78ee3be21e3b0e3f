"""Tiles of lanes/1 to words or numbers, and symbols to lanes, counted and found: C kernels, or numba and numpy."""

from __future__ import annotations

import ctypes
import functools
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import ChecksumError, FormatError
from rac.native.library import library, twin
from rac.native.prototypes import TILE_ERRORS, Array, TileSpan


def decode_spans(spans: list[TileSpan]) -> tuple[int, int, type[FormatError | ChecksumError], str] | None:
    """Check and decode runs of tiles, where kernels are `available`.

    None, or of the first tile that is wrong: its run, its number in that, and the error.
    """
    lib = library()
    assert lib is not None  # noqa: S101 - the caller asked
    at = (ctypes.c_int64 * 2)()
    bad = lib.rac_spans(b"".join(spans), len(spans), at)
    if bad == 8:
        raise MemoryError
    return (at[0], at[1], ChecksumError if bad in (4, 10) else FormatError, TILE_ERRORS[bad]) if bad else None


def ans_decode(luts: Array, words: Array, counts: Array, segments: Array, n: int) -> NDArray[np.uint8]:
    """Coded symbols (n,) of one tile in sequence order, in numba, or in numpy where that is not installed.

    luts (T, 4096) uint32, words (W,) uint32 in the order of reading, counts (L,) words of each lane, which sum to W,
    segments (S, 2) of (symbols, table), which sum to n. ChecksumError where a lane does not end in state 0.
    """
    out = np.empty(n, np.uint8)
    decode = _in_numba if twin() == "numba" else decode_side_by_side
    if decode(luts, words, counts, segments, out):
        raise ChecksumError(TILE_ERRORS[4])
    return out


_uncached: list[bool] = []  # not empty where numba's cache is of no use


def _in_numba(*arguments: Array) -> bool:
    try:
        return bool(_compiled(not _uncached)(*arguments))
    except Exception as e:  # what a cache that is damaged ends in is anything
        if _uncached:
            raise
        _uncached.append(True)
        text = f"rac: numba's cache cannot be used ({e or type(e).__name__}); the decoder is compiled for each process"
        warnings.warn(f"{text} until you {_remedy(e)}", stacklevel=4)
        return bool(_compiled(False)(*arguments))


def _remedy(e: Exception) -> str:
    """What brings numba's cache back."""
    if not isinstance(e, OSError | RuntimeError):  # these are about places; what is damaged ends in others
        with suppress(Exception):
            return f"delete {_compiled(True).stats.cache_path}"
    return "let NUMBA_CACHE_DIR name a folder that can be written"


@functools.cache
def _compiled(cache: bool) -> Any:
    import numba  # its only door

    return numba.njit(cache=cache, nogil=True)(_decode)


def decode_side_by_side(luts: Array, words: Array, counts: Array, segments: Array, out: Array) -> bool:
    """Twin of src/lanes.c in numpy, all lanes at once; whether a lane does not end empty in state 0."""
    left, at = counts.astype(np.int64), 0
    st = np.zeros(len(counts), np.uint64)
    begin = np.minimum(left, 2)
    ends = np.cumsum(begin)
    for k in range(2):  # a lane begins with two words, all of one lane before those of the next
        mine = begin > k
        st[mine] = st[mine] << np.uint64(32) | words[(ends - begin)[mine] + k]
    left -= begin
    at, o = int(begin.sum()), 0
    twelve, low = np.uint64(12), np.uint64(4095)
    for todo, table in segments.tolist():
        for size in [len(st)] * (todo // len(st)) + [todo % len(st)] * (todo % len(st) > 0):
            x = st[:size]
            e = luts[table, x >> twelve & low].astype(np.uint64)
            out[o : o + size] = e & np.uint64(255)
            x = ((x >> np.uint64(24)) * (e >> np.uint64(20)) + (e >> np.uint64(8) & low)) << twelve | x & low
            more = (x >> np.uint64(32) == 0) & (left[:size] > 0)
            if n := int(np.count_nonzero(more)):
                x[more] = x[more] << np.uint64(32) | words[at : at + n]
                left[:size] -= more
            st[:size], at, o = x, at + n, o + size
    return bool(st.any() or left.any())


def _decode(luts: Array, words: Array, counts: Array, segments: Array, out: Array) -> bool:  # pragma: no cover
    """Twin of src/lanes.c; whether a lane does not end empty in state 0."""
    lanes = len(counts)
    st = np.zeros(lanes, np.uint64)
    left = counts.astype(np.int64)
    at = 0
    for i in range(lanes):
        for _ in range(min(2, left[i])):
            st[i] = st[i] << np.uint64(32) | np.uint64(words[at])
            at += 1
            left[i] -= 1
    o = 0
    for k in range(len(segments)):
        todo = segments[k, 0]
        table = segments[k, 1]
        while todo > 0:
            for i in range(min(lanes, todo)):
                x = st[i]
                e = luts[table, (x >> np.uint64(12)) & np.uint64(4095)]
                out[o + i] = e & np.uint32(255)
                x = ((x >> np.uint64(24)) * np.uint64(e >> 20) + np.uint64((e >> 8) & 4095)) << np.uint64(12) | (
                    x & np.uint64(4095)
                )
                if x >> np.uint64(32) == 0 and left[i]:
                    x = x << np.uint64(32) | np.uint64(words[at])
                    at += 1
                    left[i] -= 1
                st[i] = x
            o += min(lanes, todo)
            todo -= lanes
    bad = False
    for i in range(lanes):
        bad |= st[i] != 0 or left[i] != 0
    return bad


def encode_lanes(
    symbols: NDArray[np.uint8], lanes: int, segments: NDArray[np.int64], model: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]] | None:
    """(words in the order of reading, words of each lane) of symbols, by `symbol_model`; None without a kernel."""
    lib = library()
    if lib is None:
        return None
    out = np.empty(len(symbols) + 2 * lanes + 16, np.uint32)
    counts = np.empty(-(-lanes // 16) * 16, np.uint32)
    n = lib.rac_encode(symbols, lanes, segments, len(segments), model, len(model), out, len(out), counts)
    assert n >= 0  # noqa: S101
    assert int(counts.max()) < 65536  # noqa: S101 - a symbol takes at most one word, a tile is small
    return out[len(out) - n :], counts[:lanes].astype(np.uint16)


def symbol_model(freq: NDArray[np.uint16], same: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(T, 256) what `encode_lanes` needs of each symbol: its frequency, and the sum of those before it << 16.

    `freq` (T, S); symbol s is coded as if it were `same[t, s]` (T, 256).
    """
    f = np.zeros((len(freq), 256), np.uint32)
    f[:, : freq.shape[1]] = freq
    start = np.cumsum(f, axis=1, dtype=np.uint32) - f
    return np.ascontiguousarray(np.take_along_axis(f | start << np.uint32(16), same.astype(np.int64), axis=1))


def histogram(
    sym: NDArray[np.uint8], row: NDArray[np.int32] | None, col: NDArray[np.int32] | None, keys: int, size: int
) -> NDArray[np.uint32]:
    """(keys, size) counts of the symbols (R, C) of each key; the key of an element is row[r] + col[c]."""
    lib = library()
    if lib is not None:
        out = np.zeros((keys, size), np.uint32)
        lib.rac_hist(sym, *sym.shape, row, col, size, out)
        return out
    flat = sym.astype(np.int64)
    flat += 0 if row is None else row.astype(np.int64)[:, None] * size
    flat += 0 if col is None else col.astype(np.int64) * size
    return np.bincount(flat.ravel(), minlength=keys * size).reshape(keys, size).astype(np.uint32)


def column_histogram(
    sym: NDArray[np.uint8], classes: NDArray[np.uint8] | None, k: int, size: int
) -> NDArray[np.uint32]:
    """(C, k, size) counts of the symbols (R, C), of unit column stride, of each column and class of rows (R,)."""
    lib = library()
    rows, cols = sym.shape
    if lib is None:
        key = None if classes is None else classes.astype(np.int32)
        by_col = np.arange(cols, dtype=np.int32) * np.int32(k)
        return histogram(sym, key, by_col, cols * k, size).reshape(cols, k, size)
    out = np.zeros((cols, k, size), np.uint32)
    if lib.rac_hist_cols(sym, rows, cols, sym.strides[0], classes, k, size, out):
        raise MemoryError
    return out
