"""Records read from their places in a file, by ranges: what a ticket stands for, parsed.

A module holds the ticket of a record in place of the record (runtime/held.py): a few bytes that say where it is, a
tensor as any other to all that moves, copies and saves tensors. Two kinds of ranges are read: a whole record, and of
one with many rows, or with all experts of a layer, the rows of tiles that are wanted, behind its front, which is read
once. What lies side by side in the file is one request. Everything is checked as in any file, each time it is read.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rac.container import wire
from rac.container.access import Access, ChangedError
from rac.container.reader import Archive
from rac.decode import random
from rac.decode.archive import RacFile
from rac.errors import FormatError, MismatchError, RacError
from rac.records import Entry
from rac.runtime import made, record
from rac.system import pages

Bytes = NDArray[np.uint8]
_TICKET = struct.Struct("<4sI8sQ")
"""RTKT, number of the archive, the first half of the digest of its index, offset of the record."""
_MAGIC = b"RTKT"
TICKET = _TICKET.size
FRONT = 1 << 16
"""Bytes behind a record's head that are read with it: its front is mostly among them."""
GAP = 1 << 12
"""Bytes between two records that are read along."""
PAGED = 1 << 15
"""Bytes from which on what is read has pages of its own."""
_PARSED = 6 << 10
"""Bytes that the objects of a parsed head take, about; its front is kept once more."""


