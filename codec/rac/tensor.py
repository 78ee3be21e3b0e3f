"""What a tensor record states, checked, and its units to the dense tensor (format_spec/stages/)."""

from __future__ import annotations

import copy
import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import index as ix
from rac.container import wire
from rac.container.zstd import Digest, xxh3
from rac.errors import ChecksumError, FormatError, LimitError, UnsupportedError
from rac.records import Limits, Online, Record, Unit
from rac.registry import AFTER, DTYPES, LOSSY, METHODS, RECORD_OBJECT
from rac.stages import basis, lowrank
from rac.stages import bits as bt
from rac.stages import groups as gr
from rac.stages import online as on
from rac.stages import trellis as tr
from rac.stages.lanes import decode as tile
from rac.stages.lanes import layout as ll
from rac.stages.lanes.decode import Box, Shared
from rac.stages.trellis import Trellis

Array = NDArray[Any]
_NEEDED = {"axis", "digest", "dtype", "name", "shape", "stages", "tile", "units"}
_OPTIONAL = {"aliases", "extra", "needs", "online", "uses"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor record, or an object record, its head checked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    grid: ll.Grid
    method: str
    lanes: ll.Lanes | None
    bits: int
    """Of a word, where bits/1 is the coder; else 0."""
    trellis: tr.Trellis | None
    groups: gr.Groups | None
    after: str
    """The stage behind the trellis, which computes with the objects `uses`; empty where there is none."""
    uses: tuple[str, ...]
    word: int
    """Bytes of a word of the dense tensor; `grid.word` is that of the words that the coder restores."""
    units: list[Unit]
    digest: bytes
    aliases: tuple[tuple[str, bool], ...]
    extra: dict[str, Any]
    record: Record
    online: Online | None = None
    """What the layer does to its input before this weight; the dense tensor does not depend on it."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the objects that decoding or running the layer needs, each once."""
        return tuple(dict.fromkeys((*self.uses, *([self.online.object] if self.online and self.online.object else []))))

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.grid.rows * self.grid.cols * self.word

    @property
    def lossy(self) -> tr.Trellis | gr.Groups | None:
        """The stage behind the coder, which makes numbers of its words."""
        return self.trellis or self.groups

    @property
    def numbers(self) -> str:
        """Data type of what the trellis yields."""
        return "F32" if self.after else self.dtype

    @property
    def first(self) -> int:
        """Units in front of the tiles: the shared unit of lanes/1, the unit of trellis/1 or groups/1."""
        return int(self.lanes is not None) + int(self.lossy is not None)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.grid.down * self.grid.across

    def most(self, i: int) -> int:
        """Bytes that unit `i` may have, so that a false size allocates little."""
        if i == 0 and self.lanes is not None:
            return sum(self.lanes.sizes) + self.lanes.rows * self.lanes.cols
        if i < self.first:
            assert self.lossy is not None  # noqa: S101
            return sum(self.lossy.sizes)
        return 2 * self.grid.tr * self.grid.tc * self.grid.word + 65536


def parse(record: Record, limits: Limits, shape_of: Callable[[str], tuple[int, ...] | None] = lambda _: None) -> Tensor:
    """Check the head of a tensor or an object; nothing larger than the head is allocated.

    `shape_of` gives the shape of an object that stands before the record, None where there is no such object.
    """
    head, is_object = record.head, record.type == RECORD_OBJECT
    if missing := _NEEDED - head.keys():
        raise FormatError(f"tensor head lacks {min(missing)!r}", offset=record.at)
    allowed = _NEEDED if is_object else _NEEDED | _OPTIONAL
    if unknown := [k for k in head.keys() - allowed if not k.startswith("x-")]:
        raise UnsupportedError(f"tensor head has the unknown field {min(unknown)!r}", offset=record.at)
    name, dtype, stages, tile_shape = head["name"], head["dtype"], head["stages"], head["tile"]
    if head.get("needs", []) != []:  # room for what later versions need to be known
        raise UnsupportedError(f"tensor needs {head['needs']!r}, which this version does not know", offset=record.at)
    _check_types(head, record.at)
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r} is not known to this version", offset=record.at)
    shape = ix.parse_shape(head["shape"], limits)
    if not stages:
        raise FormatError("tensor has no stage", offset=record.at)
    ids = [s.get("id") for s in stages]
    known = (METHODS, LOSSY) if is_object else (METHODS, LOSSY, tuple(AFTER))
    chain = len(ids) <= len(known) and all(i in of for i, of in zip(ids, known, strict=False))
    if not chain or (len(ids) > 2 and ids[1] != "trellis/1"):
        raise UnsupportedError(f"stages {', '.join(map(str, ids))!r} are not known to this version", offset=record.at)
    method, after = ids[0], ids[2] if len(ids) > 2 else ""
    if is_object and (dtype != "F32" or len(shape) != 2 or 0 in shape or head["axis"] != 1):
        raise FormatError("object is not a matrix of F32", offset=record.at)
    if not 0 <= head["axis"] <= len(shape) or 0 in tile_shape:
        raise FormatError("axis or tile shape is out of range", offset=record.at)
    ll.dense_size(dtype, shape)
    rows, cols = ll.matrix(dtype, shape, head["axis"])
    word = DTYPES[dtype].word
    tr, tc = min(tile_shape[0], max(1, rows)), min(tile_shape[1], max(1, cols))
    if [tr, tc] != tile_shape:
        raise FormatError("tile is larger than the tensor", offset=record.at)
    if tr * tc * word > limits.tile:
        raise LimitError(f"tile of {tr * tc * word} bytes exceeds the limit of {limits.tile}", offset=record.at)
    lossy = ids[1] if len(ids) > 1 else ""
    trellis = Trellis.from_head(stages[1], dtype) if lossy == "trellis/1" else None
    groups = gr.Groups.from_head(stages[1], dtype, cols) if lossy == "groups/1" else None
    grid = ll.Grid(rows, cols, 1 if lossy else word, tr, tc)
    lanes = ll.Lanes.from_head(stages[0], grid.word) if method == "lanes/1" else None
    bits = bt.from_head(stages[0], grid.word) if method == "bits/1" else 0
    if (lanes is None and not bits and stages[0].keys() != {"id"}) or (after and stages[2].keys() != {"id"}):
        raise UnsupportedError("unknown stage parameters", offset=record.at)
    uses = _uses(head.get("uses", []), after, rows, cols, shape_of, record.at)
    online = on.parse(head["online"], dtype, shape, shape_of, record.at) if "online" in head else None
    units = wire.parse_units(head["units"], record.payload_size)
    if len(units) != grid.down * grid.across + (lanes is not None) + bool(lossy):
        raise FormatError("number of units does not match the grid of tiles", offset=record.at)
    if lanes is not None and not rows * cols:
        raise FormatError("an empty tensor has no lanes", offset=record.at)
    if lossy and not rows * cols:
        raise FormatError("an empty tensor has neither trellis nor groups", offset=record.at)
    dense = rows * cols * word
    if dense > limits.free_alloc + limits.expansion * record.payload_size:
        raise LimitError(f"tensor of {dense} bytes from {record.payload_size} stored bytes", offset=record.at)
    out = Tensor(
        name,
        dtype,
        shape,
        head["axis"],
        grid,
        method,
        lanes,
        bits,
        trellis,
        groups,
        after,
        uses,
        word,
        units,
        head["digest"],
        ix.parse_aliases(head.get("aliases", [])),
        head.get("extra", {}),
        record,
        online,
    )
    for i, unit in enumerate(units):
        if unit.size > out.most(i):
            raise FormatError(f"unit {i} is larger than its tile can need", offset=record.payload + unit.offset)
    return out


