"""A tensor record in memory, byte for byte as it lies in a file: parsed once, decoded as often as it is needed.

The bytes are the records of the objects that the tensor uses, one after the other, then its own, and TAIL zeros behind
it, which kernels may read: what `collect` takes out of an archive. Everything about them is checked as in a file
(format_spec/container.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import wire
from rac.container.index import check_type
from rac.container.reader import Archive
from rac.cpu.work import Place, Work, target
from rac.decode import random
from rac.decoder import Decoder
from rac.errors import FormatError
from rac.linalg.transform import Transform
from rac.records import Entry, Limits, Record
from rac.registry import RECORD_OBJECT, RECORD_TENSOR
from rac.tensor import Tensor, empty
from rac.tensor import parse as parse_tensor

TAIL = 128
"""Bytes behind the records."""
SHARE = 1 << 18
"""Dense bytes of tiles that a thread decodes in one go: small ones are decoded side by side."""
Array = NDArray[Any]
Bytes = NDArray[np.uint8]


@dataclass(slots=True)
class Stored:
    """What the bytes of a tensor state, checked."""

    tensor: Tensor
    objects: Mapping[str, Tensor]
    size: int
    """Length in bytes of what was parsed: the records and the TAIL zeros behind them."""
    heads: Mapping[int, bytes]
    """The fixed head at each record's place: its checksum covers the rest of the head, and so those of all units."""
    parsed: Decoder | None = None
    """What the units in front of the tiles state, once the tensor was decoded; not kept where objects are used."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix of words."""
        return self.tensor.grid.rows, self.tensor.grid.cols

    def describes(self, data: Bytes) -> bool:
        """Whether these are the bytes that were parsed, as far as the heads say; units are checked when decoded."""
        same = (data[at : at + wire.RECORD_HEAD].tobytes() == head for at, head in self.heads.items())
        return len(data) == self.size and all(same)

    def room(self) -> Array:
        """The dense matrix of words (R, C), not yet filled; LimitError where memory is short."""
        return empty(self.tensor)

    def decode(
        self, data: Bytes, out: Array, first: int = 0, last: int | None = None, pool: Executor | None = None
    ) -> None:
        """As `decode` below."""
        decode(self, data, out, first, last, pool)

    def transform(self, data: Bytes) -> Transform | None:
        """What the layer does to its input before this weight; None: nothing."""
        online = self.tensor.online
        if online is None:
            return None
        matrix = _matrix(self, online.object, data) if online.object else None
        return Transform(online, self.tensor.shape[1], matrix)


def collect(archive: Archive, entry: Entry) -> Bytes:
    """The bytes of a tensor and of the objects that it, or its layer, needs."""
    t = random.parse(archive, archive.record(entry))
    entries = [*(archive.objects[name] for name in t.needs), entry]
    out = np.empty(sum(e.size for e in entries) + TAIL, np.uint8)
    out[-TAIL:] = 0
    at = 0
    for e in entries:
        archive.access.read_into(e.at, out[at : at + e.size].data)
        at += e.size
    return out


def _record(data: Bytes, at: int, limits: Limits) -> Record:
    """The record at `at`; it lies within the bytes."""
    fixed = data[at : at + wire.RECORD_HEAD].tobytes()
    size = wire.RECORD_HEAD + wire.parse_record(at, fixed, limits)[2]
    record = wire.parse_record_body(at, data[at : at + wire.padded(size)].tobytes(), limits)
    check_type(record)
    if record.end > len(data):
        raise FormatError("the bytes end inside a record", offset=at)
    return record


