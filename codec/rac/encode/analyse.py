"""One look at a tensor: how it is cut into tiles, which method stores it, and with which parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.encode import classes as cl
from rac.entropy import tables
from rac.quantize import lossless as ll
from rac.registry import DTYPES

Array = NDArray[Any]
Read = Callable[[int, int], Array]
"""Words (h, C) of the rows [start, stop) of the matrix."""

ONE_TILE = 3 << 19
CHUNK = 1 << 22
COUNTS = 1 << 25
_MANTISSA = {"F64": 52, "F32": 23, "C64": 23, "BF16": 7, "F16": 10}
_CODED = {"F64": 5, "F32": 4, "C64": 4, "BF16": 4, "F16": 3}
_BYTES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8")


@dataclass(frozen=True, slots=True)
class Level:
    """What an effort level tries. It changes sizes and time, never the result of decoding."""

    name: str
    lanes: int
    row_classes: int
    col_classes: int
    rounds: int
    fewer_bits: int
    zstd: int


LEVELS = {
    level.name: level
    for level in (
        Level("fast", 16, 1, 1, 0, 0, 3),
        Level("default", 16, 6, 1, 2, 0, 9),
        Level("max", 8, 16, 8, 5, 2, 19),
    )
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How one tensor is stored. The arrays are set for lanes/1 only."""

    method: str
    grid: ll.Grid
    axis: int
    digest: bytes
    level: str
    lanes: ll.Lanes | None = None
    shared: bytes = b""
    freq: NDArray[np.uint16] | None = None
    rows: NDArray[np.uint8] | None = None
    cols: NDArray[np.uint8] | None = None
    table: NDArray[np.uint8] | None = None
    lut: NDArray[np.uint8] | None = None


def axis_of(shape: tuple[int, ...]) -> int:
    """Dimensions that count as rows: all but the last, or the first alone where the last ones are short."""
    if len(shape) > 1 and shape[-1] < 64:
        return 1
    return max(0, len(shape) - 1)


