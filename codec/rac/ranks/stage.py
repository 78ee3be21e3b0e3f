"""A stage of a pack: items with sizes, dealt to ranks, each done once its marker vouches for what it left."""

from __future__ import annotations

import contextlib
import heapq
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rac.container import zstd
from rac.encode import ties
from rac.ranks.lease import parsed

MOST = 64 << 20  # bytes of small tensors that are one item: a claim, a marker and a file cost little beside them
FEW = 512  # of so many equal parts of a stage an item is one at least


@dataclass(frozen=True, slots=True)
class Home:
    """Items that one rank does in every stage: what they share takes long to find, and is kept where it was found."""

    number: int
    cost: int
    """What all of the work on them takes, in dense bytes of other items, about."""


@dataclass(frozen=True, slots=True)
class Item:
    """Work that one rank does at once."""

    number: int
    groups: tuple[ties.Group, ...]
    size: int
    """Dense bytes, which stand for the time that it takes."""
    home: Home | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Items by number. Every rank makes the same ones from the same source."""

    key: str
    """Name of the folder of its files."""
    what: str
    """The work, for people."""
    items: tuple[Item, ...]
    read: Callable[[list[Any]], Any] = list
    """What reads a row of a marker: a KeyError, TypeError, ValueError, IndexError or AttributeError is no row."""

    def marker(self, item: Item, job: str, data: bytes | None) -> Marker | None:
        """The marker in some bytes, where it is one of this item of this job, and its rows are such."""
        found = Marker.load(data)
        if found is None or (found.job, found.key, found.item) != (job, self.key, item.number):
            return None
        with contextlib.suppress(KeyError, TypeError, ValueError, IndexError, AttributeError):
            for row in found.rows:
                self.read(row)
            names = [row[0] for row in found.rows]
            if [g.tensor.name for g in item.groups] in ([], names):
                return found
        return None

    @classmethod
    def of(cls, key: str, what: str, groups: Sequence[ties.Group], homes: Mapping[str, Home] = {}) -> Stage:
        """Tensors in their order; small ones that follow each other are one item. `homes` are by name."""
        return cls.parted(key, what, [(g,) for g in groups], homes)

    @classmethod
    def parted(
        cls, key: str, what: str, parts: Iterable[Sequence[ties.Group]], homes: Mapping[str, Home] = {}
    ) -> Stage:
        """Tensors some of which belong together; small parts that follow each other are one item."""
        every = [(tuple(part), sum(g.tensor.nbytes for g in part), homes.get(part[0].tensor.name)) for part in parts]
        least = min(MOST, sum(size for _, size, _ in every) // FEW)
        items, held, at = list[Item](), list[ties.Group](), 0
        for part, size, home in every:
            if held and (home is not None or items[-1].home is not None or at + size > least):
                held, at = [], 0
            items[len(items) - bool(held) :] = [Item(len(items) - bool(held), (*held, *part), at + size, home)]
            held, at = [*held, *part], at + size
        return cls(key, what, tuple(items))

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(item.size for item in self.items)

    def name(self, item: Item, ending: str) -> str:
        """Name of a file of an item."""
        return named(self.key, item.number, ending)

    def deal(self, world: int) -> list[list[Item]]:
        """The items of each rank: the largest first, each to the rank that has least so far; of one home together."""
        out: list[list[Item]] = [[] for _ in range(world)]
        loads = [(0, rank) for rank in range(world)]
        together: dict[tuple[int, int], list[Item]] = {}
        for item in self.items:
            together.setdefault((0, item.home.number) if item.home else (1, item.number), []).append(item)
        # homes first: whatever else is in a stage, they are dealt alike
        for _, items in sorted(together.items(), key=lambda one: (one[0][0], -_cost(one[1]), one[0][1])):
            load, rank = heapq.heappop(loads)
            out[rank] += items
            heapq.heappush(loads, (load + _cost(items), rank))
        return out

    def order(self, world: int, rank: int | None) -> list[Item]:
        """All items in the order in which a rank asks for them: its own, then those that others would come to last."""
        dealt = self.deal(world)
        mine = [] if rank is None else dealt[rank % world]
        others = [share for r, share in enumerate(dealt) if rank is None or r != rank % world]
        most = max(map(len, others), default=0)
        rest = (share[len(share) - 1 - i] for i in range(most) for share in others if i < len(share))
        return [*mine, *rest]


def _cost(items: Sequence[Item]) -> int:
    """What the work on items of one home, or on one item, takes."""
    return items[0].home.cost if items[0].home else items[0].size


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
        found = cls(**stated)
        sound = isinstance(found.rows, list) and isinstance(found.size, int) and isinstance(found.check, str)
        return found if sound else None


def _seal(stated: dict[str, Any]) -> str:
    return zstd.digest(json.dumps(stated, sort_keys=True).encode()).hex()
