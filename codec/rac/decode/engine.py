"""Records that go by to dense tensors: tiles are decoded side by side, bytes are read meanwhile.

One thread reads heads, checks units and hands tiles out; those of a large tensor go to several jobs, those of small
ones share a job. Tensors come out in the order of the file.
"""

from __future__ import annotations

import bisect
import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import numpy as np

from rac import native
from rac.container.access import Access, InFile
from rac.container.feed import Held, Trace
from rac.container.forward import Walk
from rac.cpu.work import Place, target
from rac.decode.bundles import Bundle
from rac.decode.jobs import Job, Later, Opened, Room, Task, Team
from rac.decoder import Decoder
from rac.errors import RacError, SourceError, TruncatedError
from rac.grid import Band
from rac.native.prototypes import F32, Array
from rac.records import Entry
from rac.registry import RECORD_OBJECT
from rac.tensor import Tensor

RING = 256 << 20
"""Bytes that may be held beyond the tensors themselves: half for what is read ahead, half for tensors in work."""
LEAST = 1 << 16
GROUP = 2 << 20  # stored bytes of a job: more leaves the processor's cache, of fewer threads wait for each other
SCRATCH = 1 << 20  # bytes of intermediate words of a job
RUN = 1 << 17  # stored bytes of small tiles that are taken in one go: each call costs some microseconds
SMALL = 1 << 13  # bytes that are read at once, though they could be read later
TINY = 1 << 14  # bytes of a tensor that is decoded when it is met, where its coder has nothing to prepare
Loaded = tuple[Tensor | Entry, Array]
Damaged = dict[str, RacError]


def _always() -> bool:
    return True