def parse(data: Bytes) -> Stored:
    """Read the heads in bytes (n,) that `collect` made.

    RacError where they are damaged or cut off, or hold anything but objects and then one tensor.
    """
    limits, at = Limits(), 0
    objects: dict[str, Tensor] = {}
    heads: dict[int, bytes] = {}
    while True:
        record = _record(data, at, limits)
        t = parse_tensor(record, limits, lambda name: objects[name].shape if name in objects else None)
        heads[at] = data[at : at + wire.RECORD_HEAD].tobytes()
        at = record.end
        if record.type == RECORD_TENSOR:
            break
        if record.type != RECORD_OBJECT or t.name in objects:
            raise FormatError("no tensor and no object that it uses", offset=record.at)
        objects[t.name] = t
    if len(data) - at != TAIL or data[at:].any() or tuple(objects) != t.needs:
        raise FormatError(f"{len(data) - at} bytes behind the tensor, or objects that it does not need", offset=at)
    return Stored(t, objects, len(data), heads)


def split(data: Bytes) -> list[tuple[int, int]]:
    """Where each of several tensors begins and ends in bytes that are those of `collect`, one after the other.

    FormatError where a record is cut off; what the records hold is looked at by `parse`.
    """
    limits, at, out = Limits(), 0, []
    while at < len(data):
        start, record = at, _record(data, at, limits)
        while record.type == RECORD_OBJECT:
            record = _record(data, record.end, limits)
        at = record.end + TAIL
        if at > len(data):
            raise FormatError("the bytes end behind a record", offset=record.end)
        out.append((start, at))
    return out


def unit(data: Bytes, t: Tensor, i: int, n: int = 1) -> Bytes:
    """Bytes of unit `i` of a tensor, or of the n from there on with the padding between them."""
    last = t.units[i + n - 1]
    return data[t.record.payload + t.units[i].offset : t.record.payload + last.offset + last.size]


def matrices(s: Stored, data: Bytes) -> list[NDArray[np.float32]]:
    """The objects that the tensor uses, decoded."""
    return [_matrix(s, name, data) for name in s.tensor.uses]


def _matrix(s: Stored, name: str, data: Bytes) -> NDArray[np.float32]:
    words = empty(s.objects[name])
    decode(Stored(s.objects[name], {}, s.size, {}), data, words)
    return words.view(np.float32)


def opened(s: Stored, data: Bytes) -> Decoder:
    """What decodes the tiles of a record; RacError where a unit in front of them, or an object, is damaged."""
    if s.parsed is not None:
        return s.parsed.bare()
    t = s.tensor
    dec = Decoder(t, [unit(data, t, i).data for i in range(t.first)], objects=matrices(s, data))
    if not s.objects:
        s.parsed = dec.bare()
    return dec


def decode(
    s: Stored, data: Bytes, out: Array, first: int = 0, last: int | None = None, pool: Executor | None = None
) -> None:
    """Decode the rows of tiles first..last - 1 (by default all) into `out`; RacError where a unit is damaged.

    `s` is what `parse` made of `data`. `out` are (rows, C) words of the tensor, contiguous; row 0 is the first one of
    the tiles `first`. Threads of `pool` help the caller's.
    """
    t, dec = s.tensor, opened(s, data)
    works, work, size = [], Work(), 0
    tile, top = t.grid.tr * t.grid.tc * t.word, first * t.grid.tr
    step = max(1, min(t.grid.across, SHARE // tile))
    for band in t.bands(first, last):
        place = target(t, band, Place(out, top))
        for k in range(0, len(band.tiles), step):
            tiles = band.tiles[k : k + step]
            work.add(dec, tiles, unit(data, t, tiles.start + t.first, len(tiles)), place)
            size += len(tiles) * tile
            if pool and place.words is out and size >= SHARE:
                works.append(work)
                work, size = Work(), 0
        if place.words is not out:
            work.join(dec, place.words, out[band.box.r0 - top : band.box.r1 - top], band.box)
            works.append(work)
            work, size = Work(), 0
    works.append(work)
    if not pool:
        for work in works:
            work.run()
        return
    jobs = [pool.submit(work.run) for work in works]
    try:
        for job, work in zip(jobs, works, strict=True):
            if job.cancel():  # nobody has begun with it
                work.run()
    finally:
        # nobody writes to `out` any more when one has failed; of those taken back `wait` would wait for a thread
        wait([job for job in jobs if not job.cancel()])
    for job in jobs:
        if not job.cancelled():
            job.result()
