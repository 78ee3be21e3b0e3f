"""Going on with the part that an interrupted pack left: what of it is whole, and still what the source says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rac.container import index as ix
from rac.container import wire
from rac.container.forward import Forward
from rac.decode import tensor as tn
from rac.decode.archive import attachment_bytes, attachment_units
from rac.encode import ties
from rac.encode.sources import Attachment
from rac.errors import RacError
from rac.records import Entry, Record
from rac.registry import RECORD_ATTACHMENT, RECORD_TENSOR


@dataclass(frozen=True, slots=True)
class Found:
    """The whole records at the start of a part."""

    entries: list[Entry]
    at: int
    files: int
    digests: list[bytes]


def scan(part: str, header: dict[str, Any], files: Sequence[Attachment], groups: Sequence[ties.Group]) -> Found | None:
    """Records of `part` that are whole and equal to the first of the source; None where nothing can be kept.

    Contents are compared by digest, which costs one reading of the finished tensors and no encoding.
    """
    if not os.path.exists(part) or os.path.getsize(part) == 0:
        return None
    entries: list[Entry] = []
    digests: list[bytes] = []
    with open(part, "rb") as f:
        try:
            forward = Forward(f, part)
        except RacError:
            return None
        if wire.header(forward.header) != wire.header(header):
            return None
        at = forward.at
        try:
            for record in forward.records():
                k = len(entries)
                if k < len(files):
                    entry = _file(forward, record, files[k])
                elif k - len(files) < len(groups):
                    entry, digest = _tensor(forward, record, groups[k - len(files)])
                    digests.append(digest)
                else:
                    break
                if entry is None:
                    break
                forward.skip(record)
                entries.append(entry)
                at = forward.at
        except RacError:
            pass  # the rest is cut off or damaged, and will be written again
    del digests[max(0, len(entries) - len(files)) :]
    return Found(entries, at, min(len(files), len(entries)), digests)


def _entry(record: Record, **fields: Any) -> Entry:
    return Entry(
        record.type,
        record.head["name"],
        record.at,
        record.head_size,
        record.payload_size,
        record.check,
        **fields,
    )


def _file(forward: Forward, record: Record, file: Attachment) -> Entry | None:
    if record.type != RECORD_ATTACHMENT or record.head.get("name") != file.name:
        return None
    unit = attachment_units(record, forward.limits)[0]
    data = attachment_bytes(record, forward.unit(unit, record, forward.limits.attachment, file.name))
    return _entry(record, method=record.head["stages"][0]["id"]) if data == file.read() else None


def _tensor(forward: Forward, record: Record, group: ties.Group) -> tuple[Entry | None, bytes]:
    t = group.tensor
    if record.type != RECORD_TENSOR:
        return None, b""
    found = tn.parse(record, forward.limits)
    same = (found.name, found.dtype, found.shape, found.aliases, found.extra) == (
        t.name, t.dtype, t.shape, group.aliases, group.extra,
    )  # fmt: skip
    if not same:
        return None, b""
    heads = []
    for i, unit in enumerate(found.units):
        heads.append(forward.unit(unit, record, found.most(i), t.name)[:4096])
    if ties.digest(t) != (found.record.head.get("x-source") if found.trellis else found.digest):
        return None, b""
    parts = tn.parts(
        found.grid,
        found.lanes,
        found.trellis is not None,
        [u.size for u in found.units],
        lambda i, size: heads[i][:size],
    )
    entry = _entry(
        record, method=ix.method_of(record), dtype=found.dtype, shape=found.shape, parts=parts, aliases=found.aliases
    )
    return entry, found.digest
