"""A stage of a pack: items with sizes, dealt to ranks, each done once its marker vouches for what it left."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rac.container import zstd
from rac.encode import ties
from rac.ranks.lease import parsed

MOST = 64 << 20  # bytes of small tensors that are one item: a claim, a marker and a file cost little beside them
FEW = 512  # of so many equal parts of a stage an item is one at least


@dataclass(frozen=True, slots=True)
class Item:
    """Work that one rank does at once."""

    number: int
    groups: tuple[ties.Group, ...]
    size: int
    """Dense bytes, which stand for the time that it takes."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Items by number. Every rank makes the same ones from the same source."""

    key: str
    """Name of the folder of its files."""
    what: str
    """The work, for people."""
    items: tuple[Item, ...]

    @classmethod
    def of(cls, key: str, what: str, groups: Sequence[ties.Group]) -> Stage:
        """Tensors in their order; small ones that follow each other are one item."""
        least = min(MOST, sum(g.tensor.nbytes for g in groups) // FEW)
        items, held, size = list[Item](), list[ties.Group](), 0
        for g in groups:
            if held and size + g.tensor.nbytes > least:
                items.append(Item(len(items), tuple(held), size))
                held, size = [], 0
            held.append(g)
            size += g.tensor.nbytes
        if held:
            items.append(Item(len(items), tuple(held), size))
        return cls(key, what, tuple(items))

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(item.size for item in self.items)

    def name(self, item: Item, ending: str) -> str:
        """Name of a file of an item."""
        return named(self.key, item.number, ending)

    def deal(self, world: int) -> list[list[Item]]:
        """The items of each rank: the largest first, each to the rank that has least so far."""
        out: list[list[Item]] = [[] for _ in range(world)]
        loads = [(0, rank) for rank in range(world)]
        for item in sorted(self.items, key=lambda i: (-i.size, i.number)):
            load, rank = heapq.heappop(loads)
            out[rank].append(item)
            heapq.heappush(loads, (load + item.size, rank))
        return out

    def order(self, world: int, rank: int | None) -> list[Item]:
        """All items in the order in which a rank asks for them: its own, then those that others would come to last."""
        dealt = self.deal(world)
        mine = [] if rank is None else dealt[rank % world]
        others = [share for r, share in enumerate(dealt) if rank is None or r != rank % world]
        most = max(map(len, others), default=0)
        rest = (share[len(share) - 1 - i] for i in range(most) for share in others if i < len(share))
        return [*mine, *rest]


def named(key: str, number: int, ending: str) -> str:
    """Name of a file of an item of a stage."""
    return f"{key}/{number:05d}.{ending}"


@dataclass(frozen=True, slots=True)
class Marker:
    """What says that an item is done, and vouches for its records."""

    job: str
    key: str
    item: int
    size: int
    """Bytes of the file of records."""
    check: str
    """Digest, in hexadecimal, of what that file ends with: it has the checksums of all in front of it."""
    dense: int
    """Bytes of the item."""
    seconds: float
    owner: str
    rows: list[list[Any]]
    """What each tensor came to, in the order of the item."""

    def dump(self) -> bytes:
        """JSON, with a digest of itself."""
        stated = asdict(self)
        return json.dumps({**stated, "seal": _seal(stated)}).encode()

    @classmethod
    def load(cls, data: bytes | None) -> Marker | None:
        """The marker; None where there is none, or it is not what was written: the item is done again."""
        stated = parsed(data)
        seal = stated.pop("seal", None)
        if not stated or seal != _seal(stated) or stated.keys() != set(cls.__slots__):
            return None
        return cls(**stated)


def _seal(stated: dict[str, Any]) -> str:
    return zstd.digest(json.dumps(stated, sort_keys=True).encode()).hex()