def _check_types(head: dict[str, Any], at: int) -> None:
    """FormatError unless every value has its type (format_spec/maps.cddl); ranges come later, each in its turn."""
    wanted: dict[str, type] = {"name": str, "dtype": str, "digest": bytes, "units": bytes, "axis": int}
    lists = {"stages": dict, "uses": str, "shape": int, "tile": int}
    if (
        any(type(head[k]) is not t for k, t in wanted.items())
        or any(not isinstance(head.get(k, {}), dict) for k in ("extra", "online"))
        or any(not isinstance(v := head.get(k, []), list) or any(type(i) is not t for i in v) for k, t in lists.items())
        or not all(ix.is_count(n) for n in (*head["shape"], *head["tile"]))
        or len(head["digest"]) != 16
        or len(head["tile"]) != 2
    ):
        raise FormatError("tensor head is malformed", offset=at)
    ix.parse_aliases(head.get("aliases", []))


def _uses(
    names: Any, after: str, rows: int, cols: int, shape_of: Callable[[str], tuple[int, ...] | None], at: int
) -> tuple[str, ...]:
    """Names of the objects of a tensor of rows x cols; they are there, and have the shapes that the stage asks for."""
    if len(names) != AFTER.get(after, 0):
        raise FormatError(f"tensor uses {len(names)} objects, its stages {AFTER.get(after, 0)}", offset=at)
    shapes = []
    for n in names:
        shape = shape_of(n)
        if shape is None:
            raise FormatError(f"object {n!r}, which the tensor uses, does not stand before it", offset=at)
        shapes.append(shape)
    if after == "lowrank/1":
        r = shapes[0][-1] if shapes[0] else 0
        if not 1 <= r <= min(rows, cols) or shapes != [(rows, r), (r, cols)]:
            raise FormatError(f"objects {shapes} are no product of low rank of {rows} x {cols}", offset=at)
    elif after and shapes != [(cols, cols)]:
        raise FormatError(f"object {shapes} is no basis of {cols} columns", offset=at)
    return tuple(names)


