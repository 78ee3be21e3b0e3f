"""Tensors to encoded tensors, in order: planned and coded ahead of whoever takes them, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Protocol

from rac.encode import record as rec
from rac.encode import ties
from rac.encode.code.plan import Encoder, Level
from rac.encode.encoded import Bytes, Encoded
from rac.encode.sources import SourceTensor
from rac.machine import room

WINDOW = 64 << 20
"""Dense bytes in work beyond the largest tensor."""
Job = tuple[Callable[..., Encoded], tuple[Any, ...]]
"""A function and its arguments, for a thread or, where they pickle, a process."""


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


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the tensors of an archive are encoded."""

    level: Level
    """How tensors that stay lossless are coded."""
    threads: Executor
    """Codes these."""
    jobs: int
    quantiser: Quantiser | None = None
    pool: Executor | None = None
    """Quantises; None: the threads do."""
    done: Callable[[str], Encoded | None] = lambda _: None
    """Gives a lossless tensor that is encoded already, by its name."""

    def run(self, groups: Sequence[ties.Group]) -> Generator[tuple[ties.Group, Encoded]]:
        """Each tensor in order; what is taken next is worked on first, what is not taken is cancelled."""
        work = _Run(self, groups)
        try:
            yield from work.results()
        finally:
            for job in work.running:
                job.cancel()

    def need(self, t: SourceTensor) -> int:
        """Bytes of memory that a tensor takes until it is written, about."""
        return self.quantiser.need(t) if self.quantiser and t.name in self.quantiser.names else t.nbytes


def whole(group: ties.Group, level: Level) -> Encoded:
    """A lossless tensor, coded by one thread."""
    item = _Item(group, 0)
    for row in range(item.begin(level)):
        item.bands[row + 1] = item.band(row)
    return item.encoded()


@dataclass(slots=True)
class _Item:
    """A tensor on its way."""

    group: ties.Group
    number: int
    left: int = -1
    """Rows of tiles that are still to come; -1: nothing is known of it."""
    encoder: Encoder | None = None
    """What codes a lossless tensor."""
    bands: list[list[Bytes]] = field(default_factory=list)
    """Units in front of the tiles, then those of each row of tiles."""
    objects: tuple[Encoded, ...] = ()
    done: Encoded | None = None

    def begin(self, level: Level) -> int:
        """Plan a lossless tensor, and code it too where it has one row of tiles, which no other thread could share.

        Returns how many rows are left; `left` is for the thread that hands out the work to set.
        """
        self.encoder = rec.lossless(self.group.tensor, level)
        self.objects = rec.matrix_of(self.group.tensor, level)
        plan = self.encoder.plan
        left = 0 if plan.grid.down == 1 else plan.grid.down
        self.bands = [plan.fronts + (self.band(0) if plan.grid.down == 1 else []), *([] for _ in range(left))]
        return left

    def band(self, row: int) -> list[Bytes]:
        """The units of a row of tiles."""
        assert self.encoder is not None  # noqa: S101 - it was begun
        return rec.band(self.group.tensor, self.encoder, row)

    def encoded(self) -> Encoded:
        """The tensor, all of whose bands are there."""
        assert self.encoder is not None  # noqa: S101 - it was begun
        plan, units = self.encoder.plan, [unit for band in self.bands for unit in band]
        return Encoded(rec.head(self.group, plan), units, rec.fields(self.group, plan, units), self.objects)


class _Run:
    """One run of a schedule."""

    def __init__(self, schedule: Schedule, groups: Sequence[ties.Group]) -> None:
        self.running: dict[Future[Any], tuple[_Item, int]] = {}
        self._s = schedule
        self._coming = deque(groups)
        self._waiting: deque[_Item] = deque()
        self._ready: list[tuple[int, int]] = []
        """(number of the tensor, row of tiles; -1: begin it)"""
        self._held = self._written = 0
        self._limit = max(
            [WINDOW if schedule.quantiser is None else room(), *(schedule.need(g.tensor) for g in groups)]
        )

    def results(self) -> Iterator[tuple[ties.Group, Encoded]]:
        """The tensors in order."""
        while self._coming or self._waiting:
            self._admit()
            while self._ready and len(self.running) < 2 * self._s.jobs:
                self._submit(*heappop(self._ready))
            first = self._waiting[0]
            if first.left == 0:
                self._waiting.popleft()
                self._written += 1
                yield first.group, first.done or first.encoded()
                self._held -= self._s.need(first.group.tensor)
                continue
            for job in wait(self.running, return_when=FIRST_COMPLETED).done:
                self._collect(job, *self.running.pop(job))

    def _admit(self) -> None:
        """Take in tensors while there is room."""
        while self._coming:
            size = self._s.need(self._coming[0].tensor)
            if self._waiting and self._held + size > self._limit:
                break
            self._waiting.append(_Item(self._coming.popleft(), self._written + len(self._waiting)))
            heappush(self._ready, (self._waiting[-1].number, -1))
            self._held += size

    def _submit(self, number: int, row: int) -> None:
        item, s = self._waiting[number - self._written], self._s
        if row >= 0:
            self.running[s.threads.submit(item.band, row)] = item, row
            return
        if s.quantiser and item.group.tensor.name in s.quantiser.names:
            job = s.quantiser.job(item.group)
            if not isinstance(job, Encoded):
                self.running[(s.pool or s.threads).submit(job[0], *job[1])] = item, row
                return
            item.done = job
        else:
            item.done = s.done(item.group.tensor.name)
        if item.done:
            item.left = 0
        else:
            self.running[s.threads.submit(item.begin, s.level)] = item, row

    def _collect(self, job: Future[Any], item: _Item, row: int) -> None:
        found = job.result()
        if row >= 0:
            item.bands[row + 1] = found
            item.left -= 1
        elif isinstance(found, Encoded):
            item.done, item.left = found, 0
        else:
            item.left = found
            for r in range(found):
                heappush(self._ready, (item.number, r))
