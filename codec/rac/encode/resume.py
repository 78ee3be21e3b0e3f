"""Going on with the part that an interrupted pack left: what of it is whole, and still what the source says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rac.container import index, wire
from rac.container.forward import Forward
from rac.decode.attachments import attachment_bytes, attachment_units
from rac.decode.stream import Objects
from rac.encode import ties
from rac.encode.sources import Attachment, Extent
from rac.errors import RacError
from rac.provenance import Provenance
from rac.records import Entry, Record
from rac.registry import RECORD_ATTACHMENT, RECORD_OBJECT, RECORD_TENSOR
from rac.tensor import Tensor, parts


@dataclass(frozen=True, slots=True)
class Contents:
    """What one archive is to hold."""

    path: str
    header: dict[str, Any]
    files: Sequence[Attachment]
    groups: Sequence[ties.Group]


@dataclass(slots=True)
class Found:
    """The whole records at the start of a part."""

    at: int = 0
    entries: list[Entry] = field(default_factory=list)
    files: int = 0
    digests: list[bytes] = field(default_factory=list)  # of what a decoder restores of the tensors
    objects: set[str] = field(default_factory=set)  # their names; the last may be of a tensor that is still to come


def scan(part: str, contents: Contents) -> Found | None:
    """Records of `part` that are whole and equal to the first of the source; None where nothing can be kept.

    Contents are compared by digest, which costs one reading of the finished tensors and no encoding. Whole objects are
    kept: they follow from the tensors and the header, or have names that follow from their content.
    """
    if not os.path.exists(part) or os.path.getsize(part) == 0:
        return None
    with open(part, "rb") as f:
        try:
            forward = Forward(f, part)
        except RacError:
            return None
        if wire.header(forward.header) != wire.header(contents.header):
            return None
        found, objects = Found(forward.at), Objects(forward.limits)
        with contextlib.suppress(RacError):  # the rest is cut off or damaged, and will be written again
            for record in forward.records():
                digest = b""
                if found.files < len(contents.files):
                    entry = _file(forward, record, contents.files[found.files])
                elif record.type == RECORD_OBJECT:
                    t = objects.parse(record)
                    fields = {"dtype": t.dtype, "shape": t.shape, "parts": _parts(forward, t)}
                    entry = _entry(record, method=index.method_of(record), **fields)
                    objects.keep(t, None)
                elif len(found.digests) < len(contents.groups):
                    entry, digest = _tensor(forward, record, contents.groups[len(found.digests)], objects)
                else:
                    break
                if entry is None:
                    break
                forward.skip(record)
                found.entries.append(entry)
                found.at = forward.at
                if found.files < len(contents.files):
                    found.files += 1
                elif entry.type == RECORD_OBJECT:
                    found.objects.add(entry.name)
                else:
                    found.digests.append(digest)
    return found


def provenance(part: str) -> Provenance:
    """What the header of a part states of its making; nothing where there is no readable part."""
    try:
        with open(part, "rb") as f:
            return Provenance.of(Forward(f, part).header, part)
    except (OSError, RacError):
        return Provenance()


def _entry(record: Record, **fields: Any) -> Entry:
    sizes: Any = {"head_size": record.head_size, "payload_size": record.payload_size}
    return Entry(record.type, record.head["name"], record.at, check=record.check, **sizes, **fields)


def _file(forward: Forward, record: Record, file: Attachment) -> Entry | None:
    if record.type != RECORD_ATTACHMENT or record.head.get("name") != file.name:
        return None
    unit = attachment_units(record, forward.limits)[0]
    data = attachment_bytes(record, forward.unit(unit, record, forward.limits.attachment, file.name))
    return _entry(record, method=record.head["stages"][0]["id"]) if data == file.read() else None


def _parts(forward: Forward, t: Tensor) -> tuple[int, ...]:
    """Payload bytes by kind of the record that the stream stands at, whose units are read and checked."""
    heads = [forward.unit(unit, t.record, t.most(i), t.name)[:4096] for i, unit in enumerate(t.units)]
    sizes = [u.size for u in t.units]
    return parts(t.grid, t.chain, sizes, lambda i, size: heads[i][:size])


def _tensor(forward: Forward, record: Record, group: ties.Group, objects: Objects) -> tuple[Entry | None, bytes]:
    t = group.tensor
    if record.type != RECORD_TENSOR:
        return None, b""
    found = objects.parse(record)
    stated = (found.name, found.dtype, found.shape, found.aliases, found.extra, found.online)
    if stated != (t.name, t.dtype, t.shape, group.aliases, group.extra, t.online):
        return None, b""
    parts = _parts(forward, found)
    pinned = isinstance(t.data, Extent) and t.data.pinned  # the header has the SHA-256 of its file
    if not pinned and ties.digest(t) != (record.head.get("x-source") if found.quantised else found.digest):
        return None, b""
    method = index.method_of(record)
    entry = _entry(record, method=method, dtype=t.dtype, shape=t.shape, parts=parts, aliases=found.aliases)
    return entry, found.digest
