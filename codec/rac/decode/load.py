"""Whole records of a random-access archive to dense tensors, by several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rac.container.access import InFile
from rac.container.index import check_type, match
from rac.container.reader import Archive
from rac.decode import tensor as tn
from rac.errors import FormatError, LimitError
from rac.quantize import lossless as ll
from rac.records import Entry, Record
from rac.registry import DTYPES

if TYPE_CHECKING:
    from rac.decode.cuda import DeviceDecoder

Array = NDArray[Any]
SMALL = 1 << 21
"""Records of up to so many bytes are read whole, and decoded by one thread."""
GROUP = 1 << 20
"""Neighbouring small records are read at once, up to so many bytes."""
WINDOW = 256 << 20
"""Dense bytes that may be in work beyond the tensor in hand."""
AHEAD = 4
"""Groups of records per thread that are read before the first is taken."""
Loaded = tuple[tn.Tensor, Array]


def threads_of(threads: int | None) -> int:
    """Number of threads: what is asked for, or one per core up to 8."""
    if threads is not None and threads < 1:
        raise ValueError("threads must be at least 1")
    return threads or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class Inline:
    """A pool of no threads: work is done where it is submitted, without the cost of handing it over."""

    def __enter__(self) -> Inline:
        """Nothing to start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to stop."""

    def submit(self, work: Callable[..., list[Loaded]], *args: Any) -> _Done:
        """Do it now."""
        try:
            return _Done(work(*args), None)
        except Exception as e:
            return _Done([], e)


class _Done:
    """What Inline offers of a Future."""

    __slots__ = ("_error", "_value")

    def __init__(self, value: list[Loaded], error: Exception | None) -> None:
        self._value, self._error = value, error

    def result(self) -> list[Loaded]:
        """The value, or the error raised."""
        if self._error:
            raise self._error
        return self._value

    def cancel(self) -> bool:
        """Too late."""
        return False


Job = Future[list[Loaded]] | _Done


class _Buffers:
    """Memory to read into, used again: fresh memory costs more than the copy into it."""

    def __init__(self) -> None:
        self._free: list[Array] = []

    def read(self, archive: Archive, at: int, size: int) -> tuple[Array, Array]:
        """(`size` bytes from `at`, what to give back)."""
        if at + size > archive.access.size:
            raise LimitError("record lies outside the file", offset=at)
        try:
            held = self._free.pop()
        except IndexError:
            held = np.empty(0, np.uint8)
        if len(held) < size:
            held = np.empty(max(size, GROUP), np.uint8)
        archive.access.read_into(at, held[:size].data)
        return held[:size], held

    def give(self, held: Array) -> None:
        """Back for the next read."""
        self._free.append(held)


def read_units(archive: Archive, t: tn.Tensor, first: int, last: int) -> list[Array]:
    """Bytes of the units first..last - 1, read at once."""
    at, size = _span(t, first, last)
    if at + size > archive.access.size:
        raise FormatError("unit lies outside the file", offset=at)
    buffer = np.empty(size, np.uint8)
    archive.access.read_into(at, buffer.data)
    return _cut(buffer, t, first, last)


def _span(t: tn.Tensor, first: int, last: int) -> tuple[int, int]:
    """Place and size of the units first..last - 1."""
    start = t.units[first].offset
    return t.record.payload + start, t.units[last - 1].offset + t.units[last - 1].size - start


def _cut(buffer: Array, t: tn.Tensor, first: int, last: int, strict: bool = False) -> list[Array]:
    """The units first..last - 1 out of bytes that begin with the first; `strict`: all between and behind are zeros."""
    start = t.units[first].offset if first < last else 0
    data, out, stop = buffer.data, [], 0
    for u in t.units[first:last]:
        a = u.offset - start
        out.append(buffer[a : a + u.size])
        if strict and stop < a and any(data[stop:a]):
            raise FormatError("padding is not zero", offset=t.record.payload + start + stop)
        stop = a + u.size
    if strict and any(data[stop:]):
        raise FormatError("padding is not zero", offset=t.record.payload + start + stop)
    return out


def parse(archive: Archive, record: Record) -> tn.Tensor:
    """`tensor.parse`, the objects being those of the index."""

    def shape_of(name: str) -> tuple[int, ...] | None:
        e = archive.objects.get(name)
        return e.shape if e and e.at < record.at else None

    return tn.parse(record, archive.limits, shape_of)


def objects(archive: Archive, t: tn.Tensor, reference: bool = False) -> list[NDArray[np.float32]]:
    """The matrices that a tensor uses, decoded once for an archive and kept (limits.objects bounds them all)."""
    for name in t.uses:
        if name not in archive.kept:
            _, words = next(load(archive, [archive.objects[name]], 1, reference=reference))
            archive.kept[name] = words.view(np.float32)
    return [archive.kept[name] for name in t.uses]


def decoder(archive: Archive, t: tn.Tensor, reference: bool = False) -> tn.Decoder:
    """Decoder of a tensor, its shared unit and its objects read."""
    first = read_units(archive, t, 0, t.first) if t.first else []
    return tn.Decoder(t, [unit.data for unit in first], reference, objects(archive, t, reference))


def load_onto(archive: Archive, entry: Entry, decoder: DeviceDecoder) -> tuple[tn.Tensor, Any]:
    """Hand a whole record to a decoder of a device; every byte of it is checked."""
    with InFile(archive.access.name, repr(entry.name)):
        t = parse(archive, archive.record(entry))
        data = np.empty(t.record.end - t.record.payload, np.uint8)
        if t.record.end > archive.access.size:
            raise FormatError("record lies outside the file", offset=t.record.at)
        archive.access.read_into(t.record.payload, data.data)
        units = _cut(data, t, 0, len(t.units), strict=True)
        first = [unit.data for unit in units[: t.first]]
        return t, decoder.add(t, first, units[t.first :], objects(archive, t))


def load(
    archive: Archive, entries: list[Entry], threads: int, done: Callable[[tn.Tensor], None] | None = None,
    reference: bool = False,
) -> Iterator[Loaded]:  # fmt: skip
    """(tensor, its words (R, C)) of each entry, in order. Every byte of the records is checked."""
    with ThreadPoolExecutor(threads) if threads > 1 else Inline() as pool:
        waiting: list[tuple[int, list[Job]]] = []
        held, buffers = 0, _Buffers()
        try:
            for group in _groups(entries):
                size = sum(ll.dense_size(e.dtype, e.shape) if e.dtype in DTYPES else 0 for e in group)
                waiting.append((size, _start(archive, group, pool, buffers, reference)))
                held += size
                while (held > WINDOW or len(waiting) > AHEAD * threads) and len(waiting) > 1:
                    held -= waiting[0][0]
                    yield from _results(waiting.pop(0)[1], done)
            while waiting:
                yield from _results(waiting.pop(0)[1], done)
        finally:
            for _, jobs in waiting:
                for job in jobs:
                    job.cancel()


def _groups(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Entries to be read together: one, or small neighbours."""
    group: list[Entry] = []
    size = 0
    for e in entries:
        if group and (size + e.size > GROUP or group[-1].at + group[-1].size != e.at):
            yield group
            group, size = [], 0
        group.append(e)
        size += e.size
    if group:
        yield group