Take = Callable[..., tuple[memoryview, Held | None]]


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor or an object that goes by."""

    file: str
    t: Tensor
    take: Take  # `take_units` of it, but for the first two arguments
    objects: Callable[[], list[F32]]  # the matrices that it uses
    keep: Callable[[Array | None], None]  # called with the words of an object, None where it is damaged
    late: Callable[[], bool] = lambda: False  # True where taking it would have to wait for bytes to arrive
    later: Callable[[int, int], Later] | None = None  # as `take`, for who decodes them to read


Again = Callable[[Sequence[Entry]], Iterator[Item]]
"""Items of records that were declined in a bundle."""


def take_units(walk: Walk, t: Tensor, i: int, n: int = 1) -> tuple[memoryview, Held | None]:
    """The bytes of units i..i + n - 1, which come next, with the padding between them, unchecked; what to give back."""
    return walk.take(t.units[i : i + n], t.record, lambda k: f"{t.name!r} unit {i + k}")


def later_units(walk: Walk, t: Tensor, access: Access, i: int, n: int) -> Later:
    """Where the units i..i + n - 1 are, which come next; nothing is read."""
    units = t.units[i : i + n]
    place = walk.later(units, t.record)
    return Later(
        access, *place, lambda data: walk.check_padding(data, units, t.record, lambda k: f"{t.name!r} unit {i + k}")
    )


def first_units(item: Item) -> list[bytes]:
    """Copies of the units in front of the tiles."""
    out = []
    for i in range(item.t.first):
        view, held = item.take(i)
        out.append(bytes(view))
        if held:
            held.give()
    return out


class Engine(Protocol):
    """Decodes what goes by."""

    name: str  # what decodes, for people
    ring: int  # bytes that may be held beyond the tensors
    trace: Trace | None

    def run(self, items: Iterator[Item | None]) -> Iterator[tuple[Tensor, Any]]:
        """(tensor, its words (R, C) as an array, or the finished torch tensor) of each item, in order.

        An item None says that nothing more has arrived: time to hand out what is there. Objects come as arrays. Tensors
        that are damaged are in the mapping that the engine was made with, or end the run with their error.
        """


def note(damaged: Damaged, t: Tensor, e: RacError) -> None:
    """Take in the error of a tensor under all its names."""
    for name in (t.name, *(a for a, _ in t.aliases)):
        damaged[name] = e.with_traceback(None)  # which would keep the tensor


@dataclass(slots=True)
class _Pending:
    """A tensor in work."""

    item: Item
    out: Array | None = None
    jobs: list[Task] = field(default_factory=list)
    decoder: Opened | None = None  # by which jobs know it
    error: RacError | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.item.t.nbytes

    def release(self) -> Loaded:
        """The tensor, which is not referred to from here any more."""
        assert self.out is not None  # noqa: S101
        out, self.out = self.out, None
        return self.item.t, out


@dataclass(slots=True)
class _Several:
    """Tensors in work that are decoded together."""

    bundle: Bundle
    again: Again
    jobs: list[Task]
    at: int = 0  # number of the next that is handed out

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.bundle.nbytes


def _at_once(item: Item, out: Array) -> None:
    """Decode a tensor for which a job would cost more than it takes."""
    dec = Decoder(item.t, ())
    view, held = item.take(0)
    try:
        dec.check(0, view)
        with dec.at(0):
            dec.coder.decode(np.frombuffer(view, np.uint8), item.t.grid.box(0), out)
    finally:
        if held:
            held.give()


def _run(t: Tensor, i: int, end: int, most: int) -> int:
    """Number of tiles from `i` on, in front of `end`, that are taken in one go: as many as have `most` bytes."""
    starts, first = t.units.starts, t.first + i
    return max(1, bisect.bisect(starts, starts[first] + most, first + 1, t.first + end + 1) - first - 1)


class Cpu:
    """The decoder that runs on the CPU: C kernels, or numba in their place."""

    def __init__(
        self, threads: int, ring: int = RING, damaged: Damaged | None = None, trace: Trace | None = None
    ) -> None:
        """`damaged`: takes in the errors of tensors that are damaged, instead of raising the first."""
        if ring < LEAST:
            raise ValueError(f"ring must be at least {LEAST} bytes")
        self.name = f"CPU ({native.kernel()}, {threads} thread{'s' * (threads > 1)})"
        self.ring, self.trace = ring, trace
        self._threads, self._damaged = threads, damaged
        self._window, self._apart, self._most = ring // 2, ring // 8, max(ring // 8, SCRATCH)
        self._group = max(LEAST, min(GROUP, ring // (8 * threads)))
        self._reset()

    def _reset(self) -> None:
        self._job = Job(self.trace)
        self._room = Room(self.ring // 16)
        self._busy = deque[Task]()
        self._waiting = deque[_Pending | _Several]()
        self._held = 0
        self._team: Team | None = None

    def run(self, items: Iterator[Item | None]) -> Iterator[tuple[Tensor, Array]]:
        """(tensor, its words (R, C)) of each item, objects included, in order. Several may be under way at once."""
        return cast(Iterator[tuple[Tensor, Array]], self._own()._go(items, None))

    def bundled(self, items: Iterator[Item | Bundle], again: Again) -> Iterator[Loaded]:
        """As `run`; of tensors in bundles the rows of the index and bytes (n,)."""
        return self._own()._go(items, again)

    @property
    def bundle(self) -> int:
        """Stored bytes that a bundle may have; 0: there can be none."""
        return self._group if native.available() and self._damaged is None else 0

    def _own(self) -> Cpu:
        own = copy.copy(self)
        own._reset()
        return own

    def _go(self, items: Iterator[Item | Bundle | None], again: Again | None) -> Iterator[Loaded]:
        failed = None
        try:
            try:
                for item in items:
                    if isinstance(item, Bundle):
                        assert again is not None  # noqa: S101
                        self._together(item, again)
                        yield from self._hand_out(self._due)
                        continue
                    late = _always if item is None else item.late
                    if late():
                        self._submit(last=True)
                        yield from self._hand_out(late)
                    if item is not None:
                        self._add(item)
                        yield from self._hand_out(self._due)
            except RacError as e:  # behind those that are in work
                failed = e
            yield from self._hand_out(_always)
            if failed is not None:
                raise failed
        finally:
            failed = None  # its traceback refers to this frame, and to all that the failed read held
            if self._team:
                self._team.close()
            for job in (self._job, *self._busy):
                job.give()

    def _hand_out(self, more: Callable[[], bool]) -> Iterator[Loaded]:
        """The tensors in work that are not damaged, in order, while `more()`; each is waited for."""
        while self._waiting and more():
            p = self._waiting[0]
            self._wait(p)
            if isinstance(p, _Several):
                yield from self._each(p)
            self._waiting.popleft()
            self._held -= p.nbytes
            if isinstance(p, _Several):
                continue
            if p.error is None:
                yield p.release()
            elif self._damaged is not None:
                note(self._damaged, p.item.t, p.error)

    def _each(self, p: _Several) -> Iterator[Loaded]:
        """The tensors of a bundle; those that were declined are read again, each by itself."""
        entries, words = p.bundle.entries, p.bundle.words
        while p.at < len(entries):
            found, words[p.at] = words[p.at], None
            if found is not None:
                yield entries[p.at], found
                p.at += 1
                continue
            end = next((k for k in range(p.at, len(entries)) if words[k] is not None), len(entries))
            own = self._own()
            own._room = self._room
            for loaded in own._go(p.again(entries[p.at : end]), None):
                yield loaded
                p.at += 1

    def _together(self, bundle: Bundle, again: Again) -> None:
        """Take in a bundle, and give it out."""
        bundle.seat(self._room, self.trace)
        self._waiting.append(_Several(bundle, again, [bundle]))
        self._held += bundle.nbytes
        if bundle.short:
            bundle.done = Future()
            bundle.go()
        else:
            self._give(bundle)

    def _due(self) -> bool:
        """Whether the first tensor in work is done, or those that wait behind it hold too much memory."""
        done = all(job.finished() for job in self._waiting[0].jobs)
        return done or (self._held > self._window and len(self._waiting) > 1)

    def _add(self, item: Item) -> None:
        """Take in a tensor; its jobs are given out as they become large enough."""
        p = _Pending(item)
        with InFile(item.file, repr(item.t.name)):
            try:
                p.out = self._room.take(item.t)
                if item.t.tiles == 1 and item.t.nbytes <= TINY and item.t.chain.plain:
                    _at_once(item, p.out)
                else:
                    p.decoder = dec = Opened(partial(Decoder, item.t, first_units(item), item.objects()))
                    for band in item.t.bands():
                        self._band(p, dec, band, p.out)
            except (TruncatedError, SourceError):
                raise
            except RacError as e:
                if self._damaged is None:
                    raise
                p.error = e
        self._waiting.append(p)
        self._held += item.t.nbytes
        if item.t.record.type == RECORD_OBJECT:
            self._wait(p)
            item.keep(p.out if p.error is None else None)

    def _band(self, p: _Pending, dec: Opened, band: Band, out: Array) -> None:
        """Take in the tiles of a band, and the product behind them."""
        item, t = p.item, p.item.t
        place, i, end = target(t, band, Place(out)), band.tiles.start, band.tiles.stop
        if t.chain.product is not None:
            self._job.scratch += place.words.nbytes
        while i < end:
            n = _run(t, i, end, RUN if item.later is None else self._group)
            job = self._job
            job.file = item.file
            job.tiles.append((dec, range(i, i + n), self._bytes(item, i + t.first, n), place))
            elements = t.grid.area(i + n) - t.grid.area(i)
            job.dense += elements * t.word
            job.scratch += elements if t.quantised else 0
            i += n
            if not p.jobs or p.jobs[-1] is not job:
                p.jobs.append(job)
            if t.chain.product is not None:  # a band is joined by the job that has its last tiles, and all of them
                if i < end:
                    continue
                job.joins.append((dec, place.words, out[band.box.r0 : band.box.r1], band.box))
            if job.size >= self._group or job.scratch >= SCRATCH:
                self._submit()

    def _bytes(self, item: Item, i: int, n: int) -> Array | Later:
        """The units i..i + n - 1, or where they are, for the job at hand."""
        job, starts = self._job, item.t.units.starts
        if item.later is not None and starts[i + n] - starts[i] > SMALL:
            later = item.later(i, n)
            job.size += later.size
            return later
        view, held = item.take(i, n)
        if held and job.size > self._apart:  # a job must not hold all buffers: then none could be filled
            copy = bytes(view)
            held.give()
            view, held = memoryview(copy), None
        if held:
            job.held.append(held)
        job.size += len(view)
        return np.frombuffer(view, np.uint8)

    def _submit(self, last: bool = False) -> None:
        """Give the job out; do it here where it is the only one."""
        job = self._job
        if not job.size and not job.dense:
            return
        self._job = Job(self.trace)
        self._give(job, last)

    def _give(self, job: Task, last: bool = False) -> None:
        """Have it done, here or by another thread."""
        while (busy := self._busy) and (busy[0].finished() or sum(j.scratch for j in busy) + job.scratch > self._most):
            first = busy.popleft()
            if self._team is not None:
                self._team.wait(first)
        job.done = Future()
        if self._threads == 1 or (last and self._team is None):
            job.go()
            return
        if self._team is None:
            self._team = Team(self._threads - 1)
        self._busy.append(job)
        self._team.give(job)

    def _wait(self, p: _Pending | _Several) -> None:
        """Until the tensor is there."""
        for job in p.jobs:
            if job.done is None:
                self._submit(last=True)
            assert job.done is not None  # noqa: S101
            if self._team is not None:
                self._team.wait(job)
            try:
                job.done.result()
                if isinstance(p, _Pending) and p.decoder in job.wrong:
                    raise job.wrong[p.decoder]
            except (TruncatedError, SourceError):
                raise
            except RacError as e:
                if self._damaged is None:
                    raise
                if isinstance(p, _Pending):
                    p.error = p.error or e
        p.jobs.clear()
