"""lanes/1: how the unit of a tile is laid out, and the order of its words (format_spec/stages/lanes.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.errors import FormatError
from rac.grid import up16
from rac.native.prototypes import Array
from rac.stages.lanes.parameters import Lanes


def unpack_planes(
    planes: Sequence[memoryview | Array], n: int, cuts: list[tuple[int, int]], kind: type = np.uint64
) -> Array:
    """Bits (n,) of type `kind` out of the planes that `cut_planes` gives. Padding bits of the last byte must be 0."""
    raw: Array = np.zeros(n, kind)
    for (b, low), data in zip(cuts, planes, strict=True):
        if b >= 8:
            v: Array = np.frombuffer(data, f"<u{b // 8}")
        else:
            byte, bits = np.frombuffer(data, np.uint8), np.arange(0, 8, b, dtype=np.uint8)
            v = ((byte[:, None] >> bits) & np.uint8((1 << b) - 1)).ravel()
            if v[n:].any():
                raise FormatError("plane ends in non-zero bits")
        raw |= v[:n].astype(kind) << kind(low)
    return raw


def join(tops: Array, raw: NDArray[np.uint64], p: Lanes, word: int) -> Array:
    """Words (n,) of `word` bytes from tops and raw bits."""
    t = np.uint64
    v = tops.astype(t) << t(p.shift) | raw & t((1 << p.shift) - 1)
    if p.sign:
        v |= (raw >> t(p.shift)) << t(8 * word - p.zero - 1)
    return (v << t(p.zero)).astype(f"<u{word}")


@dataclass(frozen=True, slots=True)
class Tile:
    """Sub-streams of one tile unit, views into it (stages/lanes.md, "Tile"); `words` in the order of reading."""

    counts: NDArray[np.uint16]
    words: NDArray[np.uint32]
    escapes: NDArray[np.uint8]
    planes: list[int]  # offsets of the raw planes


def parse_tile(unit: Array, n: int, p: Lanes) -> Tile:
    """Cut `unit` (bytes,) uint8 of a tile of `n` elements whose planes are plain; FormatError unless all fits."""
    w = up16(p.directory)
    if len(unit) < w:
        raise FormatError("tile is shorter than its directory")
    escapes = int.from_bytes(unit[:4].tobytes(), "little")
    counts = unit[4 + p.skip : p.directory].view("<u2")
    words = int(counts.sum(dtype=np.int64))
    e = w + up16(4 * words)
    at = e + up16(escapes)
    planes, ends = [], [(p.directory, w), (w + 4 * words, e), (e + escapes, at)]
    for size in p.plane_sizes(n):
        planes.append(at)
        ends.append((at + size, at + up16(size)))
        at += up16(size)
    if at != len(unit):
        raise FormatError("tile streams do not fill the unit exactly")
    if any(unit[a:b].any() for a, b in ends):
        raise FormatError("padding is not zero")
    coded = unit[w : w + 4 * words].view("<u4")
    start = np.minimum(counts, 2).astype(np.int64)
    if (coded[(np.cumsum(start) - start)[counts > 0]] == 0).any():
        raise FormatError("ANS lane begins with a zero word")
    return Tile(counts, coded, unit[e : e + escapes], planes)


def plain_tile(unit: Array, n: int, p: Lanes) -> Array:
    """`unit` with its compressed planes (frames shorter than the plane) replaced by plain ones, and their sizes."""
    if len(unit) < p.directory:
        raise FormatError("tile is shorter than its directory")
    stored = unit[4 : 4 + p.skip].view("<u4").tolist()
    sizes = p.plane_sizes(n)
    if stored == sizes:
        return unit
    if any(a > b for a, b in zip(stored, sizes, strict=True)):
        raise FormatError("a stored plane is larger than the plane")
    at = len(unit) - sum(map(up16, stored))
    if at < 0:
        raise FormatError("tile streams do not fill the unit exactly")
    out = np.zeros(at + sum(map(up16, sizes)), np.uint8)
    out[:at] = unit[:at]
    out[4 : 4 + p.skip] = np.array(sizes, "<u4").view(np.uint8)
    to = at
    for a, b in zip(stored, sizes, strict=True):
        data = unit[at : at + a]
        if unit[at + a : at + up16(a)].any():
            raise FormatError("padding is not zero")
        out[to : to + b] = data if a == b else np.frombuffer(zstd.decompress(data.data, b), np.uint8)
        at, to = at + up16(a), to + up16(b)
    return out


def build_tile(
    words: Array, counts: Array, escapes: bytes, planes: Sequence[bytes | memoryview], p: Lanes
) -> NDArray[np.uint8]:
    """Inverse of `parse_tile`: words in the order of reading, words of each lane, escape bytes, planes as stored."""
    directory = len(escapes).to_bytes(4, "little")
    if p.packed:
        directory += np.array([len(plane) for plane in planes], "<u4").tobytes()
    directory += counts.astype("<u2").tobytes()
    pieces = (directory, words.astype("<u4", copy=False), escapes, *planes)
    return padded([np.frombuffer(piece, np.uint8) for piece in pieces])


def padded(pieces: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pieces one after the other, each with zero bytes up to a multiple of 16."""
    out, at = np.zeros(sum(up16(len(piece)) for piece in pieces), np.uint8), 0
    for piece in pieces:
        out[at : at + len(piece)] = piece
        at += up16(len(piece))
    return out


