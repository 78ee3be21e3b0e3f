"""The C kernels through ctypes, and numba or numpy in their place where they were not built.

`kernel()` says which is in use. The package works with either, bit for bit the same. ctypes releases the GIL, so
threads that decode different tiles run side by side.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import ChecksumError, FormatError

Array = NDArray[Any]
ABI = 16


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library, or None (with one warning) where it was not built, or RAC_NO_NATIVE is set."""
    if os.environ.get("RAC_NO_NATIVE"):
        return None
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            lib = ctypes.CDLL(str(path))
            if lib.rac_abi() == ABI:
                lib.rac_golomb.restype = lib.rac_find.restype = lib.rac_encode.restype = ctypes.c_int64
                lib.rac_factor.restype = ctypes.c_int64
                return lib
        except (OSError, AttributeError):  # of another machine, or left over from another version
            continue
    warnings.warn("rac: the C kernel was not built; decoding runs in numba, several times slower", stacklevel=3)
    return None


@functools.cache
def _holding(path: str) -> ctypes.PyDLL:
    return ctypes.PyDLL(path)


def _quick() -> ctypes.PyDLL | None:
    """The library again, for calls so short that giving up the GIL for them makes threads wait for each other."""
    lib = library()
    return None if lib is None else _holding(lib._name)


def kernel() -> str:
    """Name of the decode kernel in use."""
    lib = library()
    return "numba" if lib is None else "C, AVX-512" if lib.rac_features() else "C"


def _p(a: Array | None) -> ctypes.c_void_p | None:
    return ctypes.c_void_p(address(a))


_n = ctypes.c_int64
_i = ctypes.c_int


def tables(data: bytes, out: NDArray[np.uint16], order: int) -> int:
    """Decode exp-Golomb frequency tables into `out` (T, n). 0 done, 1 bits missing or left over, 2 bad sum."""
    lib = _quick()
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


