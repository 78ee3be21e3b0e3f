"""One archive to a set of shards and back: records are copied as they are (format_spec/container.md, "Shards")."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rac.container import index, wire
from rac.container.access import InFile, guarded
from rac.container.feed import PIECE, RangeRing
from rac.container.forward import Walk
from rac.container.output import destination
from rac.container.reader import Archive
from rac.container.writer import Writer
from rac.container.zstd import xxh3
from rac.errors import ChecksumError, FormatError, OutputError
from rac.records import Entry, Record
from rac.registry import RECORD_OBJECT, RECORD_TENSOR

RING = 64 << 20  # bytes of a file that are read ahead
SUFFIX = re.compile(r"(-\d{5}-of-\d{5})?\.rac$")
MOST = 99999
Progress = Callable[[str, int], None]
Chosen = tuple[Archive, Entry]


class File(NamedTuple):
    """An archive to write."""

    path: str
    header: dict[str, Any]
    chosen: Sequence[Chosen]


@dataclass
class _Part:
    """What goes into one archive."""

    chosen: list[Chosen] = field(default_factory=list)
    size: int = 0
    objects: dict[str, Chosen] = field(default_factory=dict)

    def add(self, item: Chosen) -> None:
        """One record more."""
        self.chosen.append(item)
        self.size += _bytes(item[1])
        if item[1].type == RECORD_OBJECT:
            self.objects[item[1].name] = item


def shard(
    archives: Sequence[Archive], folder: str, size: int, *, force: bool = False, progress: Progress | None = None
) -> list[str]:
    """Archives (one, or a set) to files of at most `size` bytes in `folder`; returns their paths.

    A record that is larger has a file of its own. Attachments are in the first; objects are in each that needs them.
    """
    stem = os.path.join(folder, SUFFIX.sub("", os.path.basename(archives[0].access.name)))
    header = {k: v for k, v in archives[0].header.items() if k != "shard"}
    overhead = len(wire.header(header | {"shard": [MOST, MOST]})) + 64 * 16
    parts = [_Part()]
    for needed in _in_order(archives):
        new = [item for item in needed if not _same(parts[-1].objects.get(item[1].name), item)]
        clash = any(item[1].type == RECORD_OBJECT and item[1].name in parts[-1].objects for item in new)
        tensor = needed[-1][1].type == RECORD_TENSOR
        full = tensor and parts[-1].size + sum(_bytes(e) for _, e in new) + overhead > size
        if parts[-1].chosen and (clash or full):
            parts.append(_Part())
            new = needed
        for item in new:
            parts[-1].add(item)
    if len(parts) > MOST:
        raise OutputError(f"{len(parts)} shards are more than the {MOST} that their names can count", file=folder)
    made = not os.path.isdir(folder)
    with guarded(OutputError, folder):
        os.makedirs(folder, exist_ok=True)
    n = len(parts)
    files = [
        File(f"{stem}-{k:05d}-of-{n:05d}.rac", header | {"shard": [k, n]}, p.chosen) for k, p in enumerate(parts, 1)
    ]
    if n == 1:
        files = [File(f"{stem}.rac", header, parts[0].chosen)]
    try:
        write_all(files, force, progress)
    except BaseException:
        if made and not os.listdir(folder):
            os.rmdir(folder)
        raise
    return [file.path for file in files]


def merge(archives: Sequence[Archive], path: str, *, force: bool = False, progress: Progress | None = None) -> None:
    """A set of shards to one archive. Objects that are in several of them are there once."""
    part = _Part()
    for needed in _in_order(archives):
        for item in needed:
            there = part.objects.get(item[1].name) if item[1].type == RECORD_OBJECT else None
            if there is None:
                part.add(item)
            elif not _same(there, item):
                file = item[0].access.name
                raise OutputError(f"the object {item[1].name!r} differs between shards; pack again to merge", file=file)
    header = {k: v for k, v in archives[0].header.items() if k != "shard"}
    write_all([File(path, header, part.chosen)], force, progress)


def _bytes(e: Entry) -> int:
    """What a record adds to an archive: itself, and a row of the index, compressed or not."""
    return e.size + 300 + len(e.name.encode()) + sum(len(a.encode()) + 8 for a, _ in e.aliases)


def _same(a: Chosen | None, b: Chosen) -> bool:
    """True for objects whose heads are equal: they state the digest, and the checksum of every unit."""
    stated = operator.attrgetter("check", "head_size", "payload_size")
    return a is not None and stated(a[1]) == stated(b[1])


def _in_order(archives: Sequence[Archive]) -> Iterator[list[Chosen]]:
    """What belongs together: a tensor behind the objects that it uses; other records each alone, attachments first."""
    for a in archives:
        for e in a.index.entries:
            if e.type not in (RECORD_TENSOR, RECORD_OBJECT):
                yield [(a, e)]
    for a in archives:
        left = dict(a.objects)
        for e in a.index.entries:
            if e.type == RECORD_TENSOR:
                uses = a.record(e).head.get("uses", []) if a.objects else []
                if not isinstance(uses, list) or any(n not in a.objects for n in uses):
                    raise FormatError("uses an object that is not there", file=a.access.name, unit=repr(e.name))
                yield [*((a, a.objects[n]) for n in dict.fromkeys(uses)), (a, e)]
                for n in uses:
                    left.pop(n, None)
        for unused in left.values():
            yield [(a, unused)]


def write_all(files: Sequence[File], force: bool = False, progress: Progress | None = None) -> None:
    """All files, or none: they get their names, and replace others, when the last of them is whole."""
    for file in files:
        destination(file.path, force)
    writers: list[Writer] = []
    try:
        for file in files:
            writers.append(Writer(file.path, force))
            _write(writers[-1], file.header, file.chosen, progress)
        for writer in writers:
            writer.publish()
    finally:
        for writer in writers:
            writer.discard()


def _write(writer: Writer, header: dict[str, Any], chosen: Sequence[Chosen], progress: Progress | None) -> None:
    """Copy the records of one file, and seal it."""
    content: list[list[Any]] = []
    writer.start(header)
    runs: list[tuple[Archive, list[Entry]]] = []
    for archive, e in chosen:  # records of one archive that lie one behind the other are read in one go
        if not runs or runs[-1][0] is not archive or e.at < runs[-1][1][-1].at:
            runs.append((archive, []))
        runs[-1][1].append(e)
    for archive, entries in runs:
        for e, record in _copy(writer, archive, entries):
            if e.type == RECORD_TENSOR:
                content += [[name, e.dtype, list(e.shape), record.head.get("digest")] for name in e.names]
            if progress:
                progress(e.name, e.size)
    writer.seal(index.content_digest(content))


def check(archive: Archive) -> None:
    """ChecksumError, or another FormatError, unless the bytes of all records are those that their heads state."""
    for _ in _copy(_Nowhere(), archive, archive.index.entries):
        pass


class _Nowhere:
    """What records are copied to where they are only to be checked."""

    def begin(self, entry: Entry, head: bytes) -> None:
        """Nothing."""

    def write(self, *pieces: bytes | memoryview) -> None:
        """Nothing."""


def _copy(writer: Writer | _Nowhere, archive: Archive, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Record]]:
    """Copy records of one archive, in the order of the file; each as soon as it is written."""
    name = archive.access.name
    feed = RangeRing(archive.access, [(e.at, e.size) for e in entries], RING)
    walk = Walk(feed, name, archive.limits)
    try:
        for e in entries:
            walk.at = e.at
            with InFile(name, repr(e.name)):
                head = walk.read(e.size - e.payload_size - wire.pad(e.payload_size))
                record = archive.parse_record(e.at, head)
                index.match(e, record)
                index.check_type(record)
                writer.begin(e, head)
                for unit in wire.parse_units(record.head["units"], e.payload_size) if e.type in (1, 2, 3) else ():
                    view, held = walk.piece(unit.size + wire.pad(unit.size, wire.STREAM_ALIGN))
                    if xxh3(view[: unit.size]) != unit.check:
                        raise ChecksumError("checksum does not match", offset=record.payload + unit.offset)
                    if any(view[unit.size :]):
                        raise FormatError("padding is not zero", offset=record.payload + unit.offset + unit.size)
                    writer.write(view)
                    if held:
                        held.give()
                while walk.at < record.payload + record.payload_size:  # of a record that only others understand
                    writer.write(walk.read(min(PIECE, record.payload + record.payload_size - walk.at)))
                end = walk.at
                walk.padding()
                writer.write(bytes(walk.at - end))
            yield e, record
    finally:
        feed.close()