@dataclass(frozen=True, slots=True)
class Order:
    """Sequence order of one tile: rows and columns sorted by class (stable), then blocks sorted by table."""

    rows: NDArray[np.int32] | None
    cols: NDArray[np.int32] | None
    blocks: NDArray[np.int64]  # (B, 5): table, first and last + 1 place in `rows`, the same in `cols`
    sizes: NDArray[np.int64]  # (S,) elements of each segment: all blocks of one table
    segments: NDArray[np.int64]  # (S, 2): coded symbols, table


def order(p: Lanes, row_class: Array | None, col_class: Array | None, h: int, w: int, table: Array) -> Order:
    """Order of a tile of h x w; classes of its rows and columns (None: all 0), `table` (Kr, Kc) uint8."""
    rows, re = _sorted(row_class, h, table.shape[0])
    cols, ce = _sorted(col_class, w, table.shape[1])
    i, j = (re[1:] > re[:-1]).nonzero()[0], (ce[1:] > ce[:-1]).nonzero()[0]  # no tile pays for classes that it lacks
    tables = table[i][:, j].reshape(-1)
    at = np.argsort(tables, kind="stable")
    a, b = np.divmod(at, len(j))
    i, j = i[a], j[b]
    blocks = np.stack([tables[at].astype(np.int64), re[i], re[i + 1], ce[j], ce[j + 1]], axis=1)
    n = (blocks[:, 2] - blocks[:, 1]) * (blocks[:, 4] - blocks[:, 3])
    sizes = np.bincount(blocks[:, 0], n, p.tables).astype(np.int64)  # exact: counts below 2**53
    used = np.flatnonzero(sizes)
    return Order(rows, cols, blocks, sizes[used], np.stack([p.steps(sizes[used]), used], axis=1))


def lane_steps_all(segments: NDArray[np.int64], lanes: int) -> NDArray[np.int64]:
    """(L, S) symbols of each lane per segment of (symbols, table): symbol i of a segment belongs to lane i mod L."""
    out: NDArray[np.int64] = np.maximum(0, -(-(segments[:, 0] - np.arange(lanes)[:, None]) // lanes))
    return out


def _sorted(classes: NDArray[np.uint8] | None, n: int, k: int) -> tuple[NDArray[np.int32] | None, NDArray[np.int64]]:
    if classes is None or k == 1:
        return None, np.array([0, n], np.int64)
    ends = np.concatenate([[0], np.cumsum(np.bincount(classes, minlength=k))])
    return np.argsort(classes, kind="stable").astype(np.int32), ends
