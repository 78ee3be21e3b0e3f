"""Chosen records of a random-access archive to dense tensors, and single units for slices."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from rac.container import wire
from rac.container.access import InFile
from rac.container.feed import Feed, Near, RangeRing
from rac.container.forward import Walk
from rac.container.index import check_type, match
from rac.container.reader import Archive
from rac.decode.bundles import Bundle, cut
from rac.decode.engine import Cpu, Engine, Item, later_units, take_units
from rac.errors import FormatError
from rac.linalg.transform import Transform
from rac.native.prototypes import F32, Array
from rac.records import Entry, Record, Stated
from rac.tensor import Tensor
from rac.tensor import parse as parse_tensor

GAP = 1 << 16  # bytes between two records that are read along: less than the cost of one more request


def spans(pieces: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """(offset, size) of pieces in ascending order, neighbours with up to `gap` bytes between them as one."""
    out: list[tuple[int, int]] = []
    for at, size in pieces:
        if out and 0 <= at - sum(out[-1]) <= gap:
            out[-1] = (out[-1][0], at + size - out[-1][0])
        else:
            out.append((at, size))
    return out


def read_units(archive: Archive, t: Tensor, ranges: Sequence[tuple[int, int]]) -> list[list[Array]]:
    """Bytes of the units first..last - 1 of each range; neighbours are read at once, the others side by side."""
    access = archive.access
    chosen = [t.units[first:last] for first, last in ranges]
    places = [(t.record.payload + u[0].offset, u[-1].offset + u[-1].size - u[0].offset) for u in chosen]
    buffers: dict[int, Array] = {}
    for at, size in spans(places, 64):
        if at + size > access.size:
            raise FormatError("unit lies outside the file", offset=at)
        buffers[at] = np.empty(size, np.uint8)
    if len(buffers) > 1 and access.parallel > 1:
        with ThreadPoolExecutor(min(access.parallel, len(buffers)), "rac-read") as pool:
            list(pool.map(lambda at: access.read_into(at, buffers[at].data), buffers))
    else:
        for at, buffer in buffers.items():
            access.read_into(at, buffer.data)
    out, starts = [], sorted(buffers)
    for (at, _), units in zip(places, chosen, strict=True):
        start = starts[bisect.bisect(starts, at) - 1]
        base = t.record.payload - start
        out.append([buffers[start][base + u.offset : base + u.offset + u.size] for u in units])
    return out


def parse(archive: Archive, record: Record) -> Tensor:
    """`tensor.parse`, the objects being those of the index."""

    def shape_of(name: str) -> tuple[int, ...] | None:
        e = archive.objects.get(name)
        return e.shape if e and e.at < record.at else None

    return parse_tensor(record, archive.limits, shape_of)


def objects(archive: Archive, t: Tensor) -> list[F32]:
    """The matrices that a tensor uses, decoded once for an archive and kept (limits.objects bounds them all)."""
    return [_object(archive, name) for name in t.uses]


def _object(archive: Archive, name: str) -> F32:
    if name not in archive.kept:
        for _ in load(archive, [archive.objects[name]]):
            pass
    found: F32 = archive.kept[name]
    return found


def transform(archive: Archive, t: Tensor) -> Transform | None:
    """What the layer of a tensor does to its input, ready to be applied; None: nothing."""
    if t.online is None:
        return None
    return Transform(t.online, t.shape[1], _object(archive, t.online.object) if t.online.object else None)


def items(archive: Archive, entries: Sequence[Entry], feed: Feed) -> Iterator[Item]:
    """What the records of `entries` hold, in their order; `feed` has the bytes of `ranges`."""
    walk = Walk(feed, archive.access.name, archive.limits)
    for e in entries:
        if walk.at <= e.at <= walk.at + GAP and walk.at:
            walk.pass_by(e.at - walk.at)
        walk.go(e.at)
        with InFile(archive.access.name, repr(e.name)):
            record = walk.head(e.size - wire.padded(e.payload_size) if e.head_size <= archive.limits.head else 0)
            check_type(record)
            match(e, record)
            t = parse(archive, record)

        def keep(words: Array | None, name: str = t.name) -> None:
            if words is not None:
                archive.kept[name] = words.view(np.float32)

        later = partial(later_units, walk, t, archive.access) if isinstance(feed, Near) else None
        yield Item(
            archive.access.name, t, partial(take_units, walk, t), partial(objects, archive, t), keep, later=later
        )
        with InFile(archive.access.name, repr(e.name)):
            walk.skip(record)


def ranges(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """What is read for `entries`, in their order."""
    return spans([(e.at, e.size) for e in entries], GAP)


def whole(
    archive: Archive, entries: Sequence[Entry], engine: Engine, done: Callable[[Stated], None] | None = None
) -> Iterator[tuple[Stated, Any]]:
    """As `load`, for who needs no more of a tensor than the index states: small ones are decoded in bundles."""
    most = engine.bundle if isinstance(engine, Cpu) and getattr(archive.access, "near", False) else 0
    if not most:
        yield from load(archive, entries, engine, done)
        return
    assert isinstance(engine, Cpu)  # noqa: S101
    feed = Near(archive.access)

    def mixed() -> Iterator[Item | Bundle]:
        for part in cut(archive.access, entries, archive.limits, most):
            if isinstance(part, Bundle):
                yield part
            else:
                yield from items(archive, part, feed)

    for loaded in engine.bundled(mixed(), lambda some: items(archive, some, Near(archive.access))):
        if done:
            done(loaded[0])
        yield loaded
        del loaded


def load(
    archive: Archive, entries: Sequence[Entry], engine: Engine | int = 1, done: Callable[[Tensor], None] | None = None
) -> Iterator[tuple[Tensor, Any]]:
    """What `engine` (or a CPU engine of so many threads) makes of each entry, in order; all their bytes are checked."""
    if isinstance(engine, int):
        engine = Cpu(engine)
    if getattr(archive.access, "near", False) and isinstance(engine, Cpu):
        feed: Feed = Near(archive.access)
    else:
        feed = RangeRing(archive.access, ranges(entries), engine.ring // 2, trace=engine.trace)
    try:
        for loaded in engine.run(items(archive, entries, feed)):
            if done:
                done(loaded[0])
            yield loaded
            del loaded
    finally:
        feed.close()
