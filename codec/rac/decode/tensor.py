"""What a tensor record states, checked, and its units to the dense tensor (format_spec/stages/)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import index as ix
from rac.container import wire
from rac.container.zstd import Digest, xxh3
from rac.decode import tile
from rac.decode.tile import Box
from rac.errors import ChecksumError, FormatError, LimitError, UnsupportedError
from rac.quantize import lossless as ll
from rac.quantize import trellis as tr
from rac.quantize.trellis import Trellis
from rac.records import Limits, Record, Unit
from rac.registry import DTYPES, LOSSY, METHODS

Array = NDArray[Any]
_NEEDED = {"axis", "digest", "dtype", "name", "shape", "stages", "tile", "units"}
_OPTIONAL = {"aliases", "extra", "needs", "uses"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor record, its head checked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    grid: ll.Grid
    method: str
    lanes: ll.Lanes | None
    trellis: tr.Trellis | None
    word: int
    """Bytes of a word of the dense tensor; `grid.word` is that of the words that the coder restores."""
    units: list[Unit]
    digest: bytes
    aliases: tuple[tuple[str, bool], ...]
    extra: dict[str, Any]
    record: Record

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.grid.rows * self.grid.cols * self.word

    @property
    def first(self) -> int:
        """Units in front of the tiles: the shared unit of lanes/1, the unit of trellis/1."""
        return int(self.lanes is not None) + int(self.trellis is not None)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.grid.down * self.grid.across

    def most(self, i: int) -> int:
        """Bytes that unit `i` may have, so that a false size allocates little."""
        if i == 0 and self.lanes is not None:
            return sum(self.lanes.sizes) + self.lanes.rows * self.lanes.cols
        if i < self.first:
            assert self.trellis is not None  # noqa: S101
            return sum(self.trellis.sizes)
        return 2 * self.grid.tr * self.grid.tc * self.grid.word + 65536


def parse(record: Record, limits: Limits) -> Tensor:
    """Check a tensor record's head; nothing larger than the head is allocated."""
    head = record.head
    if missing := _NEEDED - head.keys():
        raise FormatError(f"tensor head lacks {min(missing)!r}", offset=record.at)
    if unknown := [k for k in head.keys() - _NEEDED - _OPTIONAL if not k.startswith("x-")]:
        raise UnsupportedError(f"tensor head has the unknown field {min(unknown)!r}", offset=record.at)
    name, dtype, stages, tile_shape = head["name"], head["dtype"], head["stages"], head["tile"]
    for key in ("needs", "uses"):  # room for transforms, deltas and references of later versions
        if head.get(key, []) != []:
            raise UnsupportedError(f"tensor needs {head[key]!r}, which this version does not know", offset=record.at)
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(head.get("extra", {}), dict):
        raise FormatError("tensor head is malformed", offset=record.at)
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r} is not known to this version", offset=record.at)
    shape = ix.parse_shape(head["shape"], limits)
    if not ix.is_count(head["axis"], len(shape)) or not isinstance(head["digest"], bytes) or len(head["digest"]) != 16:
        raise FormatError("tensor head is malformed", offset=record.at)
    if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) for s in stages):
        raise FormatError("stages are malformed", offset=record.at)
    method, last = stages[0].get("id"), stages[-1].get("id")
    if len(stages) > 2 or method not in METHODS or (len(stages) == 2 and last not in LOSSY):
        ids = ", ".join(str(s.get("id")) for s in stages)
        raise UnsupportedError(f"stages {ids!r} are not known to this version", offset=record.at)
    if not isinstance(tile_shape, list) or len(tile_shape) != 2 or not all(ix.is_count(n) and n for n in tile_shape):
        raise FormatError("tile shape is malformed", offset=record.at)
    ll.dense_size(dtype, shape)
    rows, cols = ll.matrix(dtype, shape, head["axis"])
    word = DTYPES[dtype].word
    tr, tc = min(tile_shape[0], max(1, rows)), min(tile_shape[1], max(1, cols))
    if [tr, tc] != tile_shape:
        raise FormatError("tile is larger than the tensor", offset=record.at)
    if tr * tc * word > limits.tile:
        raise LimitError(f"tile of {tr * tc * word} bytes exceeds the limit of {limits.tile}", offset=record.at)
    trellis = Trellis.from_head(stages[1], dtype) if len(stages) == 2 else None
    grid = ll.Grid(rows, cols, 1 if trellis else word, tr, tc)
    lanes = ll.Lanes.from_head(stages[0], grid.word) if method == "lanes/1" else None
    if lanes is None and stages[0].keys() != {"id"}:
        raise UnsupportedError("unknown stage parameters", offset=record.at)
    units = wire.parse_units(head["units"], record.payload_size)
    if len(units) != grid.down * grid.across + (lanes is not None) + (trellis is not None):
        raise FormatError("number of units does not match the grid of tiles", offset=record.at)
    if lanes is not None and not rows * cols:
        raise FormatError("an empty tensor has no lanes", offset=record.at)
    if trellis is not None and not rows * cols:
        raise FormatError("an empty tensor has no trellis", offset=record.at)
    dense = rows * cols * word
    if dense > limits.free_alloc + limits.expansion * record.payload_size:
        raise LimitError(f"tensor of {dense} bytes from {record.payload_size} stored bytes", offset=record.at)
    out = Tensor(
        name, dtype, shape, head["axis"], grid, method, lanes, trellis, word, units, head["digest"],
        ix.parse_aliases(head.get("aliases", [])), head.get("extra", {}), record,
    )  # fmt: skip
    for i, unit in enumerate(units):
        if unit.size > out.most(i):
            raise FormatError(f"unit {i} is larger than its tile can need", offset=record.payload + unit.offset)
    return out


