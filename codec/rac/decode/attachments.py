"""Files that travel along with the tensors."""

from __future__ import annotations

from collections.abc import Callable

from rac.container import index, wire, zstd
from rac.container.access import InFile
from rac.container.forward import Walk
from rac.errors import ChecksumError, FormatError, LimitError, UnsupportedError
from rac.records import Limits, Record, Units

CONTENT: dict[str, Callable[[bytes, int], bytes]] = {"raw/1": lambda data, _: data, "zstd/1": zstd.decompress}
"""What a unit of each method holds, given the size that the head states."""


def attachment_units(record: Record, limits: Limits) -> Units:
    """The one unit of an attachment; its head is checked."""
    head = record.head
    if {"name", "size", "stages", "units", "digest"} - head.keys():
        raise FormatError("attachment head is malformed", offset=record.at)
    if unknown := [k for k in head.keys() - {"name", "size", "stages", "units", "digest"} if not k.startswith("x-")]:
        raise UnsupportedError(f"attachment head has the unknown field {min(unknown)!r}", offset=record.at)
    units = wire.parse_units(head["units"], record.payload_size)
    stages, digest = head["stages"], head["digest"]
    if not isinstance(digest, bytes) or len(digest) != 16:
        raise FormatError("attachment digest is malformed", offset=record.at)
    if not isinstance(head["name"], str) or len(units) != 1 or not index.is_count(head["size"]):
        raise FormatError("attachment head is malformed", offset=record.at)
    if stages not in [[{"id": method}] for method in CONTENT]:
        raise UnsupportedError(f"attachment stages {stages!r} are not known to this version", offset=record.at)
    if max(head["size"], units[0].size) > limits.attachment:
        raise LimitError(f"attachment of {head['size']} bytes exceeds the limit", offset=record.at)
    if units[0].size > head["size"] + 1024:
        raise FormatError("attachment is larger than it can need", offset=record.at)
    return units


def attachment_bytes(record: Record, data: bytes) -> bytes:
    """Content of an attachment from the bytes of its unit."""
    head = record.head
    if zstd.xxh3(data) != int.from_bytes(head["units"][8:16], "little"):
        raise ChecksumError("checksum does not match", offset=record.payload)
    data = CONTENT[head["stages"][0]["id"]](data, head["size"])
    if len(data) != head["size"]:
        raise FormatError("attachment does not have the size that its head states", offset=record.payload)
    if zstd.digest(data) != head["digest"]:
        raise ChecksumError("the attachment is not the one that was packed", offset=record.payload)
    return data


def forward_attachment(walk: Walk, record: Record) -> bytes:
    """Content of the attachment that the stream stands at."""
    with InFile(str(walk.name), repr(record.head.get("name"))):
        unit = attachment_units(record, walk.limits)[0]
        return attachment_bytes(record, walk.unit(unit, record, walk.limits.attachment, "attachment"))