def extra_of(extra: dict[str, Any], name: str) -> dict[str, Any]:
    """What one name of a tensor carries: its own where it differs from the first, else that of the record."""
    own = extra.get("aliases", {})
    found: Any = own.get(name) if isinstance(own, dict) else None
    return found if isinstance(found, dict) else {k: v for k, v in extra.items() if k != "aliases"}


def empty(t: Tensor) -> Array:
    """The dense matrix of words (R, C), not yet filled; LimitError where memory is short."""
    try:
        return np.empty((t.grid.rows, t.grid.cols), f"<u{t.word}")
    except (MemoryError, ValueError) as e:
        raise LimitError(f"not enough memory for a tensor of {t.nbytes} bytes", unit=repr(t.name)) from e


def values(t: Tensor, rows: int, cols: int) -> Array:
    """Words of binary32 (rows, cols) for what the trellis yields in front of another stage, not yet filled."""
    try:
        return np.empty((rows, cols), "<u4")
    except MemoryError as e:
        raise LimitError(f"not enough memory for a tensor of {t.nbytes} bytes", unit=repr(t.name)) from e


class Decoder:
    """Decodes the units of one tensor, in any order and from any thread."""

    def __init__(
        self,
        t: Tensor,
        first: Sequence[bytes | memoryview],
        reference: bool = False,
        objects: Sequence[NDArray[np.float32]] = (),
    ) -> None:
        """`first` has the units in front of the tiles, `objects` the matrices that the tensor uses."""
        self.tensor, self._reference, self._objects = t, reference, objects
        self.shared: Shared | None = None
        self.tables: tr.Tables | None = None
        self.scales: gr.Tables | None = None
        self.dequant: tuple[int, int, int] = (0, 0, 0)
        """For the kernel, see `tile.lanes_job`; it leaves outliers out."""
        for i, unit in enumerate(first):
            self.check(i, unit)
        if t.lanes is not None:
            with self.at(0):
                self.shared = tile.shared(bytes(first[0]), t.lanes, t.grid)
        if t.trellis is not None:
            with self.at(t.first - 1):
                self.tables = v = tr.parse_unit(bytes(first[-1]), t.trellis, t.numbers, t.grid.rows, t.grid.cols)
            self._words = tr.dequant(v, t.trellis, t.numbers)
            if self._words:
                self.dequant = (native.address(v.rows), native.address(v.cols), ctypes.addressof(self._words))
        if t.groups is not None:
            with self.at(t.first - 1):
                self.scales = gr.parse_unit(bytes(first[-1]), t.groups, t.grid.rows, t.grid.cols)

    def bare(self) -> Decoder:
        """A copy to keep: what was parsed and checked, without the large tables that `ready` makes again."""
        out = copy.copy(self)
        out.shared = self.shared and tile.bare(self.shared)
        return out

    def ready(self) -> Decoder:
        """A copy that decodes, of one that `bare` has made."""
        out = copy.copy(self)
        if self.shared:
            assert self.tensor.lanes is not None  # noqa: S101
            out.shared = tile.ready(self.shared, self.tensor.lanes, self.tensor.grid)
        return out

    def at(self, i: int) -> wire.At:
        """Context that names unit `i` in the errors that pass."""
        t = self.tensor
        return wire.At(t.name, t.record.payload + t.units[i].offset, i)

    def check(self, i: int, data: bytes | memoryview) -> None:
        """ChecksumError unless the bytes of unit `i` are those that were written."""
        if xxh3(data) != self.tensor.units[i].check:
            with self.at(i):
                raise ChecksumError("checksum does not match")

    def tile(self, i: int, data: Array, out: Array, row: int = 0, col: int = 0) -> None:
        """Check and decode tile `i` from its bytes; `out` begins at word (row, col) of the tensor's matrix.

        Where there is a stage behind the trellis, `out` is of binary32, and `join` goes on with it.
        """
        work = Work()
        work.add(self, i, data, out, row, col)
        work.run()

    @property
    def kernel(self) -> Shared | None:
        """What a job of the kernel needs; None where Python decodes the tiles."""
        return self.shared if self.shared and self.shared.job and not self._reference else None

    def decode(self, i: int, data: Array, dst: Array, box: Box, plain: bool = False) -> None:
        """Decode tile `i`, checked before, in Python."""
        t = self.tensor
        with self.at(i + t.first):
            if t.lanes is None:
                tile.decode_plain(data, "raw/1" if plain and not t.bits else t.method, box, dst, t.bits)
            else:
                assert self.shared is not None  # noqa: S101
                tile.decode_lanes(data, t.lanes, self.shared, box, dst, self._reference)

    def finish(self, i: int, words: Array, dst: Array, box: Box) -> None:
        """Words of tile `i`, decoded before, to the numbers that they stand for."""
        t = self.tensor
        if t.groups is not None:
            assert self.scales is not None  # noqa: S101
            with self.at(i + t.first):
                gr.decode(words, t.groups, self.scales, box, dst, t.dtype, self._reference)
            return
        assert t.trellis is not None  # noqa: S101
        assert self.tables is not None  # noqa: S101
        tr.decode(words, t.trellis, self.tables, box, dst, t.numbers, self._reference)

    def join(self, found: Array, dst: Array, box: Box) -> None:
        """What the trellis yielded to the words `dst`, contiguous, of the part `box` of the matrix.

        `found` (h, w) are words of binary32 of the same part, under basis/1 of all columns; they may be changed.
        """
        t, (r0, r1, c0, c1) = self.tensor, box
        v = np.ascontiguousarray(found).view(np.float32)
        if t.after == "lowrank/1":
            a, b = self._objects
            v = lowrank.join(v, a[r0:r1], b[:, c0:c1], self._reference)
        else:
            v = basis.join(v, self._objects[0][:, c0:c1], self._reference)
        tr.put_words(v, t.dtype, dst, self._reference)