def extra_of(extra: dict[str, Any], name: str) -> dict[str, Any]:
    """What one name of a tensor carries: its own where it differs from the first, else that of the record."""
    own = extra.get("aliases", {})
    found: Any = own.get(name) if isinstance(own, dict) else None
    return found if isinstance(found, dict) else {k: v for k, v in extra.items() if k != "aliases"}


def empty(t: Tensor) -> Array:
    """The dense matrix of words (R, C), not yet filled."""
    try:
        return np.empty((t.grid.rows, t.grid.cols), f"<u{t.word}")
    except (MemoryError, ValueError) as e:
        raise LimitError(f"not enough memory for a tensor of {t.nbytes} bytes", unit=repr(t.name)) from e


class Decoder:
    """Decodes the units of one tensor, in any order and from any thread."""

    def __init__(self, t: Tensor, first: Sequence[bytes | memoryview], reference: bool = False) -> None:
        """`first` has the units in front of the tiles."""
        self.tensor, self._reference = t, reference
        self.shared: tile.Shared | None = None
        self._tables: tr.Tables | None = None
        for i, unit in enumerate(first):
            self._check(i, unit)
        if t.lanes is not None:
            with self.at(0):
                self.shared = tile.shared(bytes(first[0]), t.lanes, t.grid)
        if t.trellis is not None:
            with self.at(t.first - 1):
                self._tables = tr.parse_unit(bytes(first[-1]), t.trellis, t.dtype, t.grid.rows, t.grid.cols)

    def at(self, i: int) -> wire.At:
        """Context that names unit `i` in the errors that pass."""
        t = self.tensor
        return wire.At(t.name, t.record.payload + t.units[i].offset, i)

    def _check(self, i: int, data: bytes | memoryview) -> None:
        if xxh3(data) != self.tensor.units[i].check:
            with self.at(i):
                raise ChecksumError("checksum does not match")

    def tile(self, i: int, data: Array, out: Array, row: int = 0, col: int = 0) -> None:
        """Check and decode tile `i` from its bytes; `out` begins at word (row, col) of the tensor's matrix."""
        work = Work()
        work.add(self, i, data, out, row, col)
        work.run()

    def prepare(self, i: int, data: Array, dst: Array, box: Box) -> tuple[bytes, Array] | None:
        """Check tile `i`; the kernel's job for it (and what that needs alive), None where Python decodes it."""
        t = self.tensor
        self._check(i + t.first, data.data)
        if self.shared is None or not self.shared.tail or self._reference:
            return None
        assert t.lanes is not None  # noqa: S101
        with self.at(i + t.first):
            return tile.lanes_job(data, t.lanes, self.shared, box, dst)

    def decode(self, i: int, data: Array, dst: Array, box: Box) -> None:
        """Decode tile `i`, checked before, in Python."""
        t = self.tensor
        with self.at(i + t.first):
            if t.lanes is None:
                tile.decode_plain(data, t.method, box, dst)
            else:
                assert self.shared is not None  # noqa: S101
                tile.decode_lanes(data, t.lanes, self.shared, box, dst, self._reference)

    def finish(self, words: Array, dst: Array, box: Box) -> None:
        """Words of a tile, decoded before, to the numbers that they stand for."""
        t = self.tensor
        assert t.trellis is not None  # noqa: S101
        assert self._tables is not None  # noqa: S101
        tr.decode(words, t.trellis, self._tables, box, dst, t.dtype, self._reference)