class Key(NamedTuple):
    """Bytes that are read together: rows of tiles first..last - 1 of a record, or by default all of a weight."""

    tickets: bytes
    making: made.Making | None = None
    first: int = -1
    last: int = -1


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was parsed of a weight, and its bytes."""

    stored: made.Weight
    data: Any
    """(n,) uint8, or the `Window` of them that was read."""
    nbytes: int
    """Memory that both take, about."""


class Window:
    """The bytes of a tensor as far as they were read: a slice of them is that of the whole."""

    __slots__ = ("_parts", "_size")

    def __init__(self, size: int, parts: Sequence[tuple[int, Bytes]]) -> None:
        """`parts` with their places; the zeros behind a record are there too."""
        self._size, self._parts = size, [*parts, (size - record.TAIL, np.zeros(record.TAIL, np.uint8))]

    def __len__(self) -> int:
        return self._size

    def also(self, start: int, part: Bytes) -> Window:
        """These bytes, and some more."""
        return Window(self._size, [*self._parts[:-1], (start, part)])

    def __getitem__(self, wanted: slice) -> Bytes:
        """FormatError where nobody has read them."""
        a, b, _ = wanted.indices(self._size)
        for start, part in self._parts:
            if start <= a and b <= start + len(part):
                return part[a - start : b - start]
        raise FormatError("the record is longer than its index row says", offset=a)


@dataclass(slots=True)
class Counts:
    """What was done, and how often."""

    requests: int = 0
    read: int = 0
    """Bytes."""
    hits: int = 0
    """Weights that were in memory."""
    guessed: int = 0
    """Weights that were asked for ahead, right or wrong."""
    ahead: int = 0
    """Weights that had been asked for before they were needed."""
    late: int = 0
    """Weights that had been asked for and were not there yet."""
    misses: int = 0
    """Weights that nobody had asked for."""
    waited: float = 0.0
    """Seconds that who needed a weight has read or waited."""
    most: int = 0
    """Most bytes that were kept, or on their way, at once."""


class Reader:
    """Reads what tickets of one file stand for; any number of threads may ask."""

    def __init__(self, file: RacFile) -> None:
        self.file, self.counts = file, Counts()
        self._entries = [{e.at: e for e in archive.index.entries} for archive in file.archives]
        self._needs: dict[tuple[int, int], tuple[str, ...]] = {}
        self.begin()

    def begin(self) -> None:
        """Without what was read."""
        self._lock = threading.Lock()
        self._fronts: dict[bytes, Loaded] = {}

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.file.archives[0].access.name

    @property
    def most(self) -> int:
        """Bytes that all records of the file take in memory, at most."""
        entries = [e for archive in self.file.archives for e in archive.index.entries]
        return sum(e.size for e in entries) + len(entries) * (2 * _PARSED + mmap.PAGESIZE)

    @property
    def fronts(self) -> int:
        """Bytes of fronts that were read, and are kept."""
        with self._lock:
            return sum(f.nbytes for f in self._fronts.values())

    def size(self, archive: Archive, entry: Entry) -> int:
        """Bytes of a ticket."""
        return TICKET

    def ticket(self, archive: Archive, entry: Entry) -> Bytes:
        """The ticket of a record."""
        i = self.file.archives.index(archive)
        return np.frombuffer(_TICKET.pack(_MAGIC, i, archive.index.digest[:8], entry.at), np.uint8).copy()

    def _find(self, ticket: bytes) -> tuple[Archive, Entry, int]:
        """What a ticket stands for, and the number of its archive; MismatchError where it is another file's."""
        magic, i, digest, at = _TICKET.unpack(ticket) if len(ticket) == TICKET else (b"", 0, b"", 0)
        if magic == _MAGIC and i < len(self._entries) and at in self._entries[i]:
            archive = self.file.archives[i]
            if archive.index.digest[:8] == digest:
                return archive, self._entries[i][at], i
        raise MismatchError("a layer holds no place of this file: the state of another model", file=self.name)

    def _parts(self, ticket: bytes) -> tuple[Archive, list[Entry]]:
        """The records of the objects that a tensor needs, and its own."""
        archive, entry, i = self._find(ticket)
        if not archive.objects:
            return archive, [entry]
        key = i, entry.at
        if key not in self._needs:
            self._needs[key] = random.parse(archive, archive.record(entry)).needs
        return archive, [*(archive.objects[name] for name in self._needs[key]), entry]

    def stored_size(self, tickets: bytes) -> int:
        """Bytes of the records in the file, with those of their objects."""
        return sum(e.size for t in split(tickets) for e in self._parts(t)[1])

    def size_of(self, key: Key) -> int:
        """Bytes of the file that a key stands for."""
        if key.first < 0:
            return self.stored_size(key.tickets)
        a, b = _places(self.front(key.tickets).stored, key)
        return b - a

    @contextmanager
    def blamed(self, tickets: bytes) -> Iterator[None]:
        """Context of what reads and decodes: its errors name file and tensor, and say so where the file has changed."""
        try:
            yield
        except RacError as e:
            archive, entry, _ = self._find(tickets[:TICKET])
            if e.file is None and e.offset is not None:  # within the bytes of the tensor
                e.offset += entry.at - sum(o.size for o in self._parts(tickets[:TICKET])[1][:-1])
            e.file, e.unit = e.file or archive.access.name, e.unit or repr(entry.name)
            if not isinstance(e, ChangedError) and (how := archive.access.changed()):
                what = f"{how} while a model runs from it; load the model again ({e.message})"
                raise ChangedError(what, file=e.file, unit=e.unit, offset=e.offset) from e
            raise

    def front(self, ticket: bytes) -> Loaded:
        """What stands in front of the tiles of a record, parsed; read once."""
        with self._lock:
            if (found := self._fronts.get(ticket)) is not None:
                return found
        found = self._front(ticket)
        with self._lock:
            return self._fronts.setdefault(ticket, found)

    def load(self, keys: Sequence[Key]) -> dict[Key, Loaded]:
        """Read the bytes of these keys, in one request where they lie side by side, and parse them."""
        pieces: list[tuple[Access, int, Bytes]] = []
        rooms = [self._in_memory(key) or self._laid_out(key, pieces) for key in keys]
        self._read(pieces)
        out = {}
        for key, room in zip(keys, rooms, strict=True):
            with self.blamed(key.tickets):
                out[key] = self._parsed(key, room)
        return out

    def _in_memory(self, key: Key) -> Window | None:
        """The bytes of a record where the file is in memory, or None."""
        if key.first >= 0 or len(key.tickets) > TICKET:
            return None
        archive, entries = self._parts(key.tickets)
        view = archive.access.view(entries[0].at, entries[0].size) if len(entries) == 1 else None
        return None if view is None else Window(len(view) + record.TAIL, [(0, np.frombuffer(view, np.uint8))])

    def _laid_out(self, key: Key, pieces: list[tuple[Access, int, Bytes]]) -> Bytes:
        """Room for the bytes of a key; `pieces` get what is to be read to where in it."""
        if key.first >= 0:
            archive, entry, _ = self._find(key.tickets)
            s = self.front(key.tickets).stored
            a, b = _places(s, key)
            room = _zeros(b - a + record.TAIL)
            pieces.append((archive.access, entry.at + a - _start(s), room[: b - a]))
            return room
        parts = [self._parts(ticket) for ticket in split(key.tickets)]
        room, at = _zeros(sum(e.size for _, entries in parts for e in entries) + len(parts) * record.TAIL), 0
        for archive, entries in parts:
            for e in entries:
                pieces.append((archive.access, e.at, room[at : at + e.size]))
                at += e.size
            at += record.TAIL
        return room

    def _read(self, pieces: list[tuple[Access, int, Bytes]]) -> None:
        """Fill all pieces; those side by side in a file by one request."""
        run: list[tuple[Access, int, Bytes]] = []
        for piece in sorted(pieces, key=lambda p: (id(p[0]), p[1])):
            if run:
                access, at, room = run[-1]
                if access is not piece[0] or not 0 <= piece[1] - (at + len(room)) <= GAP:
                    self._request(run)
                    run = []
            run.append(piece)
        if run:
            self._request(run)

    def _request(self, run: list[tuple[Access, int, Bytes]]) -> None:
        access, at, _ = run[0]
        parts, end = [], at
        for _, start, room in run:
            if start > end:  # between two records
                parts.append(memoryview(bytearray(start - end)))
            parts.append(room.data)
            end = start + len(room)
        access.read_parts(at, parts)
        with self._lock:
            self.counts.requests += 1
            self.counts.read += end - at

    def _parsed(self, key: Key, room: Bytes | Window) -> Loaded:
        if isinstance(room, Window):
            stored = record.parse(room)  # type: ignore[arg-type]
            self._match(key.tickets, stored)
            return Loaded(stored, room, _PARSED + _front_size(stored))
        if key.first >= 0:
            front = self.front(key.tickets)
            a, _ = _places(front.stored, key)
            data = front.data.also(a, room)
            return Loaded(front.stored, data, _taken(room))
        weight = made.parse(room, key.making)
        every = weight.stored if isinstance(weight, made.Made) else [weight]
        for ticket, s in zip(split(key.tickets), every, strict=True):
            self._match(ticket, s)
        extra = sum(_PARSED + _front_size(s) for s in every)
        extra += weight.kept if isinstance(weight, made.Made) else 0
        return Loaded(weight, room, _taken(room) + extra)

    def _match(self, ticket: bytes, s: record.Stored) -> None:
        """FormatError unless the records are those that the index names."""
        _, entries = self._parts(ticket)
        found = [*(o.record for o in s.objects.values()), s.tensor.record]
        for e, r in zip(entries, found, strict=True):
            if (e.check, e.head_size, e.payload_size) != (r.check, r.head_size, r.payload_size):
                raise FormatError("the record is not the one that the index names", unit=repr(e.name), offset=r.at)

    def _front(self, ticket: bytes) -> Loaded:
        archive, entries = self._parts(ticket)
        entry, base = entries[-1], sum(e.size for e in entries[:-1])
        size = base + entry.size + record.TAIL
        head = entry.size - wire.padded(entry.payload_size)

        def read(own: int) -> Bytes:
            room, pieces, at = np.empty(base + own, np.uint8), [], 0
            for e in entries:
                pieces.append((archive.access, e.at, room[at : at + (own if e is entry else e.size)]))
                at += e.size
            self._read(pieces)
            return room

        with self.blamed(ticket):
            room = read(min(entry.size, head + FRONT))
            stored = record.parse(Window(size, [(0, room)]))  # type: ignore[arg-type]
            self._match(ticket, stored)
            t = stored.tensor
            end = t.record.payload + (t.units[t.first].offset if t.tiles else 0)
            if end > len(room):
                room = read(end - base)
            room = room[:end].copy()
        return Loaded(stored, Window(size, [(0, room)]), len(room) + _PARSED + _front_size(stored))


