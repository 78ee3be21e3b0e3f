"""A rank at work: it claims items, does them, and leaves records and markers. Claims save work, markers are the truth.

Two ranks that do one item leave the same bytes. So nothing is wrong where a claim is lost, seen late, or taken from a
rank that was held dead; it only costs time.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from rac.encode import workers
from rac.encode.encoded import Encoded
from rac.encode.options import silent
from rac.errors import RacError
from rac.machine import room
from rac.ranks.lease import Heart, Watch, parsed
from rac.ranks.records import Records, write
from rac.ranks.stage import Item, Marker, Stage
from rac.ranks.store import Store, several

PAUSE = 0.05, 5.0  # seconds between two looks at what others still do: at first, and at most
Work = tuple[Callable[..., "Made"], tuple[Any, ...]]
"""What makes an item, a function and its arguments, for a thread or a process."""


@dataclass(frozen=True, slots=True)
class Made:
    """What an item became."""

    rows: list[list[Any]]
    encoded: Sequence[Encoded] = ()
    """Records to leave; none: the rows are all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the items of a stage are made."""

    stage: Stage
    work: Callable[[Item], Work]
    need: Callable[[Item], int]
    """Bytes of memory that the work on an item takes, about."""
    pool: Executor


@dataclass(slots=True)
class Crew:
    """This rank among others."""

    store: Store
    job: str
    heart: Heart
    world: int
    jobs: int
    note: Callable[[str, int, int], None] = silent
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.store)

    def marker(self, stage: Stage, item: Item, data: bytes | None) -> Marker | None:
        """The marker in some bytes, where it is one of this item of this job."""
        return stage.marker(item, self.job, data)

    def do(self, plan: Plan, wait: bool = True) -> dict[int, Marker]:
        """Markers of the items by number. With `wait` of all, else until nothing is left that others are not doing."""
        stage = plan.stage
        self._enter(stage)
        done = self.markers(stage, stage.items)
        left = deque(i for i in stage.order(self.world, self.heart.rank) if i.number not in done)
        busy, pause = list[Item](), PAUSE[0]
        with _Running(plan, self.jobs) as run:
            while len(done) < len(stage.items):
                while left and run.fits(left[0]):
                    item = left.popleft()
                    if found := self.marker(stage, item, self.store.get(stage.name(item, "json"))):
                        done[item.number] = found
                    elif self._claim(stage, item):
                        run.begin(item)
                    else:
                        busy.append(item)
                if run:
                    item, made, seconds = run.one()
                    done[item.number] = self.leave(stage, item, made, seconds)
                    pause = PAUSE[0]
                elif busy:
                    if not wait:
                        break
                    time.sleep(pause)
                    pause = min(PAUSE[1], 1.5 * pause)
                    done |= self.markers(stage, busy)
                    left, busy = deque(i for i in busy if i.number not in done), []
                self.note(stage.what, len(done), len(stage.items))
        return done

    def _enter(self, stage: Stage) -> None:
        """Tell people what this rank works on."""
        row = [stage.key, stage.what, len(stage.items), stage.size]
        known: list[Any] = self.heart.about.get("stages", [])
        if row not in known:
            self.heart.about["stages"] = [*known, row]
        self.heart.beat()

    def markers(self, stage: Stage, items: Sequence[Item]) -> dict[int, Marker]:
        """The markers of items that are done, by number."""
        found = several(self.store, [stage.name(item, "json") for item in items])
        read = ((item.number, self.marker(stage, item, found[stage.name(item, "json")])) for item in items)
        return {number: marker for number, marker in read if marker}

    def _claim(self, stage: Stage, item: Item) -> bool:
        """Whether an item is this rank's to do: nobody alive has claimed it, or this rank did before it was started."""
        name = stage.name(item, "claim")
        if not self._free(parsed(self.store.get(name))):
            return False
        self.store.put(name, json.dumps({"owner": self.heart.owner, "lease": self.heart.lease}).encode())
        return bool(parsed(self.store.get(name)).get("owner", self.heart.owner) == self.heart.owner)

    def _free(self, claim: dict[str, Any]) -> bool:
        owner, lease = claim.get("owner"), claim.get("lease")
        if not isinstance(owner, str) or not isinstance(lease, int | float):  # there is none, or it is damaged
            return True
        return owner == self.heart.owner or not self.watch.alive(owner, lease)

    def leave(self, stage: Stage, item: Item, made: Made, seconds: float) -> Marker:
        """Write the records of an item, then the marker that vouches for them."""
        size, check = 0, ""
        if made.encoded:
            with self.store.writing(stage.name(item, "rac")) as f:
                size, check = write(f, made.encoded, {"job": self.job, "item": item.number}, self.store.where)
        about: dict[str, Any] = {
            "owner": self.heart.owner,
            "rows": made.rows,
            "dense": item.size,
            "seconds": round(seconds, 3),
        }
        marker = Marker(self.job, stage.key, item.number, size, check, **about)
        self.store.put(stage.name(item, "json"), marker.dump())
        return marker

    def records(self, plan: Plan, item: Item, marker: Marker) -> Records:
        """The records of an item; where they are damaged or gone, it is made again."""
        name = plan.stage.name(item, "rac")
        with contextlib.suppress(RacError):
            return Records(self.store.access(name), marker.size, marker.check)
        marker = self.again(plan, item)
        return Records(self.store.access(name), marker.size, marker.check)

    def again(self, plan: Plan, item: Item) -> Marker:
        """Make an item, whatever its marker says."""
        start, (function, arguments) = time.monotonic(), plan.work(item)
        with workers.named():
            made = plan.pool.submit(function, *arguments).result()
        return self.leave(plan.stage, item, made, time.monotonic() - start)


class _Running:
    """Items in work. Leave it by `with`: what was not begun is cancelled."""

    def __init__(self, plan: Plan, jobs: int) -> None:
        self._plan, self._jobs, self._room = plan, jobs, room()
        self._running: dict[Future[Made], tuple[Item, int, float]] = {}
        self._done = SimpleQueue[Future[Made]]()

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._running:
            job.cancel()

    def __bool__(self) -> bool:
        return bool(self._running)

    def fits(self, item: Item) -> bool:
        """Whether there is a worker, and memory, for one more."""
        held = sum(need for _, need, _ in self._running.values())
        free = len(self._running) < self._jobs and held + self._plan.need(item) <= self._room
        return free or not self._running

    def begin(self, item: Item) -> None:
        """Begin one."""
        function, arguments = self._plan.work(item)
        job = workers.submit(self._plan.pool, self._done, function, *arguments)
        self._running[job] = item, self._plan.need(item), time.monotonic()

    def one(self) -> tuple[Item, Made, float]:
        """The next that is made, and the seconds that it took."""
        job = self._done.get()
        item, _, start = self._running.pop(job)
        with workers.named():
            return item, job.result(), time.monotonic() - start
