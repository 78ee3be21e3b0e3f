"""Tensors to encoded tensors, in order: planned and coded ahead of whoever takes them, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Generator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from heapq import heappop, heappush
from queue import SimpleQueue
from typing import Any, Protocol

from rac.container import wire
from rac.encode import record, ties, workers
from rac.encode.code.plan import LARGE, Encoder, Level
from rac.encode.encoded import Bytes, Encoded, Spool
from rac.encode.sources import SourceTensor
from rac.machine import room

WINDOW = 128 << 20  # dense bytes in work beyond the largest tensor
TOGETHER = 1 << 20  # dense bytes of tensors that one job begins: to hand over a small one takes as long as to code it
Job = tuple[Callable[..., Encoded], tuple[Any, ...]]  # a function and its arguments, for a thread or a process


class Quantiser(Protocol):
    """What makes some tensors lossy."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What the provenance states of it."""

    @property
    def names(self) -> Container[str]:
        """The tensors that it quantises."""

    def need(self, t: SourceTensor) -> int:
        """Bytes of memory that the work on a tensor takes, about."""

    def job(self, group: ties.Group) -> Job | Encoded:
        """What encodes a tensor, or the tensor where that is done already."""


@dataclass(slots=True)
class _Item:
    """A tensor on its way."""

    group: ties.Group
    number: int
    left: int = -1  # pieces, rows of tiles, that are still to come; -1: nothing is known of it
    encoder: Encoder = field(init=False)  # what codes a lossless tensor
    rows: list[range] = field(default_factory=list)  # of tiles, of each piece
    bands: list[list[Bytes]] = field(default_factory=list)  # units in front of the tiles, then those of each piece
    spool: Spool | None = None  # where the units of a large tensor are
    spooled: list[list[int]] = field(default_factory=list)  # as `bands`: their numbers there
    objects: tuple[Encoded, ...] = ()
    done: Encoded | None = None

    def begin(self, level: Level, beside: str) -> int:
        """Plan a lossless tensor, and code it too where it is one piece; returns how many pieces are left.

        What is coded of a large one goes to a file in the folder of the path `beside`.
        """
        self.encoder = record.lossless(self.group.tensor, level)
        self.objects = record.matrix_of(self.group.tensor, level)
        self.rows, plan = record.pieces(self.encoder.plan.grid), self.encoder.plan
        left = len(self.rows) if len(self.rows) > 1 else 0
        self.bands = [plan.fronts, *([] for _ in range(left))]
        if len(self.rows) == 1:
            self.bands.append(self.band(0))
        if self.group.tensor.nbytes >= LARGE and left:
            self.spool = Spool(beside)
            self.spooled = [self.spool.put(plan.fronts), *([] for _ in range(left))]
        return left

    def band(self, i: int) -> list[Bytes]:
        """The units of piece `i`."""
        return record.band(self.group.tensor, self.encoder, self.rows[i])

    def take(self, i: int, units: list[Bytes]) -> None:
        """Take in the units of piece `i`."""
        if self.spool is None:
            self.bands[i + 1] = units
        else:
            self.spooled[i + 1] = self.spool.put(units)
        self.left -= 1

    def encoded(self) -> Encoded:
        """The tensor, all of whose bands are there."""
        units: Sequence[Bytes] = wire.joined(self.bands)
        if self.spool is not None:
            self.spool.arrange([number for band in self.spooled for number in band])
            units = self.spool
        return record.encoded(self.group, self.encoder.plan, units, objects=self.objects)


@dataclass(slots=True)
class Schedule:
    """The tensors of an archive on their way from the source to the writer."""

    level: Level  # how tensors that stay lossless are coded
    jobs: int
    threads: Executor
    pool: Executor  # quantises; the threads do all else
    quantiser: Quantiser | None
    done: Callable[[str], Encoded | None]  # gives a lossless tensor that is encoded already, by its name
    beside: str  # a path in whose folder is kept what is coded of a large tensor
    window: int = WINDOW  # dense bytes of lossless tensors in work beyond the largest
    near: bool = True  # whether the source is at hand, and bytes in work are those that are held
    _waiting: deque[_Item] = field(default_factory=deque)
    _running: dict[Future[Any], tuple[list[_Item], int]] = field(default_factory=dict)
    _finished: SimpleQueue[Future[Any]] = field(default_factory=SimpleQueue)
    _ready: list[tuple[int, int]] = field(default_factory=list)  # (number of the tensor, piece; -1: begin it)
    _written: int = 0

    def run(self, groups: Sequence[ties.Group]) -> Generator[tuple[ties.Group, Encoded]]:
        """Each tensor in order; what is taken next is worked on first, what is not taken is cancelled."""
        coming, held = deque(groups), 0
        most = max((self._need(g.tensor) for g in groups), default=0)
        limit = self.window + most if self.quantiser is None else max(room(), most)
        try:
            while coming or self._waiting:
                while coming and (not self._waiting or held + self._need(coming[0].tensor) <= limit):
                    held += self._need(coming[0].tensor)
                    self._waiting.append(_Item(coming.popleft(), self._written + len(self._waiting)))
                    heappush(self._ready, (self._waiting[-1].number, -1))
                while self._ready and len(self._running) < 2 * self.jobs:
                    self._submit(*heappop(self._ready))
                first = self._waiting[0]
                if first.left == 0:
                    self._waiting.popleft()
                    self._written += 1
                    yield first.group, first.done or first.encoded()
                    held -= self._need(first.group.tensor)
                    continue
                job = self._finished.get()
                self._collect(job, *self._running.pop(job))
        finally:
            for job in self._running:
                job.cancel()

    def _lossy(self, t: SourceTensor) -> Quantiser | None:
        return self.quantiser if self.quantiser and t.name in self.quantiser.names else None

    def _need(self, t: SourceTensor) -> int:
        """Bytes of memory that a tensor takes until it is written, about."""
        if quantiser := self._lossy(t):
            return quantiser.need(t)
        return min(t.nbytes, LARGE) if self.near else t.nbytes

    def _submit(self, number: int, row: int) -> None:
        item = self._waiting[number - self._written]
        if row >= 0:
            self._running[workers.submit(self.threads, self._finished, item.band, row)] = [item], row
            return
        t = item.group.tensor
        quantiser = self._lossy(t)
        job = quantiser.job(item.group) if quantiser else self.done(t.name)
        if isinstance(job, Encoded):
            item.done, item.left = job, 0
        elif job is None:
            items = self._together(item)
            self._running[workers.submit(self.threads, self._finished, _begin, items, self.level, self.beside)] = (
                items,
                row,
            )
        else:
            self._running[workers.submit(self.pool, self._finished, job[0], *job[1])] = [item], row

    def _together(self, item: _Item) -> list[_Item]:
        """A lossless tensor and those behind it that one job begins with it."""
        items, size = [item], item.group.tensor.nbytes
        while self.quantiser is None and self._ready and self._ready[0][1] < 0:
            other = self._waiting[self._ready[0][0] - self._written]
            size += other.group.tensor.nbytes
            if size > TOGETHER:
                break
            heappop(self._ready)
            items.append(other)
        return items

    def _collect(self, job: Future[Any], items: list[_Item], row: int) -> None:
        found = job.result()
        if row >= 0:
            items[0].take(row, found)
        elif isinstance(found, Encoded):
            items[0].done, items[0].left = found, 0
        else:
            for item, left in zip(items, found, strict=True):
                item.left = left
                for r in range(left):
                    heappush(self._ready, (item.number, r))


def _begin(items: list[_Item], level: Level, beside: str) -> list[int]:
    return [item.begin(level, beside) for item in items]
