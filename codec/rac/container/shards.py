"""One archive to a set of shards and back: records are copied as they are (format_spec/container.md, "Shards")."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rac.container import index, wire
from rac.container.access import InFile
from rac.container.feed import PIECE, RangeRing
from rac.container.forward import Walk
from rac.container.output import destination
from rac.container.reader import Archive
from rac.container.writer import Writer
from rac.container.zstd import xxh3
from rac.errors import ChecksumError, FormatError, OutputError
from rac.records import Entry, Record
from rac.registry import RECORD_OBJECT, RECORD_TENSOR

RING = 64 << 20
"""Bytes of a file that are read ahead."""
SUFFIX = re.compile(r"(-\d{5}-of-\d{5})?\.rac$")
MOST = 99999
Progress = Callable[[str, int], None]
Chosen = tuple[Archive, Entry]


@dataclass
class _Part:
    """What goes into one archive."""

    chosen: list[Chosen] = field(default_factory=list)
    size: int = 0
    objects: dict[str, Chosen] = field(default_factory=dict)

    def add(self, item: Chosen, size: int) -> None:
        """One record more."""
        self.chosen.append(item)
        self.size += size
        if item[1].type == RECORD_OBJECT:
            self.objects[item[1].name] = item


def shard(
    archives: Sequence[Archive], folder: str, size: int, *, force: bool = False, progress: Progress | None = None
) -> list[str]:
    """Archives (one, or a set) to files of at most `size` bytes in `folder`; returns their paths.

    A record that is larger has a file of its own. Attachments are in the first; objects are in each that needs them.
    """
    stem = os.path.join(folder, SUFFIX.sub("", os.path.basename(archives[0].access.name)))
    header = _header(archives)
    overhead = len(wire.header(header | {"shard": [MOST, MOST]})) + 64 * 16
    parts = [_Part()]
    for needed in _in_order(archives):
        new = [item for item in needed if not _same(parts[-1].objects.get(item[1].name), item)]
        clash = any(item[1].type == RECORD_OBJECT and item[1].name in parts[-1].objects for item in new)
        sizes = [_bytes(e) for _, e in new]
        tensor = needed[-1][1].type == RECORD_TENSOR
        full = tensor and parts[-1].size + sum(sizes) + overhead > size
        if parts[-1].chosen and (clash or full):
            parts.append(_Part())
            new, sizes = needed, [_bytes(e) for _, e in needed]
        for item, n in zip(new, sizes, strict=True):
            parts[-1].add(item, n)
    if len(parts) > MOST:
        raise OutputError(f"{len(parts)} shards are more than the {MOST} that their names can count", file=folder)
    made = not os.path.isdir(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise OutputError(e.strerror or str(e), file=folder) from e
    paths = [f"{stem}-{k:05d}-of-{len(parts):05d}.rac" for k in range(1, len(parts) + 1)]
    if len(parts) == 1:
        paths = [f"{stem}.rac"]
    headers = [header | ({"shard": [k, len(parts)]} if len(parts) > 1 else {}) for k in range(1, len(parts) + 1)]
    try:
        _write_all(paths, headers, [p.chosen for p in parts], force, progress)
    except BaseException:
        if made and not os.listdir(folder):
            os.rmdir(folder)
        raise
    return paths


def merge(archives: Sequence[Archive], path: str, *, force: bool = False, progress: Progress | None = None) -> None:
    """A set of shards to one archive. Objects that are in several of them are there once."""
    part = _Part()
    for needed in _in_order(archives):
        for item in needed:
            there = part.objects.get(item[1].name) if item[1].type == RECORD_OBJECT else None
            if there is None:
                part.add(item, 0)
            elif not _same(there, item):
                file = item[0].access.name
                raise OutputError(f"the object {item[1].name!r} differs between shards; pack again to merge", file=file)
    _write_all([path], [_header(archives)], [part.chosen], force, progress)


def copy(
    chosen: Sequence[Chosen],
    path: str,
    header: dict[str, Any],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """These records, in this order, as an archive of their own; each unit is checked on the way."""
    _write_all([path], [header], [list(chosen)], force, progress)


def _header(archives: Sequence[Archive]) -> dict[str, Any]:
    """The header of the first archive, without what makes it a shard."""
    return {k: v for k, v in archives[0].header.items() if k != "shard"}


def _bytes(e: Entry) -> int:
    """What a record adds to an archive: itself, and a row of the index, compressed or not."""
    return e.size + 300 + len(e.name.encode()) + sum(len(a.encode()) + 8 for a, _ in e.aliases)


def _same(a: Chosen | None, b: Chosen) -> bool:
    """True for objects whose heads are equal: they state the digest, and the checksum of every unit."""
    return a is not None and (a[1].check, a[1].head_size, a[1].payload_size) == (
        b[1].check,
        b[1].head_size,
        b[1].payload_size,
    )


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


def _write_all(
    paths: Sequence[str],
    headers: Sequence[dict[str, Any]],
    parts: Sequence[Sequence[Chosen]],
    force: bool,
    progress: Progress | None,
) -> None:
    """All files, or none: they get their names, and replace others, when the last of them is whole."""
    for path in paths:
        destination(path, force)
    writers: list[Writer] = []
    try:
        for path, header, chosen in zip(paths, headers, parts, strict=True):
            writers.append(Writer(path, force))
            _write(writers[-1], header, chosen, progress)
        for writer in writers:
            writer.publish()
    finally:
        for writer in writers:
            writer.discard()


def _write(writer: Writer, header: dict[str, Any], chosen: Sequence[Chosen], progress: Progress | None) -> None:
    """Copy the records of one file, and seal it."""
    content: list[list[Any]] = []
    writer.start(header)
    start = 0
    while start < len(chosen):  # records of one archive that lie side by side are read in one go
        end = start + 1
        while end < len(chosen) and chosen[end][0] is chosen[start][0] and chosen[end][1].at >= chosen[end - 1][1].at:
            end += 1
        archive, entries = chosen[start][0], [e for _, e in chosen[start:end]]
        for e, record in _copy(writer, archive, entries):
            if e.type == RECORD_TENSOR:
                for name in (e.name, *(a for a, _ in e.aliases)):
                    content.append([name, e.dtype, list(e.shape), record.head.get("digest")])
            if progress:
                progress(e.name, e.size)
        start = end
    writer.seal(index.content_digest(content))


def _copy(writer: Writer, archive: Archive, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Record]]:
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
                    writer.more(view)
                    if held:
                        held.give()
                while walk.at < record.payload + record.payload_size:  # of a record that only others understand
                    writer.more(walk.read(min(PIECE, record.payload + record.payload_size - walk.at)))
                end = walk.at
                walk.padding()
                writer.more(bytes(walk.at - end))
            yield e, record
    finally:
        feed.close()
