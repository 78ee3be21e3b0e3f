"""How far the ranks of a pack are, from the files of their work folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rac.ranks.job import opened
from rac.ranks.lease import file_of, parsed
from rac.ranks.stage import Marker, named
from rac.ranks.store import Store, several


@dataclass(frozen=True, slots=True)
class RankView:
    """A rank that was started."""

    owner: str
    rank: int | None
    """None: it finishes the pack."""
    state: str
    """"alive", "ended", or "silent": for longer than its lease, by the clocks of its machine and of this one."""
    silence: float
    """Seconds since its last sign of life, by these clocks."""
    jobs: int


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage that some rank has come to; sizes are dense bytes."""

    key: str
    what: str
    items: int
    size: int
    done: int
    done_size: int
    claimed: int
    """Items that a rank is doing that is alive."""
    dead: int
    """Items that a rank was doing that has stopped: whoever asks for them next does them."""
    seconds: float
    """What the items took that are done."""
    eta: float | None
    """Seconds that the rest takes about; None where nothing is known, or nobody is alive."""

    @property
    def left(self) -> int:
        """Items that nobody has begun."""
        return self.items - self.done - self.claimed - self.dead


@dataclass(frozen=True, slots=True)
class View:
    """A work folder."""

    source: str
    asked: Mapping[str, Any]
    stages: tuple[StageView, ...]
    ranks: tuple[RankView, ...]


def look(store: Store) -> View:
    """A work folder as it is now; SourceError where it holds no job."""
    source, asked = opened(store)
    beats = [b for b in map(parsed, several(store, _files(store)).values()) if isinstance(b.get("owner"), str)]
    ranks = {b["owner"]: _rank(b) for b in beats}
    rows = {row[0]: row for b in beats for row in b.get("stages", [])}
    alive = sum(rank.jobs for rank in ranks.values() if rank.state == "alive")
    stages = tuple(_stage(store, row, ranks, alive) for row in rows.values())
    return View(source, asked.changed, stages, tuple(ranks.values()))


def _files(store: Store) -> list[str]:
    """Files of the ranks: those that are listed, and those whose number says that they may be there."""
    listed = [f"ranks/{name}" for name in store.names("ranks")]
    first = [parsed(store.get(name)) for name in (listed or [file_of("00000-")])[:1]]
    world = max([b["world"] for b in first if isinstance(b.get("world"), int)], default=1)
    return [*dict.fromkeys([*(file_of(f"{rank:05d}-") for rank in range(world)), *listed])]


def _rank(beat: Mapping[str, Any]) -> RankView:
    silence = max(0.0, time.time() - float(beat.get("at", 0)))
    state = "ended" if beat.get("ended") else "alive" if silence <= float(beat.get("lease", 0)) else "silent"
    return RankView(beat["owner"], beat.get("rank"), state, silence, int(beat.get("jobs", 1)))


def _stage(store: Store, row: list[Any], ranks: Mapping[str, RankView], workers: int) -> StageView:
    key, what, items, size = row
    data = several(store, (named(key, i, "json") for i in range(items)))
    done = [marker for marker in map(Marker.load, data.values()) if marker]
    there = {marker.item for marker in done}
    claims = several(store, (named(key, i, "claim") for i in range(items) if i not in there))
    owners = [str(claim["owner"]) for claim in map(parsed, claims.values()) if claim.get("owner")]
    claimed = sum(owner in ranks and ranks[owner].state == "alive" for owner in owners)
    made, seconds = sum(m.dense for m in done), sum(m.seconds for m in done)
    eta = (size - made) * seconds / made / workers if made and workers else None
    dead = len(owners) - claimed
    return StageView(key, what, items, size, len(done), made, claimed, dead, seconds, eta)
