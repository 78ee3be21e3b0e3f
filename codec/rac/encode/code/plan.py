"""One look at a tensor: how it is cut into tiles, which method stores it, and with which parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.encode.code import classes as cl
from rac.entropy import tables
from rac.registry import DTYPES
from rac.stages.lanes import layout as ll

Array = NDArray[Any]
Source = Callable[[ll.Grid, int, int], Array]
Read = Callable[[int, int], Array]
"""Words (h, C) of the rows [start, stop) of the matrix."""

CUTS = ((1, 74_000), (2, 178_000), (4, 578_000), (8, 1 << 62))
"""Tiles along each side up to which stored size: an eighth of the rows or columns then costs no more than 1.1 times its
share of the stored bytes and 64 KB."""
COARSE = ((1, 1_150_000), (2, 2_700_000), (4, 8_800_000), (8, 1 << 62))
"""The same for 1 MB."""
SLICES = ("fine", "coarse")
PAIR_RARE = 45000
"""A pair rarer than that costs more as one of 4096 frequency units than as two escapes of 8 bits."""
RARE = {1: 65536, 2: 4096}
"""Per elements per symbol: one top in so many occurrences is too rare for a symbol of its own."""
CHUNK = 1 << 22
HELD = 1 << 25
"""Bytes of a tensor that is read once and held until it is coded; a larger one is read again, in chunks."""
SAMPLE = {1: 1 << 17, 2: 1 << 15}
"""Per elements per symbol: bytes that general compressors are tried on."""
_MANTISSA = {"F64": 52, "F32": 23, "C64": 23, "BF16": 7, "F16": 10}
_CODED = {"F64": 5, "F32": 4, "C64": 4, "BF16": 4, "F16": 3}
_BYTES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8")


@dataclass(frozen=True, slots=True)
class Level:
    """What an effort level tries. It changes sizes and time, never the result of decoding."""

    name: str
    lanes: int
    per: int
    row_classes: int
    col_classes: int
    rounds: int
    again: bool
    fewer_bits: int
    zstd: int
    planes: int
    fixed: bool = False
    """Take `lanes` as it is, however small the tile."""
    tile: int = 1 << 20
    """Words of a tile at most."""
    coarse: bool = False
    """Cut into tiles by COARSE."""
    sliced: float = 0.0
    """Stored bytes of a word, about, where tiles were asked for; 0: as its type has them."""
    density: float = 0.0
    """The same, of the tiles that are cut."""


LEVELS = {
    level.name: level
    for level in (
        Level("fast", 32, 2, 1, 1, 0, False, 0, 3, 1),
        Level("default", 32, 2, 8, 6, 2, False, 0, 9, 1),
        Level("max", 16, 1, 16, 8, 5, True, 2, 19, 9, coarse=True),
    )
}
"""Of which `max` is for size alone: fine tiles cost 0.1 %, so that they must be asked for."""

CODER = Level("default", 32, 1, 8, 6, 2, False, 0, 9, 1, tile=1 << 18, coarse=True, sliced=0.5)
"""How the integers of quantised tensors are coded. In smaller tiles than what is lossless, since a GPU steps once for
each of them, not for two, and needs as many lanes at once as it can get (docs/gpu.md). But coarse: a trellis begins
anew in each, which costs 0.5 to 1 % of the bytes of small matrices (docs/streaming.md)."""


def tuned(level: Level, lanes: int | None, slices: str | None) -> Level:
    """A level with the lanes per tile and the tiles ("fine" or "coarse") that were asked for; None: its own.

    Where only lanes are given, tiles are coarse, since each has so many lanes.
    """
    if lanes is not None:
        level = replace(level, lanes=lanes, fixed=True, coarse=True)
    if slices is not None:
        level = replace(level, coarse=slices == "coarse", density=level.sliced)
    return level


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
    pair_map: NDArray[np.uint8] | None = None
    words: Array | None = None
    """The words of a small tensor, which need not be read again."""
    base: NDArray[np.uint8] | None = None
    """(R, C) base symbols of the whole tensor, held from the analysis to the encoding."""
    coded: tuple[tuple[ll.Order, NDArray[np.uint8]], ...] = ()
    """Order and coded symbols of every tile, where the analysis has counted pairs."""
    rare: NDArray[np.bool_] | None = None
    """(T, symbols) pairs that are stored as two escapes, since a frequency of their own would cost more."""
    bits: int = 0
    """Of a word, of bits/1 only."""

    @property
    def stage(self) -> dict[str, Any]:
        """The stage map of the coder."""
        if self.lanes:
            return self.lanes.to_head()
        return {"bits": self.bits, "id": self.method} if self.bits else {"id": self.method}


def axis_of(shape: tuple[int, ...]) -> int:
    """Dimensions that count as rows: all but the last, or the first alone where the last ones are short."""
    if len(shape) > 1 and shape[-1] < 64:
        return 1
    return max(0, len(shape) - 1)


def grid_of(dtype: str, shape: tuple[int, ...], axis: int, level: Level) -> ll.Grid:
    """Tiles as large as slices and the level allow: long lanes are small and fast."""
    rows, cols = ll.matrix(dtype, shape, axis)
    d = DTYPES[dtype]
    stored = (
        rows
        * cols
        * (level.density or d.word * (0.7 if d.signed_float and d.word == 2 else 0.85 if d.signed_float else 1))
    )
    parts = next(n for n, most in (COARSE if level.coarse else CUTS) if stored <= most)
    tc = max(1, -(-cols // parts) if cols >= 128 else cols)
    tc = -(-tc // -(-tc // level.tile))
    tr = max(1, -(-rows // parts))
    tr = -(-tr // -(-tr // max(1, level.tile // tc)))  # equal pieces: a slice ends where tiles do
    return ll.Grid(rows, cols, d.word, tr, tc)


def chunks(grid: ll.Grid) -> Iterator[tuple[int, int]]:
    """Row ranges of about 4 MiB, or all rows of a tensor that is held."""
    row = max(1, grid.cols * grid.word)
    step = grid.rows if grid.rows * row <= HELD else max(1, CHUNK // row)
    for a in range(0, grid.rows, step):
        yield a, min(grid.rows, a + step)


def analyse(source: Source, dtype: str, shape: tuple[int, ...], level: Level) -> Plan:
    """Choose method and parameters; reads the tensor once or a few times, some MiB at a time."""
    axis = axis_of(shape)
    grid = grid_of(dtype, shape, axis, level)
    digest = zstd.Digest()

    def read(a: int, b: int) -> Array:
        return source(grid, a, b)

    signed = DTYPES[dtype].signed_float
    bits = 8 * grid.word - signed
    # pairs of exponents need no more than these; their histogram is small and counted fast
    base = _MANTISSA.get(dtype, 0) if level.per == 2 else 0
    base = max(base, bits - 16, 0)
    hist = np.zeros(65536, np.uint32)
    total = grid.rows * grid.cols
    cache = None
    union = 0
    if total:
        for a, b in chunks(grid):
            words = read(a, b)
            digest.update(words.data.cast("B"))
            union |= native.scan(words, (1 << bits) - 1, base, hist)
            if b - a == grid.rows:
                cache = words
    if cache is not None:  # the tensor is small: keep it
        held = cache

        def read(a: int, b: int) -> Array:
            return held[a:b]

    plan = Plan("raw/1", grid, axis, digest.value(), level.name, words=cache)
    if not total:
        return plan
    sample = _sample(read, grid, SAMPLE[level.per])
    raw_size = total * grid.word
    best = raw_size - 64
    if (dtype in _MANTISSA or dtype in _BYTES) and total >= 2048:
        zero = (union & -union).bit_length() - 1 if union & ((1 << bits) - 1) else 0
        for per, coded in _candidates(dtype, level):
            if per == 1 and base > max(bits - 16, 0):  # pairs do not serve: count the mantissa too
                base = max(bits - 16, 0)
                hist = np.zeros(65536, np.uint32)
                for a, b in chunks(grid):
                    native.scan(read(a, b), (1 << bits) - 1, base, hist)
            found = _lanes(read, sample, plan, dtype, hist, base, zero, coded, per, level)
            if found and found[1] < best:
                plan, best = found
            if found and per == 2:
                break
    size = _zstd_estimate(sample, grid, level)
    if size < best * 0.98:
        plan = Plan("zstd/1", grid, axis, plan.digest, level.name, words=cache)
    return plan


def _candidates(dtype: str, level: Level) -> list[tuple[int, int]]:
    """(elements per symbol, mantissa bits in the top) to try; where pairs serve, the rest is not tried."""
    start = _CODED.get(dtype, 0)
    out = [(1, coded) for coded in range(start, max(-1, start - 1 - level.fewer_bits), -1)]
    return [(2, 0), *out] if level.per == 2 and dtype in _MANTISSA else out


def _sample(read: Read, grid: ll.Grid, size: int) -> Array:
    """Words (1, n): all of a small tensor, or rows of eight places of a large one."""
    if grid.rows * grid.cols * grid.word <= 1 << 17:
        return read(0, grid.rows).reshape(1, -1)
    rows = max(1, size // 8 // max(1, grid.cols * grid.word))
    at = sorted({int(a) for a in np.linspace(0, max(0, grid.rows - rows), 8)})
    parts = [read(a, min(grid.rows, a + rows))[:, : size // 8 // grid.word].reshape(-1) for a in at]
    return np.concatenate(parts).reshape(1, -1)


def _zstd_estimate(sample: Array, grid: ll.Grid, level: Level) -> int:
    """Bytes that zstd would need for the whole tensor."""
    whole = sample.size == grid.rows * grid.cols
    size = len(zstd.compress(shuffle(sample), level.zstd if whole else 3))
    return size * grid.rows * grid.cols // sample.size


def _plane_estimate(sample: Array, grid: ll.Grid, p: ll.Lanes, level: Level) -> int:
    """Bytes of the raw planes of the whole tensor, compressed where that pays."""
    n, size = sample.size, 0
    for (bits, low), plain in zip(p.planes(), ll.plane_sizes(n, p), strict=True):
        if p.packed and bits >= 8:
            plane = (sample.reshape(-1) >> sample.dtype.type(p.zero + low)).astype(f"<u{bits // 8}")
            plain = min(plain, len(zstd.compress(plane.tobytes(), level.planes)))
        size += plain
    return size * grid.rows * grid.cols // n


def shuffle(words: Array) -> bytes:
    """Bytes of all words, lowest bytes first (stages/zstd.md)."""
    w = words.dtype.itemsize
    return np.ascontiguousarray(np.ascontiguousarray(words).reshape(-1).view(np.uint8).reshape(-1, w).T).tobytes()


def _alphabet(hist: Array, entries: int, most: int) -> tuple[list[int], list[int]] | None:
    """Symbol runs and escape bases for the tops counted in `hist`: a rare top costs less as an escape.

    None where `most` base symbols cannot hold them without many escapes.
    """
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
        if high - low + max(len(escapes), most < 256) + zero <= most:  # rare pairs need an escape
            break
        if len(escapes) > most // 2 or high - low < 2:
            return None
        if hist[low] <= hist[high - 1]:
            low += 1
        else:
            high -= 1
    if most < 256:
        escaped = int(hist.sum()) - int(hist[low:high].sum()) - (int(hist[0]) if zero else 0)
        if escaped * 64 > int(hist.sum()):
            return None
        escapes = escapes or [low]
    if high - low + zero + len(escapes) < 2:
        high, low = (high + 1, low) if high < len(hist) else (high, low - 1)
    return ([0, 1] if zero else []) + [low, high - low], escapes


def _lanes(
    read: Read,
    sample: Array,
    plan: Plan,
    dtype: str,
    hist: Array,
    base: int,
    zero: int,
    coded: int,
    per: int,
    level: Level,
) -> tuple[Plan, int] | None:
    grid = plan.grid
    signed = DTYPES[dtype].signed_float
    total = grid.rows * grid.cols
    least = 1 + total // RARE[per]
    down = max(_MANTISSA.get(dtype, 0) - coded if signed else 0, base, zero)
    shift = down - zero
    size = min(65536, 1 << (8 * grid.word - signed - down))
    tops = np.add.reduceat(hist, np.arange(0, min(len(hist), size << (down - base)), 1 << (down - base)))
    found = _alphabet(tops, least, 256 if per == 1 else ll.MAX_BASE)
    if found is None:
        return None
    runs, escapes = found
    lut = _lut(tops, runs, escapes)
    n = sum(runs[1::2]) + len(escapes)
    symbols = np.empty((grid.rows, grid.cols), np.uint8)
    for a, b in chunks(grid):
        symbols[a:b] = native.symbols(read(a, b), zero, signed, shift, lut)
    weight = n if per == 2 else 1  # a table of pairs costs about that much more than one of base symbols
    # Column classes slow a decoder down where it cannot permute a row of a tile in registers.
    wide = not level.again and dtype in _MANTISSA and (grid.word != 2 or grid.tc > 64)
    rows, cols, cells = _classes(symbols, n, weight, replace(level, col_classes=1) if wide else level)
    kr, kc = cells.shape[:2]
    group = cl.join(cells.reshape(kr * kc, 1, n), None, weight) if kr * kc > 1 else np.zeros(1, np.uint8)
    lanes = _lane_count(level, min(total, grid.tr * grid.tc))
    p = ll.Lanes(
        lanes,
        per,
        zero,
        signed,
        shift,
        tuple(runs),
        tuple(escapes),
        int(group.max()) + 1,
        0,
        kr,
        kc,
        (0, 0, 0),
        grid.word >= 4,
    )
    table = group.reshape(kr, kc)
    out = replace(plan, method="lanes/1", lanes=p, rows=rows, cols=cols, table=table, base=symbols)
    if per == 2:
        out = replace(out, pair_map=_pair_map(p))
        counts, out = _pair_counts(out, p)
        counts, rare = _rare_pairs(counts, p)
        out = replace(out, rare=rare)
    else:
        counts = cl.sum_groups(cells.reshape(kr * kc, n), group, p.tables)
    freq = np.stack([tables.normalise(c) for c in counts])
    order, packed = min(((o, tables.to_bytes(freq, o)) for o in range(-2, 2)), key=lambda v: len(v[1]))
    row_list, col_list = _class_list(rows), _class_list(cols)
    p = replace(p, order=order, sizes=(len(packed), len(row_list), len(col_list)))
    shared = packed + row_list + col_list + group.tobytes()
    tiles = grid.down * grid.across
    bits = int((counts * (cl.log2(np.full(1, 4096)) - cl.log2(freq.astype(np.int64)))).sum()) // cl.UNIT
    escaped = int(tops.sum()) - int(sum(tops[a : a + k].sum() for a, k in zip(runs[::2], runs[1::2], strict=True)))
    estimate = bits // 8 + escaped + len(shared) + 200 + tiles * (16 + 12 * lanes)
    estimate += _plane_estimate(sample, grid, p, level)
    return replace(out, lanes=p, shared=shared, freq=freq), estimate


def _pair_map(p: ll.Lanes) -> NDArray[np.uint8]:
    out = np.zeros(256, np.uint8)
    pairs = p.pairs().astype(np.int64)
    out[pairs[:, 0] | pairs[:, 1] << 4] = np.arange(len(pairs), dtype=np.uint8)
    return out


def _pair_counts(plan: Plan, p: ll.Lanes) -> tuple[cl.Counts, Plan]:
    """(T, symbols) how often each pair occurs under each table, in the order in which tiles code them."""
    counts = np.zeros((p.tables, p.symbols), np.uint32)
    held = []
    for i in range(plan.grid.down * plan.grid.across):
        order, sym = sequence(plan, i)
        native.count_segments(sym, order.segments, counts)
        held.append((order, sym))
    return counts.astype(np.int64), replace(plan, coded=tuple(held))


def _rare_pairs(counts: cl.Counts, p: ll.Lanes) -> tuple[cl.Counts, NDArray[np.bool_] | None]:
    """Counts without the rarest pairs, which become two escapes; and which these are, (T, symbols)."""
    if not p.escapes or max(p.runs) >= p.escapes[0] + 256:
        return counts, None
    rare = (counts > 0) & (counts * PAIR_RARE < counts.sum(1, keepdims=True))
    rare[:, p.first_escaping :] = False
    both = int(np.flatnonzero((p.pairs() == p.first_escape).all(1))[0])
    moved = np.where(rare, counts, 0).sum(1)
    counts = np.where(rare, 0, counts)
    counts[:, both] += moved
    return counts, rare if rare.any() else None


def gather(order: ll.Order, tile: Array) -> Array:
    """Elements of `tile` (h, w) in sequence order."""
    done = native.gather(tile, order.rows, order.cols, order.blocks)
    if done is not None:
        return done
    if order.rows is not None:
        tile = tile[order.rows]
    if order.cols is not None:
        tile = tile[:, order.cols]
    return np.concatenate([tile[a:b, c:d].reshape(-1) for _, a, b, c, d in order.blocks.tolist()])


def sequence(plan: Plan, i: int) -> tuple[ll.Order, NDArray[np.uint8]]:
    """(order, coded symbols in sequence order) of tile `i`."""
    if plan.coded:
        return plan.coded[i]
    p = plan.lanes
    assert p is not None and plan.table is not None and plan.base is not None  # noqa: PT018, S101
    r0, r1, c0, c1 = plan.grid.box(i)
    order = ll.order(
        p,
        None if plan.rows is None else plan.rows[r0:r1],
        None if plan.cols is None else plan.cols[c0:c1],
        r1 - r0,
        c1 - c0,
        plan.table,
    )
    base = gather(order, plan.base[r0:r1, c0:c1])
    return order, base if plan.pair_map is None else native.pair(base, order.sizes, plan.pair_map)


def _lane_count(level: Level, elements: int) -> int:
    """Lanes of at least 4500 elements each, as a power of two; never more than 2**17 elements in one.

    A lane of so many elements has at most 2**17 * 12 / 32 words, which its 16-bit count can hold.
    """
    lanes = level.lanes if level.fixed else 1
    while (lanes < level.lanes and elements >= 9000 * lanes) or elements > lanes << 17:
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
    return b"" if classes is None else zstd.shorter(classes.tobytes())


def _classes(
    symbols: NDArray[np.uint8], n: int, weight: int, level: Level
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None, cl.Counts]:
    """Row classes, column classes (None: one class), and the symbol counts (Kr, Kc, n) of each pair.

    `weight` is the length of a table against one of n symbols.
    """
    r, c = symbols.shape

    def key(classes: NDArray[np.uint8] | None, scale: int) -> Array | None:
        return None if classes is None else classes.astype(np.int32) * np.int32(scale)

    def cluster(vectors: cl.Vectors, of: int, groups: int, most: int) -> tuple[NDArray[np.uint8] | None, int]:
        found, agg = cl.cluster(vectors, of, groups * n, most, level.rounds, weight)
        return (found, len(agg)) if len(agg) > 1 else (None, 1)

    def of_rows(a: int, b: int) -> Array:
        by_row = np.arange(b - a, dtype=np.int32) * np.int32(kc)
        return native.histogram(symbols[a:b], by_row, key(cols, 1), (b - a) * kc, n).reshape(b - a, kc, n)

    def of_cols(a: int, b: int) -> Array:
        strip, by_col = np.ascontiguousarray(symbols[:, a:b]), np.arange(b - a, dtype=np.int32)
        hist = native.histogram(strip, key(rows, b - a), by_col, kr * (b - a), n)
        return np.ascontiguousarray(hist.reshape(kr, b - a, n).transpose(1, 0, 2))

    rows = cols = None
    kr = kc = 1
    enough = min(r, c) >= 16 and symbols.size >= 8192
    can_rows = level.row_classes > 1 and enough
    if can_rows:
        rows, kr = cluster(of_rows, r, 1, level.row_classes)
    if level.col_classes > 1 and enough:
        cols, kc = cluster(of_cols, c, kr, level.col_classes)
        if level.again and kc > 1 and can_rows:
            rows, kr = cluster(of_rows, r, kc, level.row_classes)
    cells = native.histogram(symbols, key(rows, kc), key(cols, 1), kr * kc, n)
    return rows, cols, cells.astype(np.int64).reshape(kr, kc, n)