def lookup(freq: NDArray[np.uint16], code: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """(T, 4096) entries code[symbol] | (slot - cumulative) << 8 | frequency << 20 of tables (T, n) that sum to 4096."""
    out = np.empty((len(freq), 4096), np.uint32)
    lib = _quick()
    if lib is not None:
        lib.rac_lookup(_p(freq), _n(freq.shape[0]), _n(freq.shape[1]), _p(code := np.ascontiguousarray(code)), _p(out))
        return out
    slot = np.arange(4096, dtype=np.uint32)
    sym = code.astype(np.uint32)
    for k, f in enumerate(freq.astype(np.uint32)):
        start = np.cumsum(f) - f
        out[k] = np.repeat(sym | f << 20, f) | (slot - np.repeat(start, f)) << 8
    return out


_JOB = struct.Struct("PqPPPqqqPP")
_SAME = struct.Struct("PPPP12iI4x")
DEQUANT = struct.Struct("P5i4x")
"""Together rac_job in decode.c: what differs from tile to tile, what does not, and what words stand for."""
_WORDS = bytes(DEQUANT.size)


def job_tail(luts: Array, values: Array, bases: Array, table: Array, *numbers: int) -> bytes:
    """The part of a job that all tiles of a tensor share; the caller keeps the arrays alive.

    `numbers`: row and column classes, skip, lanes, per, word, zero, sign, shift, raw, base, first escape, limit.
    """
    return _SAME.pack(*(address(a) for a in (luts, values, bases, table)), *numbers)


def job(
    unit: int,
    size: int,
    row_class: int,
    col_class: int,
    dst: int,
    rows: int,
    cols: int,
    stride: int,
    tail: bytes,
    row: int = 0,
    col: int = 0,
    dequant: bytes = b"",
) -> bytes:
    """One tile to be decoded.

    Args:
        unit: Address of its bytes.
        size: Number of these.
        row_class: Address of the classes of its rows, 0 where there is one.
        col_class: Of its columns.
        dst: Address of its first element in the dense tensor.
        rows: Of the tile.
        cols: Of the tile.
        stride: Elements from row to row of the dense tensor.
        tail: Of `job_tail`.
        row: Address of the scales of its rows, under `dequant`.
        col: Of its columns.
        dequant: Of `trellis.dequant`, what the words stand for; empty: they are the elements.
    """
    return _JOB.pack(unit, size, row_class, col_class, dst, rows, cols, stride, row, col) + tail + (dequant or _WORDS)


TILE_ERRORS = (
    "",
    "tile streams do not fill the unit exactly",
    "padding is not zero",
    "ANS lane begins with a zero word",
    "ANS lane does not end in its initial state",
    "escape counts do not match the symbols",
    "escaped value leaves the range of tops",
    "plane ends in non-zero bits",
    "not enough memory",
    "a word is larger than groups/1 allows",
)
"""What a kernel has found, by its number; the last two are never those of a tile that the CPU decodes."""


def decode_tiles(jobs: list[bytes]) -> tuple[int, type[FormatError | ChecksumError], str] | None:
    """Decode tiles (only where `library()` is there). None, or of the first that is wrong: its number and the error.

    FormatError where the unit breaks stages/lanes.md, ChecksumError where a lane does not end empty in state 0.
    """
    lib = library()
    assert lib is not None  # noqa: S101 - the caller asked
    at = ctypes.c_int64()
    bad = lib.rac_tiles(b"".join(jobs), _n(len(jobs)), ctypes.byref(at))
    if bad == 8:
        raise MemoryError
    return (at.value, ChecksumError if bad == 4 else FormatError, TILE_ERRORS[bad]) if bad else None


def address(a: Array | None) -> int:
    """Address of the first byte of an array, 0 for None."""
    if a is None:
        return 0
    try:
        whole: Any = a  # quick, but for whole and writable arrays only
        return ctypes.addressof(ctypes.c_char.from_buffer(whole))
    except (TypeError, ValueError):
        return int(a.__array_interface__["data"][0])


def ans_decode(luts: Array, words: Array, counts: Array, segments: Array, n: int) -> NDArray[np.uint8]:
    """Coded symbols (n,) of one tile in sequence order, in numba.

    luts (T, 4096) uint32, words (W,) uint32 in the order of reading, counts (L,) uint16 words per lane with L <= 1024,
    segments (S, 2) int64 of (symbols, table). The caller has checked that counts sum to W and segments to n.
    ChecksumError where a lane does not end empty in state 0.
    """
    from rac.native.fallback import ans_decode as decode

    out = np.empty(n, np.uint8)
    if decode(luts, words, counts, segments, out):
        raise ChecksumError(TILE_ERRORS[4])
    return out


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
    out: Array = ((words >> t(zero)) & t((1 << (words.itemsize * 8 - zero - sign)) - 1)) >> t(shift)
    return out


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


def count_segments(sym: NDArray[np.uint8], segments: Array, counts: NDArray[np.uint32]) -> None:
    """Add the coded symbols of each segment (symbols, table) to the row of its table in `counts` (T, S)."""
    lib = library()
    if lib is not None:
        lib.rac_count(_p(sym), _p(segments), _n(len(segments)), _n(counts.shape[1]), _p(counts))
        return
    at = 0
    for n, table in segments.tolist():
        counts[table] += np.bincount(sym[at : at + n], minlength=counts.shape[1]).astype(np.uint32)
        at += n


def find(sym: NDArray[np.uint8], segments: Array, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Places of the coded symbols whose flag under their table is set; `flags` (T, 256)."""
    lib = library()
    if lib is not None:
        out = np.empty(len(sym) + 1, np.int64)
        return out[: lib.rac_find(_p(sym), _p(segments), _n(len(segments)), _p(flags), _p(out))].copy()
    table = np.repeat(segments[:, 1], segments[:, 0])
    return np.flatnonzero(flags[table, sym])


def code_length(counts: NDArray[np.int64], fraction: NDArray[np.int64], weight: int) -> NDArray[np.int64] | None:
    """Twin of encode.classes.code_length for contiguous (n, S) counts; None where the C kernel is not there."""
    lib = library()
    if lib is None:
        return None
    out = np.empty(len(counts), np.int64)
    lib.rac_code_length(_p(counts), _n(counts.shape[0]), _n(counts.shape[1]), _p(fraction), _n(weight), _p(out))
    return out


def sum_classes(hist: NDArray[np.uint32], classes: NDArray[np.uint8], out: NDArray[np.int64]) -> bool:
    """Add contiguous vectors (n, G, S) to the counts of their classes (K, G, S); False without the C kernel."""
    lib = library()
    if lib is None:
        return False
    lib.rac_sum(_p(hist), _p(classes), _n(len(hist)), _n(hist[0].size), _p(out))
    return True


def log2(n: NDArray[np.int64], fraction: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Twin of encode.classes.log2; None where the C kernel is not there."""
    lib = library()
    if lib is None:
        return None
    n = np.ascontiguousarray(n)
    out = np.empty(n.shape, np.int64)
    lib.rac_log2(_p(n), _n(n.size), _p(fraction), _p(out))
    return out


def join(
    agg: NDArray[np.int64],
    size: NDArray[np.int64],
    alive: NDArray[np.bool_],
    groups: NDArray[np.int64],
    fraction: NDArray[np.int64],
    weight: int,
) -> bool:
    """Twin of the loop of encode.classes.join, which works on its arguments; False where the C kernel is not there."""
    lib = library()
    if lib is None:
        return False
    k, g, s = agg.shape
    own, gain, tmp = np.zeros(k, np.int64), np.empty((k, k), np.int64), np.empty((g, s), np.int64)
    lib.rac_join(
        _p(agg),
        _p(size),
        _p(alive),
        _p(groups),
        _p(own),
        _p(gain),
        _p(tmp),
        _n(k),
        _n(g),
        _n(s),
        _p(fraction),
        _n(weight),
    )
    return True


def golomb(freq: NDArray[np.uint16], order: int, write: bool = True) -> tuple[int, bytes] | None:
    """(bits, bytes) of the tables (T, n) in exponential-Golomb code; None where the C kernel is not there."""
    lib = library()
    if lib is None:
        return None
    freq = np.ascontiguousarray(freq)
    args = (_p(freq), _n(freq.shape[0]), _n(freq.shape[1]), _i(order))
    bits = int(lib.rac_golomb(*args, None))
    if not write:
        return bits, b""
    out = np.zeros((bits + 7) // 8, np.uint8)
    lib.rac_golomb(*args, _p(out))
    return bits, out.tobytes()


def gather(tile: Array, rows: Array | None, cols: Array | None, blocks: Array) -> Array | None:
    """Elements of `tile` (h, w), unit column stride, in the order of its blocks; None without the C kernel."""
    lib = library()
    if lib is None:
        return None
    size = tile.dtype.itemsize
    out = np.empty(tile.size, tile.dtype)
    f = getattr(lib, f"rac_gather{size}")
    f(_p(tile), _n(tile.strides[0] // size), _p(rows), _p(cols), _p(blocks), _n(len(blocks)), _p(out))
    return out


def encode_lanes(
    symbols: NDArray[np.uint8], lanes: int, segments: NDArray[np.int64], model: NDArray[np.uint64]
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]] | None:
    """(words in the order of reading, words of each lane) of coded symbols; `model` as `symbol_model` makes it.

    None where the C kernel is not there.
    """
    lib = library()
    if lib is None:
        return None
    out = np.empty(len(symbols) + 2 * lanes + 1, np.uint32)
    counts = np.empty(lanes, np.uint32)
    n = lib.rac_encode(
        _p(symbols), _n(lanes), _p(segments), _n(len(segments)), _p(model), _p(out), _n(len(out)), _p(counts)
    )
    assert n >= 0  # noqa: S101
    assert int(counts.max()) < 65536  # noqa: S101 - a symbol takes at most one word, a tile is small
    return out[len(out) - n :], counts.astype(np.uint16)


def symbol_model(freq: NDArray[np.uint16], same: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(T, 256, 4) what `encode_lanes` needs of each symbol: 2**64 / f rounded up (0 for 1), start, 2**24 - f, f / 4096.

    `freq` (T, S); symbol s is coded as if it were `same[t, s]` (T, 256).
    """
    f = np.zeros((len(freq), 256), np.uint64)
    f[:, : freq.shape[1]] = freq
    start = np.cumsum(f, axis=1) - f
    one = np.maximum(f, np.uint64(1))
    reciprocal = np.where(f > 1, np.uint64(2**64 - 1) // one + np.uint64(1), np.uint64(0))
    out = np.stack([reciprocal, start << np.uint64(12), np.uint64(1 << 24) - (f << np.uint64(12)), f], axis=2)
    return np.ascontiguousarray(np.take_along_axis(out, same.astype(np.int64)[:, :, None], axis=1))


def pair(sym: NDArray[np.uint8], sizes: NDArray[np.int64], table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Base symbols (n,) below 16 to pairs table[a + 16 b], segment by segment of `sizes` elements.

    An odd last one is paired with symbol 0.
    """
    out = np.empty(int(((sizes + 1) // 2).sum()), np.uint8)
    lib = library()
    if lib is not None:
        lib.rac_pairs(_p(sym), _p(sizes), _n(len(sizes)), _p(table), _p(out))
        return out
    pieces, at = [], 0
    for n in sizes.tolist():
        even = np.append(sym[at : at + n], np.zeros(n % 2, np.uint8))
        pieces.append(table[even[::2] | even[1::2] << np.uint8(4)])
        at += n
    return np.concatenate(pieces)


def planes(
    words: Array, zero: int, sign: bool, shift: int, sizes: list[tuple[int, int, int]], total: int
) -> NDArray[np.uint8]:
    """Raw planes of contiguous `words` (n,) in `total` bytes; `sizes` has (bits, lowest bit, start) of each."""
    out = np.zeros(total, np.uint8)
    starts = np.array([s for *_, s in sizes], np.int64)
    lib = library()
    if lib is not None:
        f = getattr(lib, f"rac_planes{words.itemsize}")
        f(_p(words), _n(len(words)), _i(zero), _i(sign), _i(shift), _i(shift + sign), _p(out), _p(starts))
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