class _Scratch:
    """Memory for intermediate words, used again: fresh memory costs as much as what is done in it."""

    MOST = 16 << 20

    def __init__(self) -> None:
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)  # whoever held the lock has stayed with the parent

    def _begin(self) -> None:
        self._free: list[Array] = []
        self._size = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Array:
        """(size or more,) bytes."""
        with self._lock:
            for i in reversed(range(len(self._free))):
                if size <= len(self._free[i]) <= 4 * size:
                    self._size -= len(self._free[i])
                    return self._free.pop(i)
        return np.empty(size, np.uint8)

    def give(self, held: list[Array]) -> None:
        """Back for the next."""
        with self._lock:
            for array in held:
                if self._size + len(array) <= self.MOST:
                    self._free.append(array)
                    self._size += len(array)


_scratch = _Scratch()


class Work:
    """Tiles of one or more tensors that are decoded in one call of the kernel, so that threads rarely meet."""

    def __init__(self) -> None:
        self._jobs: list[native.TileJob] = []
        self._of: list[tuple[Decoder, int]] = []
        self._alive: list[Array] = []
        self._others: list[tuple[Decoder, int, Array, Array, Box, bool]] = []
        self._after: list[tuple[Decoder, int, Array, Array, Box]] = []
        self._outliers: list[tuple[tr.Tables, Box, Array]] = []
        self._last: list[tuple[Decoder, Array, Array, Box]] = []
        self._held: list[Array] = []

    def add(
        self, dec: Decoder, i: int, data: Array, out: Array, row: int = 0, col: int = 0, plain: bool = False, n: int = 1
    ) -> None:
        """Check the bytes of the tiles i..i + n - 1 and take them in.

        Args:
            dec: Of their tensor.
            i: The first of them.
            data: (bytes,) as they lie in the file, with the padding between them; it stays until `run` is done.
            out: Begins at word (row, col) of the tensor's matrix; it stays, too.
            row: Of the first word.
            col: Of the first word.
            plain: They were checked before, and Zstandard frames in them expanded (`tile.plain`); n is 1.
            n: Number of tiles.
        """
        t, kernel, raw = dec.tensor, dec.kernel, data.data
        first, boxes = t.first, ll.boxes(t.grid)
        base, size, stride = t.units[first + i].offset, out.itemsize, out.strides[0]
        at, to = native.address(data), native.address(out) - row * stride - col * size
        self._alive += (data, out)
        whole = not t.lossy or (kernel is not None and dec.dequant[2] != 0)  # the kernel goes all the way
        for k in range(i, i + n):
            unit = t.units[first + k]
            start = unit.offset - base
            length = unit.size if n > 1 else len(data)
            if not plain:
                dec.check(first + k, raw[start : start + length])
            box = r0, r1, c0, c1 = boxes[k]
            if whole:
                place, step = to + r0 * stride + c0 * size, stride // size
                if dec.tables and len(dec.tables.places):
                    self._outliers.append((dec.tables, box, out[r0 - row : r1 - row, c0 - col : c1 - col]))
            else:
                words = self._words(r1 - r0, c1 - c0)
                self._after.append((dec, k, words, out[r0 - row : r1 - row, c0 - col : c1 - col], box))
                place, step = native.address(words), c1 - c0
            if kernel is None:
                dst = words if t.lossy else out[r0 - row : r1 - row, c0 - col : c1 - col]
                self._others.append((dec, k, data[start : start + length], dst, box, plain))
                continue
            where = at + start
            if t.lanes and t.lanes.packed:
                with dec.at(first + k):
                    plane = tile.expanded(data[start : start + length], t.lanes, box)
                self._alive.append(plane)
                where, length = native.address(plane), len(plane)
            self._jobs.append(tile.lanes_job(where, length, kernel, box, place, step, dec.dequant))
            self._of.append((dec, k))

    def _words(self, rows: int, cols: int) -> Array:
        """Room for the words of a tile, (rows, cols) uint8."""
        held = _scratch.take(rows * cols)
        self._held.append(held)
        return held[: rows * cols].reshape(rows, cols)

    def then(self, dec: Decoder, found: Array, dst: Array, box: Box) -> None:
        """`Decoder.join` at the end of it all."""
        self._last.append((dec, found, dst, box))

    def run(self) -> None:
        """Decode all. FormatError or ChecksumError of the first that is wrong."""
        if self._jobs and (wrong := native.decode_tiles(self._jobs)):
            number, error, text = wrong
            dec, i = self._of[number]
            with dec.at(i + dec.tensor.first):
                raise error(text)
        for dec, i, data, dst, box, plain in self._others:
            dec.decode(i, data, dst, box, plain)
        for dec, i, words, dst, box in self._after:
            dec.finish(i, words, dst, box)
        for tables, box, dst in self._outliers:
            tr.outliers(tables, box, dst)
        for dec, found, dst, box in self._last:
            dec.join(found, dst, box)
        held, self._held, self._after = self._held, [], []
        _scratch.give(held)


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