def _results(jobs: list[Job], done: Callable[[tn.Tensor], None] | None) -> Iterator[Loaded]:
    """The tensors of one group; the last job of a large tensor returns it."""
    for job in jobs:
        for t, out in job.result():
            if done:
                done(t)
            yield t, out


def _start(
    archive: Archive, group: list[Entry], pool: ThreadPoolExecutor | Inline, buffers: _Buffers, reference: bool
) -> list[Job]:
    entry = group[0]
    if sum(e.size for e in group) <= SMALL:
        return [_small(archive, group, pool, buffers, reference)]
    with InFile(archive.access.name, repr(entry.name)):
        t = parse(archive, archive.record(entry))
        out = tn.empty(t)
        dec = decoder(archive, t, reference)
        return [_band(archive, dec, a, out, pool, buffers) for a in range(t.grid.down)]


def _small(
    archive: Archive, group: list[Entry], pool: ThreadPoolExecutor | Inline, buffers: _Buffers, reference: bool
) -> Job:
    """Whole records, read at once. All that Python does is done here, the threads run the kernel."""
    start, done, work = group[0].at, [], tn.Work()
    with InFile(archive.access.name, repr(group[0].name)):
        data, held = buffers.read(archive, start, sum(e.size for e in group))
    for entry in group:
        with InFile(archive.access.name, repr(entry.name)):
            mine = data[entry.at - start : entry.at - start + entry.size]
            record = archive.parse_record(entry.at, mine[: entry.size - entry.payload_size].tobytes())
            check_type(record)
            match(entry, record)
            t = parse(archive, record)
            out = tn.empty(t)
            cut = _cut(mine[record.payload - entry.at :], t, 0, len(t.units), strict=True)
            uses = objects(archive, t, reference)
            dec = tn.Decoder(t, [unit.data for unit in cut[: t.first]], reference, uses)
            found = tn.values(t, *out.shape) if t.after else out
            for i in range(t.tiles):
                work.add(dec, i, cut[i + t.first], found)
            if t.after:
                work.then(dec, found, out, (0, t.grid.rows, 0, t.grid.cols))
        done.append((t, out))
    return pool.submit(_run, archive, work, buffers, held, done)


def _run(archive: Archive, work: tn.Work, buffers: _Buffers, held: Array, done: list[Loaded]) -> list[Loaded]:
    with InFile(archive.access.name):
        work.run()
    buffers.give(held)
    return done


def _band(
    archive: Archive, dec: tn.Decoder, a: int, out: Array, pool: ThreadPoolExecutor | Inline, buffers: _Buffers
) -> Job:
    """Row `a` of the grid of tiles, and what lies between their units; the last of all returns the tensor."""
    t, work = dec.tensor, tn.Work()
    first, last = a * t.grid.across, (a + 1) * t.grid.across
    begin, end = first and first + t.first, last + t.first
    at, size = _span(t, begin, end)
    size = (t.record.end if end == len(t.units) else t.record.payload + t.units[end].offset) - at
    data, held = buffers.read(archive, at, size)
    units = _cut(data, t, begin, end, strict=True)
    row, end_row, _, _ = t.grid.box(first)
    found = tn.values(t, end_row - row, t.grid.cols) if t.after else out
    for i in range(first, last):
        work.add(dec, i, units[i + t.first - begin], found, row if t.after else 0)
    if t.after:
        work.then(dec, found, out[row:end_row], (row, end_row, 0, t.grid.cols))
    return pool.submit(_run, archive, work, buffers, held, [(t, out)] if last == t.tiles else [])