def grid_of(dtype: str, shape: tuple[int, ...], axis: int) -> ll.Grid:
    """Tiles: one for a small tensor; else an eighth of the columns each, so that shards read little else."""
    rows, cols = ll.matrix(dtype, shape, axis)
    word = DTYPES[dtype].word
    if rows * cols * word <= ONE_TILE:
        return ll.Grid(rows, cols, word, max(1, rows), max(1, cols))
    tc = -(-cols // 8) if cols >= 128 else cols
    tc = -(-tc // (parts := -(-tc // (1 << 20)))) if tc > 1 << 20 else tc
    tr = max(1, min(-(-rows // 8), (1 << 20) // tc))
    return ll.Grid(rows, cols, word, tr, tc)


def chunks(grid: ll.Grid) -> Iterator[tuple[int, int]]:
    """Row ranges of about 4 MiB."""
    step = max(1, CHUNK // max(1, grid.cols * grid.word))
    for a in range(0, grid.rows, step):
        yield a, min(grid.rows, a + step)


def analyse(read: Read, dtype: str, shape: tuple[int, ...], level: Level) -> Plan:
    """Choose method and parameters; reads the tensor once or a few times, some MiB at a time."""
    axis = axis_of(shape)
    grid = grid_of(dtype, shape, axis)
    digest = zstd.Digest()
    signed = DTYPES[dtype].signed_float
    bits = 8 * grid.word - signed
    hist = np.zeros(65536, np.uint32)
    base = max(0, bits - 16)
    total = grid.rows * grid.cols
    cache = None
    union = 0
    if total:
        for a, b in chunks(grid):
            words = read(a, b)
            digest.update(memoryview(words).cast("B"))
            union |= native.scan(words, (1 << bits) - 1, base, hist)
            if b - a == grid.rows:
                cache = words
    if cache is not None:
        held = cache
        read = lambda a, b: held[a:b]  # noqa: E731 - the tensor is small: keep it
    plan = Plan("raw/1", grid, axis, digest.value(), level.name)
    if not total:
        return plan
    raw_size = total * grid.word
    best = raw_size - 64
    if (dtype in _MANTISSA or dtype in _BYTES) and total >= 64:
        zero = (union & -union).bit_length() - 1 if union & ((1 << bits) - 1) else 0
        start = _CODED.get(dtype, 0)
        for coded in range(start, max(-1, start - 1 - level.fewer_bits), -1):
            found = _lanes(read, plan, dtype, hist, base, zero, coded, level)
            if found and found[1] < best:
                plan, best = found
    size = _zstd_estimate(read, grid, level)
    if size < best * 0.98:
        plan = replace(Plan("zstd/1", grid, axis, plan.digest, level.name))
    return plan


def _zstd_estimate(read: Read, grid: ll.Grid, level: Level) -> int:
    """Bytes that zstd would need, from three places of a large tensor."""
    rows = max(1, (1 << 15) // max(1, grid.cols * grid.word))
    if grid.rows <= 4 * rows:
        words, strength = read(0, grid.rows), level.zstd
        if words.nbytes > 1 << 17:
            words, strength = words.reshape(1, -1)[:, : (1 << 17) // grid.word], 1
    else:
        at = sorted({0, (grid.rows - rows) // 2, grid.rows - rows})
        words, strength = np.concatenate([read(a, a + rows) for a in at]), 1
    return len(zstd.compress(shuffle(words), strength)) * grid.rows * grid.cols // words.size


def shuffle(words: Array) -> bytes:
    """Bytes of all words, lowest bytes first (stages/zstd.md)."""
    w = words.dtype.itemsize
    return np.ascontiguousarray(np.ascontiguousarray(words).reshape(-1).view(np.uint8).reshape(-1, w).T).tobytes()


def _alphabet(hist: Array, entries: int) -> tuple[list[int], list[int]] | None:
    """Symbol runs and escape bases for the tops counted in `hist`: a rare top costs less as an escape."""
    used = np.flatnonzero(hist)
    keep = np.flatnonzero(hist > entries)
    if not len(keep):
        keep = used[np.argsort(-hist[used], kind="stable")[:2]]
    zero = int(keep[0] == 0 and len(keep) > 1 and keep[1] > 8)
    low, high = int(keep[zero]), int(keep[-1]) + 1

    def bases(low: int, high: int) -> list[int]:
        out = used[(used < low) | (used >= high)]
        out = out[out > 0] if zero else out
        found: list[int] = []
        while len(out):
            found.append(min(int(out[0]), max(0, len(hist) - 256)))
            out = out[out >= found[-1] + 256]
        return found

    while True:
        escapes = bases(low, high)
        if high - low + len(escapes) + zero <= 256:
            break
        if len(escapes) > 128:
            return None
        if hist[low] <= hist[high - 1]:
            low += 1
        else:
            high -= 1
    if high - low + zero + len(escapes) < 2:
        high, low = (high + 1, low) if high < len(hist) else (high, low - 1)
    return ([0, 1] if zero else []) + [low, high - low], escapes


def _lanes(
    read: Read, plan: Plan, dtype: str, hist: Array, base: int, zero: int, coded: int, level: Level
) -> tuple[Plan, int] | None:
    grid = plan.grid
    signed = DTYPES[dtype].signed_float
    total = grid.rows * grid.cols
    down = max(_MANTISSA.get(dtype, 0) - coded if signed else 0, base, zero)
    shift = down - zero
    size = min(65536, 1 << (8 * grid.word - signed - down))
    tops = np.add.reduceat(hist, np.arange(0, min(len(hist), size << (down - base)), 1 << (down - base)))
    found = _alphabet(tops, 1 + total // 65536)
    if found is None:
        return None
    runs, escapes = found
    lut = _lut(tops, runs, escapes)
    n = sum(runs[1::2]) + len(escapes)
    rows, cols, cells = _classes(read, grid, zero, signed, shift, lut, n, level)
    kr, kc = cells.shape[:2]
    group = cl.join(cells.reshape(kr * kc, 1, n)) if kr * kc > 1 else np.zeros(1, np.uint8)
    freq = np.stack(
        [tables.normalise(c) for c in cl._sum_groups(cells.reshape(kr * kc, n), group, int(group.max()) + 1)]
    )
    order, packed = min(((o, tables.to_bytes(freq, o)) for o in range(-2, 2)), key=lambda v: len(v[1]))
    row_list, col_list = _class_list(rows), _class_list(cols)
    lanes = _lane_count(level.lanes, min(total, grid.tr * grid.tc))
    p = ll.Lanes(
        lanes, zero, signed, shift, tuple(runs), tuple(escapes), len(freq), order, kr, kc,
        (len(packed), len(row_list), len(col_list)),
    )  # fmt: skip
    shared = packed + row_list + col_list + group.tobytes()
    tiles = grid.down * grid.across
    length = cl.log2(np.full(1, 4096)) - cl.log2(freq.astype(np.int64))
    counts = cl._sum_groups(cells.reshape(kr * kc, n), group, len(freq))
    bits = int((counts * length).sum()) // cl.UNIT
    escaped = int(counts[:, p.first_escape :].sum())
    estimate = bits // 8 + escaped + len(shared) + 200 + tiles * (16 + 12 * lanes)
    estimate += sum(ll.plane_sizes(total, p))
    out = replace(
        plan, method="lanes/1", lanes=p, shared=shared, freq=freq, rows=rows, cols=cols,
        table=group.reshape(kr, kc), lut=lut,
    )  # fmt: skip
    return out, estimate


def _lane_count(most: int, elements: int) -> int:
    """Lanes of at least 4096 symbols each, as a power of two."""
    lanes = 1
    while lanes < most and elements >= 8192 * lanes:
        lanes *= 2
    return lanes


def _lut(tops: Array, runs: list[int], escapes: list[int]) -> NDArray[np.uint8]:
    lut = np.zeros(65536, np.uint8)
    first = sum(runs[1::2])
    for j in reversed(range(len(escapes))):
        lut[escapes[j] : escapes[j] + 256] = first + j
    at = 0
    for start, n in zip(runs[::2], runs[1::2], strict=True):
        lut[start : start + n] = np.arange(at, at + n)
        at += n
    return lut


def _class_list(classes: NDArray[np.uint8] | None) -> bytes:
    if classes is None:
        return b""
    packed = zstd.compress(classes.tobytes())
    return packed if len(packed) < len(classes) else classes.tobytes()


def _classes(
    read: Read, grid: ll.Grid, zero: int, signed: bool, shift: int, lut: Array, n: int, level: Level
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None, cl.Counts]:
    """Row classes, column classes (None: one class), and the symbol counts (Kr, Kc, n) of each pair."""
    total = grid.rows * grid.cols

    def count(row: Array | None, col: Array | None, keys: int, every: int = 1) -> Array:
        out = np.zeros((keys, n), np.uint32)
        for a, b in chunks(grid):
            if a // max(1, b - a) % every:
                continue
            sym = native.symbols(read(a, b), zero, signed, shift, lut)
            out += native.histogram(sym, None if row is None else row[a:b], col, keys, n)
        return out

    def key(classes: NDArray[np.uint8] | None, scale: int) -> Array | None:
        return None if classes is None else classes.astype(np.int32) * np.int32(scale)

    rows = cols = None
    kr = kc = 1
    if level.row_classes > 1 and grid.rows >= 16 and total >= 8192 and grid.rows * n <= COUNTS:
        hist = _row_counts(read, grid, zero, signed, shift, lut, n, None, 1)
        found, agg = cl.cluster(hist, level.row_classes, level.rounds)
        kr = len(agg)
        rows = found if kr > 1 else None
        if level.col_classes == 1:
            return rows, None, agg
    if level.col_classes > 1 and grid.cols >= 16 and total >= 8192 and grid.cols * n * kr <= COUNTS:
        for again in (True, False):
            hist = count(key(rows, grid.cols), np.arange(grid.cols, dtype=np.int32), kr * grid.cols)
            hist = hist.reshape(kr, grid.cols, n).transpose(1, 0, 2)
            found, agg = cl.cluster(np.ascontiguousarray(hist), level.col_classes, level.rounds)
            kc = len(agg)
            cols = found if kc > 1 else None
            if not again or kc == 1 or grid.rows < 16 or grid.rows * n * kc > COUNTS:
                break
            hist = _row_counts(read, grid, zero, signed, shift, lut, n, key(cols, 1), kc)
            found, agg = cl.cluster(hist, level.row_classes, level.rounds)
            kr = len(agg)
            rows = found if kr > 1 else None
    cells = count(key(rows, kc), key(cols, 1), kr * kc)
    return rows, cols, cells.astype(np.int64).reshape(kr, kc, n)


def _row_counts(
    read: Read, grid: ll.Grid, zero: int, signed: bool, shift: int, lut: Array, n: int, col: Array | None, kc: int
) -> Array:
    """(R, Kc, n) symbol counts of every row."""
    out = np.empty((grid.rows, kc, n), np.uint32)
    for a, b in chunks(grid):
        sym = native.symbols(read(a, b), zero, signed, shift, lut)
        row = np.arange(b - a, dtype=np.int32) * np.int32(kc)
        out[a:b] = native.histogram(sym, row, col, (b - a) * kc, n).reshape(b - a, kc, n)
    return out
