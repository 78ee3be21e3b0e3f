"""Whole records of a random-access archive to dense tensors, by several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import wire
from rac.container.access import InFile
from rac.container.index import check_type, match
from rac.container.reader import Archive
from rac.decode import tensor as tn
from rac.errors import FormatError, LimitError
from rac.records import Entry

Array = NDArray[Any]
SMALL = 1 << 21
WINDOW = 256 << 20
"""Dense bytes that may be in work beyond the tensor in hand."""


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

    def submit(self, work: Callable[..., None], *args: Any) -> Future[None]:
        """Do it now."""
        out: Future[None] = Future()
        try:
            out.set_result(work(*args))  # type: ignore[func-returns-value]
        except Exception as e:
            out.set_exception(e)
        return out


def read_units(archive: Archive, t: tn.Tensor, first: int, last: int, strict: bool = False) -> list[Array]:
    """Bytes of the units first..last - 1, read at once; `strict` also checks the zeros between them."""
    start = t.units[first].offset
    end = t.units[last - 1].offset + t.units[last - 1].size
    end += wire.pad(end, wire.ALIGN if last == len(t.units) else wire.STREAM_ALIGN) if strict else 0
    at = t.record.payload + start
    if at + end - start > archive.access.size:
        raise FormatError("unit lies outside the file", offset=at)
    buffer = np.empty(end - start, np.uint8)
    archive.access.read_into(at, buffer.data)
    return _cut(buffer, t, first, last, strict)


def _cut(buffer: Array, t: tn.Tensor, first: int, last: int, strict: bool) -> list[Array]:
    """The units first..last - 1 out of bytes that begin with the first; `strict`: all between and behind are zeros."""
    start = t.units[first].offset if first < last else 0
    out, stop = [], 0
    for u in t.units[first:last]:
        a = u.offset - start
        out.append(buffer[a : a + u.size])
        if strict and buffer[stop:a].any():
            raise FormatError("padding is not zero", offset=t.record.payload + start + stop)
        stop = a + u.size
    if strict and buffer[stop:].any():
        raise FormatError("padding is not zero", offset=t.record.payload + start + stop)
    return out


def decoder(archive: Archive, t: tn.Tensor, reference: bool = False, strict: bool = False) -> tn.Decoder:
    """Decoder of a tensor, its shared unit read."""
    shared = read_units(archive, t, 0, 1, strict)[0] if t.first else None
    return tn.Decoder(t, None if shared is None else shared.data, reference)


def load(
    archive: Archive, entries: list[Entry], threads: int, done: Callable[[tn.Tensor], None] | None = None,
    reference: bool = False,
) -> Iterator[tuple[tn.Tensor, Array]]:  # fmt: skip
    """(tensor, its words (R, C)) of each entry, in order. Every byte of the records is checked."""
    with ThreadPoolExecutor(threads) if threads > 1 else Inline() as pool:
        waiting: list[tuple[tn.Tensor, Array, list[Future[None]]]] = []
        held = 0
        try:
            for entry in entries:
                t, out, jobs = _start(archive, entry, pool, reference)
                waiting.append((t, out, jobs))
                held += t.nbytes
                while held > WINDOW and len(waiting) > 1:
                    held -= waiting[0][0].nbytes
                    yield _result(waiting.pop(0), archive, done)
            while waiting:
                yield _result(waiting.pop(0), archive, done)
        finally:
            for _, _, jobs in waiting:
                for job in jobs:
                    job.cancel()


def _result(
    item: tuple[tn.Tensor, Array, list[Future[None]]],
    archive: Archive,
    done: Callable[[tn.Tensor], None] | None,
) -> tuple[tn.Tensor, Array]:
    t, out, jobs = item
    with InFile(archive.access.name, repr(t.name)):
        for job in jobs:
            job.result()
    if done:
        done(t)
    return t, out


def _start(
    archive: Archive, entry: Entry, pool: ThreadPoolExecutor | Inline, reference: bool
) -> tuple[tn.Tensor, Array, list[Future[None]]]:
    name = repr(entry.name)
    with InFile(archive.access.name, name):
        if entry.size <= SMALL:
            data = np.empty(entry.size, np.uint8)
            if entry.at + entry.size > archive.access.size:
                raise LimitError("record lies outside the file", offset=entry.at)
            archive.access.read_into(entry.at, data.data)
            record = archive.parse_record(entry.at, data[: entry.size - entry.payload_size].tobytes())
        else:
            record = archive.record(entry)
        check_type(record)
        match(entry, record)
        t = tn.parse(record, archive.limits)
        out = tn.empty(t)
        if entry.size <= SMALL:
            return t, out, [pool.submit(_small, t, data[record.payload - entry.at :], out, reference)]
        dec = decoder(archive, t, reference, strict=True)
        across = t.grid.across
        jobs = [pool.submit(_band, archive, dec, a * across, (a + 1) * across, out) for a in range(t.grid.down)]
        return t, out, jobs


def _small(t: tn.Tensor, payload: Array, out: Array, reference: bool) -> None:
    cut = _cut(payload, t, 0, len(t.units), strict=True)
    dec = tn.Decoder(t, cut[0].data if t.first else None, reference)
    for i in range(t.tiles):
        dec.tile(i, cut[i + t.first], out)


def _band(archive: Archive, dec: tn.Decoder, first: int, last: int, out: Array) -> None:
    t = dec.tensor
    for i, unit in enumerate(read_units(archive, t, t.first + first, t.first + last, strict=True)):
        dec.tile(first + i, unit, out)