def _zeros(size: int) -> Bytes:
    """Memory for what is read: large pieces are the system's again as soon as nobody has them."""
    return np.frombuffer(pages(size), np.uint8) if size >= PAGED else np.zeros(size, np.uint8)


def _taken(room: Bytes) -> int:
    """Memory that it takes, in whole pages where it is large."""
    return -(-len(room) // mmap.PAGESIZE) * mmap.PAGESIZE if len(room) >= PAGED else len(room)


def split(tickets: bytes) -> list[bytes]:
    """The tickets one by one."""
    return [tickets[i : i + TICKET] for i in range(0, len(tickets), TICKET)]


def _start(s: made.Weight) -> int:
    """Where the record of the tensor itself begins in its bytes."""
    return s.tensor.record.at  # type: ignore[union-attr]


def _front_size(s: record.Stored) -> int:
    """Bytes of the units in front of the tiles."""
    return sum(s.tensor.units.sizes[: s.tensor.first])


def _places(s: made.Weight, key: Key) -> tuple[int, int]:
    """Where in the bytes of a record its rows of tiles begin and end."""
    t = s.tensor
    units = t.units[t.first + key.first * t.grid.across : t.first + key.last * t.grid.across]  # type: ignore[union-attr]
    last = units[-1]
    return t.record.payload + units[0].offset, t.record.payload + last.offset + last.size  # type: ignore[union-attr]