class Work:
    """Tiles of one or more tensors that are decoded in one call of the kernel, so that threads rarely meet."""

    def __init__(self) -> None:
        self._jobs: list[bytes] = []
        self._of: list[tuple[Decoder, int]] = []
        self._alive: list[Array] = []
        self._others: list[tuple[Decoder, int, Array, Array, Box]] = []
        self._after: list[tuple[Decoder, Array, Array, Box]] = []

    def add(self, dec: Decoder, i: int, data: Array, out: Array, row: int = 0, col: int = 0) -> None:
        """Check the bytes of tile `i` and take it in; `data` and `out` stay as they are until `run` is done."""
        r0, r1, c0, c1 = box = dec.tensor.grid.box(i)
        dst = out[r0 - row : r1 - row, c0 - col : c1 - col]
        if dec.tensor.trellis:
            words = np.empty(dst.shape, np.uint8)
            self._after.append((dec, words, dst, box))
            dst = words
        job = dec.prepare(i, data, dst, box)
        if job is None:
            self._others.append((dec, i, data, dst, box))
        else:
            self._jobs.append(job[0])
            self._alive += (job[1], dst)
            self._of.append((dec, i))

    def run(self) -> None:
        """Decode all. FormatError or ChecksumError of the first that is wrong."""
        if self._jobs and (wrong := native.decode_tiles(self._jobs)):
            number, error, text = wrong
            dec, i = self._of[number]
            with dec.at(i + dec.tensor.first):
                raise error(text)
        for dec, i, data, dst, box in self._others:
            dec.decode(i, data, dst, box)
        for dec, words, dst, box in self._after:
            dec.finish(words, dst, box)


def check_digest(t: Tensor, matrix: Array) -> None:
    """ChecksumError unless the decoded content has the digest that the record states."""
    d = Digest()
    d.update(np.ascontiguousarray(matrix).reshape(-1).view(np.uint8).data)
    if d.value() != t.digest:
        raise ChecksumError("the decoded tensor is not the one that was packed", unit=repr(t.name), offset=t.record.at)


def parts(
    grid: ll.Grid, lanes: ll.Lanes | None, lossy: bool, sizes: list[int], first: Callable[[int, int], bytes]
) -> tuple[int, ...]:
    """Payload bytes by kind (records.PARTS) of units of `sizes`; `first(i, n)` gives the first n bytes of unit i."""
    front = int(lanes is not None) + int(lossy)
    out = [sum(sizes[:front]), 0, 0, 0, 0]
    if lanes is None:
        out[4] = sum(sizes[front:])
    else:
        for i in range(front, len(sizes)):
            r0, r1, c0, c1 = grid.box(i - front)
            of_tile = ll.tile_parts(first(i, lanes.directory), (r1 - r0) * (c1 - c0), lanes)
            out[1:] = [a + b for a, b in zip(out[1:], of_tile, strict=True)]
    return (*out, sum(map(ll.up16, sizes)) - sum(out))
