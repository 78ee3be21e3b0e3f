"""The encoder of lanes/1: classes of rows and columns, an alphabet of tops, tables, and tiles to units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import wire, zstd
from rac.encode.code import classes as clusters
from rac.encode.code.fitted import fit
from rac.encode.code.plan import CHUNK, LARGE, MANTISSA, Level, Plan, View, chunks
from rac.encode.code.tiles import Symbols, Tiles
from rac.encode.encoded import Bytes
from rac.grid import up16
from rac.registry import DTYPES
from rac.stages.lanes import layout
from rac.stages.lanes.parameters import MAX_BASE, Lanes

Array = NDArray[Any]
RARE = {1: 65536, 2: 4096}  # per elements per symbol: a top that is rarer has no symbol of its own
_CODED = {"F64": 5, "F32": 4, "C64": 4, "BF16": 4, "F16": 3}  # bits of a mantissa in the top, at most
_BYTES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4", "I8", "U8")
_SCALED = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Codes whose scales are those of blocks: rows and columns inside one differ as much as those of the matrix do."""
_LARGE = 1 << 20  # words from which on more classes of them pay
_LEAST = 2048  # words below which tables would cost more than they gain


class Base:
    """Base symbols (R, C) of a tensor: held, or where it is large made anew, some rows of tiles at a time."""

    def __init__(self, view: View, of: Callable[[Array], NDArray[np.uint8]]) -> None:
        """`of` gives the symbols of words."""
        self._view, self._of = view, of
        self.all: NDArray[np.uint8] | None = None
        if view.words is not None:
            self.all = of(view.words)
        elif view.size < LARGE:
            self.all = np.empty((view.grid.rows, view.grid.cols), np.uint8)
            for a, b in chunks(view.grid):
                self.all[a:b] = of(view.read(a, b))

    def parts(self, a: int, b: int) -> Iterator[tuple[NDArray[np.uint8], int, int]]:
        """(Symbols, first row, row behind the last) of the rows [a, b), all in one or some rows of tiles each."""
        if self.all is not None:
            yield self.all[a:b], a, b
            return
        grid = self._view.grid
        step = max(1, CHUNK // (grid.tr * grid.cols * grid.word)) * grid.tr
        for start in range(a // step * step, b, step):
            x, y = max(a, start), min(b, start + step)
            yield self._of(self._view.read(x, y)), x, y

    def sum(self, of: Callable[[NDArray[np.uint8], int, int], Array]) -> Array:
        """The sum of what `of` counts in each of the `parts` of all rows."""
        total: Array | None = None
        for part in self.parts(0, self._view.grid.rows):
            found = of(*part)
            total = found if total is None else total + found.astype(np.int64)
        assert total is not None  # noqa: S101 - there are rows
        return total


class LanesEncoder:
    """Codes the tiles of one tensor by lanes/1."""

    def __init__(self, plan: Plan, tiles: Tiles, view: View) -> None:
        """Tiles whose tables are set."""
        self.plan, self.words, self._tiles, self._level = plan, view.words, tiles, view.level.planes

    @classmethod
    def propose(cls, view: View, best: int) -> tuple[Self, int] | None:
        """The best of the alphabets that the level tries; None where none takes less than `best`."""
        if (view.dtype not in MANTISSA and view.dtype not in _BYTES) or view.total < _LEAST:
            return None
        start = _CODED.get(view.dtype, 0)
        tries = [(1, coded) for coded in range(start, max(-1, start - 1 - view.level.fewer_bits), -1)]
        if view.level.per == 2 and view.dtype in MANTISSA:  # where pairs serve, the rest is not tried
            tries.insert(0, (2, 0))
        out = None
        for per, coded in tries:
            if per == 1:  # pairs do not serve: count the mantissa too
                view.count_all()
            found = cls._try(view, per, coded)
            if found and found[1] < best:
                out, best = found, found[1]
            if found and per == 2:
                break
        return out

    @classmethod
    def _try(cls, view: View, per: int, coded: int) -> tuple[Self, int] | None:
        """An encoder for tops of `coded` bits of the mantissa, and its size; None where no alphabet holds them."""
        grid, signed = view.grid, DTYPES[view.dtype].signed_float
        zero = (view.union & -view.union).bit_length() - 1 if view.union & view.mask else 0
        down = max(MANTISSA.get(view.dtype, 0) - coded if signed else 0, view.base, zero)
        # how often each top occurs: the bits of a word from `down` on, without its sign
        size, step = min(65536, 1 << (view.mask.bit_length() - down)), 1 << (down - view.base)
        tops = np.add.reduceat(view.hist, np.arange(0, min(len(view.hist), size * step), step))
        found = _alphabet(tops, 1 + view.total // RARE[per], 256 if per == 1 else MAX_BASE)
        if found is None:
            return None
        runs, escapes = found
        kept = np.concatenate([np.arange(a, a + k) for a, k in zip(runs[::2], runs[1::2], strict=True)])
        symbols, cells, base = _symbols(view, (zero, signed, down - zero), kept, escapes, per)
        n, (kr, kc), group = cells.shape[2], cells.shape[:2], symbols.table.reshape(-1)
        p = Lanes(
            lanes=_lane_count(view.level, min(view.total, grid.tr * grid.tc)),
            per=per,
            zero=zero,
            sign=signed,
            shift=down - zero,
            runs=tuple(runs),
            escapes=tuple(escapes),
            tables=int(group.max()) + 1,
            order=0,
            rows=kr,
            cols=kc,
            sizes=(0, 0, 0),
            packed=grid.word >= 4,
        )
        tiles = Tiles(p, grid, symbols.lut, symbols.rows, symbols.cols, symbols.table)
        if per == 2:
            fitted = fit(base.sum(lambda some, a, _: tiles.count(some, a)), p)
        else:
            fitted = fit(clusters.sum_groups(cells.reshape(kr * kc, n), group, p.tables), p)
        lists = [b"" if c is None else zstd.shorter(c.tobytes()) for c in (symbols.rows, symbols.cols)]
        p = replace(p, order=fitted.order, sizes=(len(fitted.packed), *map(len, lists)))
        front = b"".join((fitted.packed, *lists, group.tobytes()))
        tiles.p = p
        tiles.take(fitted)
        out = cls(view.plan(p, front), tiles, view)
        escaped = int(tops.sum()) - int(tops[kept].sum())
        return out, fitted.length // clusters.UNIT // 8 + escaped + _around(view, p)

    def encode(self, words: Array, rows: range) -> list[Bytes]:
        """The units of rows of tiles whose words (h, C) are given."""
        units, table = self._tiles.units(words, rows)
        if self._tiles.p.packed:
            return [self._packed(unit).data for unit in units]
        plain: list[Bytes] = [unit.data for unit in units]
        return plain if table is None else wire.Listed(plain, table)

    def _packed(self, unit: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A unit with its planes as frames where that pays: low bits of F32 are often zero in whole rows."""
        p = self._tiles.p
        sizes = unit[4 : 4 + p.skip].view("<u4").tolist()
        at = [len(unit) - sum(map(up16, sizes[k:])) for k in range(len(sizes))]
        planes: list[Bytes] = [unit[a : a + size].data for a, size in zip(at, sizes, strict=True)]
        frames = [zstd.compress(plane, self._level) for plane in planes]
        pairs = zip(planes, frames, strict=True)
        planes = [frame if len(frame) < len(plane) - len(plane) // 128 else plane for plane, frame in pairs]
        front = unit[: at[0] if at else len(unit)].copy()
        front[4 : 4 + p.skip] = np.array([len(plane) for plane in planes], "<u4").view(np.uint8)
        return layout.padded([front, *(np.frombuffer(plane, np.uint8) for plane in planes)])


def _symbols(
    view: View, cut: tuple[int, bool, int], kept: Array, escapes: list[int], per: int
) -> tuple[Symbols, clusters.Counts, Base]:
    """Classes, counts (Kr, Kc, n), base symbols; `cut`: (zero bits, signed, shift), `kept`: tops with symbols."""
    (zero, signed, shift), grid, level = cut, view.grid, view.level
    n, lut = len(kept) + len(escapes), np.zeros(65536, np.uint8)
    for j in reversed(range(len(escapes))):
        lut[escapes[j] : escapes[j] + 256] = len(kept) + j
    lut[kept] = np.arange(len(kept))
    base = Base(view, lambda words: native.symbols(words, zero, signed, shift, lut))
    weight = n if per == 2 else 1  # a table of pairs costs about that much more than one of base symbols
    if view.dtype in _SCALED and level.row_classes > 1 and view.total >= _LARGE:
        level = replace(level, row_classes=max(16, level.row_classes), col_classes=max(8, level.col_classes))
    # Column classes slow a decoder down where it cannot permute a row of a tile in registers.
    wide = not level.again and view.dtype in MANTISSA and (grid.word != 2 or grid.tc > 64)
    most = level.row_classes, 1 if wide else level.col_classes, level.again
    if min(grid.rows, grid.cols) < 16 or view.total < 8192:
        most = 1, 1, False
    found = None if base.all is None else clusters.classify(base.all, n, weight, level.rounds, most)
    rows, cols, cells, group = found or _classes(base, (grid.rows, grid.cols), n, (weight, level.rounds), most)
    return Symbols(lut, rows, cols, group), cells, base


def _around(view: View, p: Lanes) -> int:
    """Bytes beside words and escapes: shared unit, directories, raw planes, compressed where that pays."""
    sample, n, size = view.sample, view.sample.size, 0
    for (bits, low), plain in zip(p.planes(), p.plane_sizes(n), strict=True):
        if p.packed and bits >= 8:
            plane = (sample.reshape(-1) >> sample.dtype.type(p.zero + low)).astype(f"<u{bits // 8}")
            plain = min(plain, len(zstd.compress(plane.tobytes(), view.level.planes)))
        size += plain
    return p.front + 200 + view.grid.tiles * (16 + 12 * p.lanes) + view.scaled(size)


def _alphabet(hist: Array, entries: int, most: int) -> tuple[list[int], list[int]] | None:
    """Symbol runs, and escape bases of the rarer tops counted in `hist`; None where `most` base symbols are too few."""
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


def _lane_count(level: Level, elements: int) -> int:
    """Lanes of 4500 elements and more each, a power of two; a lane of 2**17 is the longest that 16 bits can count."""
    lanes = level.lanes if level.fixed else 1
    while (lanes < level.lanes and elements >= 9000 * lanes) or elements > lanes << 17:
        lanes *= 2
    return lanes


def _classes(
    symbols: Base, shape: tuple[int, int], n: int, how: tuple[int, int], most: tuple[int, int, bool]
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None, clusters.Counts, NDArray[np.uint8]]:
    """What `clusters.classify` gives, in numpy, and where not all symbols are held; `how`: (weight, rounds)."""
    (r, c), (weight, rounds) = shape, how

    def key(classes: NDArray[np.uint8] | None, scale: int) -> Array | None:
        return None if classes is None else classes.astype(np.int32) * np.int32(scale)

    def cluster(vectors: clusters.Vectors, of: int, groups: int, most: int) -> tuple[Array | None, clusters.Counts]:
        found, agg = clusters.cluster(vectors, of, groups * n, most, rounds, weight)
        return (found if len(agg) > 1 else None), agg

    def of_rows(a: int, b: int) -> Array:
        found = []
        for some, x, y in symbols.parts(a, b):
            by_row = np.arange(y - x, dtype=np.int32) * np.int32(kc)
            found.append(native.histogram(some, by_row, key(cols, 1), (y - x) * kc, n).reshape(y - x, kc, n))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def of_cols(a: int, b: int) -> Array:
        def count(some: Array, x: int, y: int) -> Array:
            return native.column_histogram(some[:, a:b], None if rows is None else rows[x:y], kr, n)

        return np.asarray(symbols.sum(count), np.uint32)

    rows = cols = None
    kr = kc = 1
    cells = None
    if most[0] > 1:
        rows, cells = cluster(of_rows, r, 1, most[0])
        kr = len(cells)
    if most[1] > 1:
        cols, found = cluster(of_cols, c, kr, most[1])
        cells, kc = found.transpose(1, 0, 2), len(found)
        if most[2] and kc > 1:
            rows, cells = cluster(of_rows, r, kc, most[0])
            kr = len(cells)
    if cells is None:
        cells = symbols.sum(lambda some, *_: native.histogram(some, None, None, 1, n)).astype(np.int64)[None]
    group = clusters.join(cells.reshape(kr * kc, 1, n), None, weight) if kr * kc > 1 else np.zeros(1, np.uint8)
    return rows, cols, cells, group.reshape(kr, kc)
