"""The records of a model that does not fit into memory: kept within a limit, and asked for before they are needed.

Bytes wait in one of two places. Those that were asked for ahead (by the router of a layer of experts, and by the layer
that ran before, for those that came next the last time) are on their way until somebody takes them. Those that were
taken stay as long as there is room. The one that was taken longest ago makes room, but only for what is asked for more
often than itself: a model that runs layer after layer, larger than the room, would else never find anything.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac import frameworks
from rac.decode.archive import RacFile
from rac.errors import MismatchError
from rac.runtime import made
from rac.runtime.held import Head, decoded_rows, spans_of, whole
from rac.runtime.ranges import FRONT, TICKET, Key, Loaded, Reader
from rac.system import private_memory, trim

if TYPE_CHECKING:
    from rac.runtime.memory import Budget

_STALE = 64
"""What was asked for ahead is forgotten once that many more calls have asked, and room is short."""
_OTHERS = 1 << 20
"""Bytes of a process that are not looked at: what is made before the weights, such as the tokenizer."""
_AGE = 16
"""After so many times as many uses as there are records, what was used before counts half."""


class _Group:
    """Keys that are read together, by the first who needs them: a thread, or who asks for one of them."""

    __slots__ = ("_begun", "_load", "_lock", "asked", "flies", "found", "keys", "size")

    def __init__(self, keys: Sequence[Key], asked: int, load: Callable[[Sequence[Key]], dict[Key, Loaded]]) -> None:
        """`asked` is the number of the call that has asked for them."""
        self.keys, self.asked, self._load = keys, asked, load
        self.size, self.flies = 0, False
        self._begun, self._lock = False, threading.Lock()
        self.found: Future[dict[Key, Loaded]] = Future()

    def run(self) -> None:
        """Read, unless somebody has begun to."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
        try:
            self.found.set_result(self._load(self.keys))
        except BaseException as e:
            self.found.set_exception(e)

    def take(self, key: Key) -> Loaded:
        """What was read for a key; RacError where that failed."""
        self.run()
        return self.found.result()[key]


class Decoded:
    """Experts that stay as they were decoded, where all records have room and some is left.

    The one that was used longest ago makes room, but only for what is used more often, as in a `Store`.
    """

    def __init__(self) -> None:
        self.room = self.held = self.hits = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, tuple[torch.Tensor, int]] = OrderedDict()
        self._used: Counter[Any] = Counter()

    def find(self, key: Any) -> torch.Tensor | None:
        """What was kept; None where it was not, or where somebody has written to it."""
        if not self.room:
            return None
        with self._lock:
            self._used[key] += 1
            if (found := self._kept.get(key)) is None:
                return None
            tensor, version = found
            if tensor._version != version:
                self._drop(key)
                return None
            self._kept.move_to_end(key)
            self.hits += 1
            return tensor

    def keep(self, key: Any, tensor: torch.Tensor) -> None:
        """Keep what was decoded, where there is room."""
        if tensor.nbytes > self.room:
            return
        with self._lock:
            while self.held + tensor.nbytes > self.room:
                oldest = next(iter(self._kept))
                if self._used[oldest] + 1 >= self._used[key]:
                    self._kept.move_to_end(oldest)
                    return
                self._drop(oldest)
            self._kept[key] = tensor, tensor._version
            self.held += tensor.nbytes

    def shrink(self, size: int) -> int:
        """Let go of `size` bytes or more, for good; what was let go of."""
        with self._lock:
            before = self.held
            self.room = max(0, min(self.room, self.held - size))
            while self.held > self.room:
                self._drop(next(iter(self._kept)))
            return before - self.held

    def _drop(self, key: Any) -> None:
        self.held -= self._kept.pop(key)[0].nbytes


class Store:
    """The records of one file for the layers of one model; any number of threads may ask.

    Until `limit` is called, nothing is kept. The file is closed with the store.
    """

    def __init__(self, file: RacFile) -> None:
        self.reader, self.decoded = Reader(file), Decoded()
        self._room = self._ahead = 0
        self.budget: Budget | None = None
        self._most: int | None = None
        self._begin()
        self.count_anew()

    def _begin(self) -> None:
        _alive.add(self)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[Key, Loaded] = OrderedDict()
        self._coming: OrderedDict[Key, _Group] = OrderedDict()
        self._wanted: deque[_Group] = deque()
        self._used: Counter[Key] = Counter()
        self._last: tuple[Key, Loaded] | None = None
        self._held = self._flying = self._uses = self._asked = 0

    def count_anew(self) -> None:
        """What the process has taken until now is not the model's (see `bound`)."""
        trim()
        self.base = private_memory()

    def __deepcopy__(self, memo: Any) -> Store:
        """A copy of a model reads from the same store."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.reader.file, self.budget)

    def limit(self, budget: Budget) -> None:
        """What may be kept, and may be on its way, from now on."""
        with self._lock:
            self.budget, self._ahead = budget, budget.ahead
            self._room = min(budget.kept, self.reader.most)
            self.decoded.room = budget.kept - self._room

    def bound(self, most: int) -> None:
        """Keep less where the memory of the process has grown by more than `most` bytes since `base`.

        Keys and values of a text are in that, and what `malloc` leaves unused. Nothing is bounded on systems that do
        not say what memory a process has.
        """
        slack = _OTHERS + max(most // 32, self.budget.decoded if self.budget else 0)
        self._most = self.base + most - slack if private_memory() else None

    def _shrink(self) -> None:
        """See `bound`. Called with the lock."""
        if self._most is None or private_memory() <= self._most:
            return
        trim()
        again = (self._most - self.base) // 32  # which it may grow by before it is asked for again
        over = private_memory() - self._most + again
        over -= self.decoded.shrink(over) if over > 0 else 0
        if over > 0:
            self._room = max(0, min(self._room, self._held - over))
            while self._held > self._room:
                self._held -= self._kept.popitem(last=False)[1].nbytes

    def close(self) -> None:
        """End the threads and close the file; layers that run from then on fail."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._wanted.clear()
        for access in (a.access for a in self.reader.file.archives if not a.access.near):
            access.close()  # what a server sends is not waited for
        if pool:
            pool.shutdown(cancel_futures=True)
        with self._lock:
            self._kept, self._coming, self._last, self._held = OrderedDict(), OrderedDict(), None, 0
        self.decoded = Decoded()
        self.reader.file.close()

    def of(self, tickets: bytes, head: Head) -> Filed:
        """The records that these tickets stand for."""
        return Filed(self, tickets, head)

    def weight(self, tickets: bytes, making: made.Making | None = None) -> Loaded:
        """All of a weight. RacError where it is damaged or cannot be read."""
        return self._take(Key(tickets, making))

    def bands(self, ticket: bytes, first: int, last: int) -> Loaded:
        """The rows of tiles first..last - 1 of a record, behind its front."""
        return self._take(Key(ticket, None, first, last))

    def here(self, tickets: bytes, making: made.Making | None = None) -> Loaded | None:
        """All of a weight where that waits for nobody; None: it was not read yet."""
        key = Key(tickets, making)
        with self._lock:
            group = self._coming.get(key)
            if key not in self._kept and (group is None or not group.found.done()):
                return None
            if group is not None and group.found.exception() is not None:  # who needs it will see
                return None
        return self._take(key)

    def want(self, groups: Iterable[Sequence[Key]]) -> None:
        """Read these ahead, group after group, as far as there is room."""
        if not self._ahead:
            return
        with self._lock:
            self._asked += 1
            there = (self._kept, self._coming, (self._last[0] if self._last else None,))
            lists = [[k for k in keys if not any(k in place for place in there)] for keys in groups]
            new = [_Group(keys, self._asked, self.reader.load) for keys in lists if keys]
            for group in new:
                self._coming |= dict.fromkeys(group.keys, group)
                self.reader.counts.guessed += len(group.keys)
        for group in new:
            group.size = sum(map(self.reader.size_of, group.keys))
        with self._lock:
            self._wanted += new
        self._pump()

    def _pump(self) -> None:
        """Give threads as much as may be on its way."""
        begin = []
        with self._lock:
            while self._wanted:
                group = self._wanted[0]
                if self._flying + group.size > self._ahead and self._flying and not self._forget():
                    break
                self._wanted.popleft()
                if any(self._coming.get(key) is group for key in group.keys) and not group.flies:
                    self._fly(group)
                    begin.append(group)
            if begin and self._pool is None:
                self._pool = ThreadPoolExecutor(max(a.access.parallel for a in self.reader.file.archives), "rac-disk")
            pool = self._pool
        for group in begin:
            assert pool is not None  # noqa: S101 - made above
            pool.submit(group.run)

    def _fly(self, group: _Group) -> None:
        """Its bytes count from now on."""
        group.flies = True
        self._flying += group.size
        self.reader.counts.most = max(self.reader.counts.most, self._held + self._flying)

    def _land(self, group: _Group) -> None:
        """Its bytes count no longer: all were taken, or it was forgotten."""
        if group.flies:
            group.flies = False
            self._flying -= group.size

    def _forget(self) -> bool:
        """Let go of the oldest group if it was asked for long ago: a guess that was wrong. False where it was not."""
        group = next(iter(self._coming.values()), None)
        if group is None or group.asked > self._asked - _STALE or (group.flies and not group.found.done()):
            return False
        for key in group.keys:
            if self._coming.get(key) is group:
                del self._coming[key]
        self._land(group)
        return True

    def _take(self, key: Key) -> Loaded:
        with self._lock:
            self._count(key)
            self._shrink()
            if self._last is not None and self._last[0] == key:
                return self._last[1]
            found, group = self._kept.get(key), None
            if found is not None:
                self._kept.move_to_end(key)
                self._last = key, found
                self.reader.counts.hits += 1
                return found
            group = self._coming.pop(key, None)
            self.reader.counts.ahead += group is not None
            self.reader.counts.misses += group is None
            self.reader.counts.late += group is not None and not group.found.done()
            start = time.perf_counter()
            if group is not None and not group.flies:  # it is read here and now
                self._fly(group)
            failed = group is not None and group.found.done() and group.found.exception() is not None
        try:
            with self.reader.blamed(key.tickets):  # what failed before may be there again
                found = self.reader.load([key])[key] if group is None or failed else group.take(key)
        finally:
            with self._lock:
                if group is not None and not any(self._coming.get(k) is group for k in group.keys):
                    self._land(group)
        with self._lock:
            self.reader.counts.waited += time.perf_counter() - start
            self._keep(key, found)
            self._last = key, found
        self._pump()
        return found

    def _count(self, key: Key) -> None:
        """One use more."""
        self._used[key] += 1
        self._uses += 1
        if self._uses > _AGE * len(self._used):
            self._used = Counter({k: n // 2 for k, n in self._used.items() if n > 1})
            self._uses //= 2

    def _keep(self, key: Key, found: Loaded) -> None:
        """Keep what was taken where there is room, or what is in its place is asked for less often."""
        if key in self._kept or found.nbytes > self._room:
            return
        out, free = [], self._room - self._held
        for other, there in self._kept.items():
            if free >= found.nbytes:
                break
            if self._used[other] + 1 >= self._used[key]:
                self._kept.move_to_end(other)
                return
            out.append(other)
            free += there.nbytes
        for other in out:
            self._held -= self._kept.pop(other).nbytes
        self._kept[key] = found
        self._held += found.nbytes
        self.reader.counts.most = max(self.reader.counts.most, self._held + self._flying)


class Filed:
    """The records of one weight in a file; `head` is what its layer knows of them."""

    def __init__(self, store: Store, tickets: bytes, head: Head) -> None:
        self.store, self.tickets, self.head = store, tickets[: head.parts * head.records * TICKET], head

    def _of(self, part: int) -> bytes:
        n = self.head.records * TICKET
        return self.tickets[part * n : (part + 1) * n]

    def blamed(self) -> AbstractContextManager[None]:
        """Context of reading and decoding, whose errors name file and tensor."""
        return self.store.reader.blamed(self.tickets)

    def part(self, i: int = 0) -> tuple[made.Weight, Any]:
        """What was parsed of part `i`, and its bytes. RacError where they are damaged, or of another tensor."""
        return self._checked(self.store.weight(self._of(i), self.head.making))

    def here(self) -> tuple[made.Weight, Any] | None:
        """As `part`, where its bytes are in memory; None: they are not."""
        found = self.store.here(self._of(0), self.head.making)
        return None if found is None else self._checked(found)

    def _checked(self, found: Loaded) -> tuple[made.Weight, Any]:
        t, head = found.stored.tensor, self.head
        if (t.dtype, t.shape) != (head.dtype, head.shape):
            what = f"is {t.dtype} {list(t.shape)}, the layer needs {head.dtype} {list(head.shape)}"
            raise MismatchError(what, file=self.store.reader.name, unit=repr(t.name))
        return found.stored, found.data

    def _cut(self, count: int) -> made.Weight | None:
        """Its front, where `count` parts along the first dimension are read alone; None: all of it is read."""
        reader, head = self.store.reader, self.head
        if head.parts > 1 or head.making is not None or reader.stored_size(self.tickets) <= 2 * FRONT:
            return None
        s, _ = self._checked(reader.front(self.tickets))
        return None if whole(s, count) else s

    def front(self) -> tuple[made.Weight, Any]:
        """What was parsed of a weight of one record, and the bytes in front of its tiles; the tiles are not read."""
        return self._checked(self.store.reader.front(self.tickets))

    def in_bands(self) -> bool:
        """Whether `bands` can give it."""
        s = self._cut(1) if len(self.head.shape) == 2 else None
        return s is not None and s.tensor.grid.down > 1 and s.tensor.grid.rows == self.head.shape[0]

    def bands(self, pool: Executor | None) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows of a matrix, one row of its tiles after the other: the first row, and (rows, columns) decoded.

        Each is in the memory of the one before.
        """
        s, _ = self.front()
        t, grid = s.tensor, s.tensor.grid
        self.store.want([[Key(self.tickets, None, i, i + 1)] for i in range(grid.down)])
        room = np.empty((min(grid.tr, grid.rows), grid.cols), f"<u{t.word}")
        for i, top in enumerate(range(0, grid.rows, grid.tr)):
            words = room[: grid.rows - top]
            s.decode(self.store.bands(self.tickets, i, i + 1).data, words, i, i + 1, pool)
            yield top, frameworks.to_framework(words, t.dtype, words.shape, "pt")

    def rows(self, found: NDArray[np.int64], pool: Executor | None) -> torch.Tensor:
        """As `rac.runtime.held.decoded_rows`, of a weight of one part."""
        if (s := self._cut(len(found))) is None:
            s, data = self.part()
            return decoded_rows(s, lambda first, last: data, found, pool)
        if len(several := dict.fromkeys(spans_of(s, found))) > 1:
            self.store.want([[Key(self.tickets, None, *span)] for span in several])
        return decoded_rows(s, lambda first, last: self.store.bands(self.tickets, first, last).data, found, pool)

    def expert(self, number: int, experts: int) -> tuple[bytes, int]:
        """What stands for one of the `experts` that a weight has."""
        return (self._of(number * (self.head.parts // experts)), -1) if self.head.parts > 1 else (self.tickets, number)

    def most(self, count: int) -> tuple[int, float]:
        """Bytes read at once of a weight with `count` parts along its first dimension, and which share of it."""
        if self.head.parts > 1:
            return sum(map(self.store.reader.size_of, self.keys(0, count))), 1 / count
        if (s := self._cut(1)) is None:
            return self.store.reader.stored_size(self.tickets), 1
        spans = dict.fromkeys(spans_of(s, np.arange(count)))
        size = max(self.store.reader.size_of(Key(self.tickets, None, *span)) for span in spans)
        return size, max(b - a for a, b in spans) / s.tensor.grid.down

    def keys(self, expert: int | None = None, experts: int = 1) -> list[Key]:
        """What is read for one of the `experts`; by default for all of a weight of one part."""
        if expert is None:
            return [Key(self.tickets, self.head.making)]
        if self.head.parts == 1:
            s = self._cut(1)
            span = (-1, -1) if s is None else spans_of(s, np.array([expert]))[0]
            return [Key(self.tickets, self.head.making, *span)]
        each = self.head.parts // experts
        return [Key(self._of(expert * each + j), self.head.making) for j in range(each)]


def _again(file: RacFile, budget: Budget | None) -> Store:
    out = Store(file)
    if budget is not None:
        out.limit(budget)
    return out


_alive: weakref.WeakSet[Store] = weakref.WeakSet()


def _forked() -> None:
    """Begin anew in a forked process: the threads, and whoever held a lock, have stayed with the parent."""
    for store in list(_alive):
        store.reader.begin()
        store._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
