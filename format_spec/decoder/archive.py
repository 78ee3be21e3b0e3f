"""Whole archives, container.md sections 13, 15 and 16."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from . import online as transforms
from .container import (
    ATTACHMENT,
    INDEX,
    OBJECT,
    TENSOR,
    Header,
    Index,
    Input,
    Record,
    Source,
    check_trailer,
    compare_row,
    read_header,
    read_index,
    read_record,
    row_names,
)
from .errors import ChecksumError, FormatError, LimitError, Limits, TruncatedError, only_rac_errors
from .structure import Map, Value, as_count, as_counts, as_text, encode
from .tensors import Objects, attachment_head, read_attachment, read_tensor, tensor_head

Tensor = tuple[str, tuple[int, ...], bytes]  # dtype, shape, dense bytes


def content_digest(entries: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """Section 13: name -> dtype, shape, digest."""
    array: list[Value] = []
    for name in sorted(entries, key=lambda name: name.encode("utf-8")):
        dtype, shape, digest = entries[name]
        array.append([name, dtype, list(shape), digest])
    return xxhash.xxh3_128_digest(encode(array))


# One record of type 1 or 2: its content and its row in the index.


def tensor_record(
    source: Input, record: Record, limits: Limits, objects: Objects
) -> tuple[bytes, transforms.Online | None, bytes, Map]:
    """Dense bytes, online transform, digest, and the row that the index must have.

    `objects` are those in front of the record.
    """
    head = tensor_head(record.head, record.payload, limits, objects)
    dense, parts = read_tensor(source, head, objects)
    source.zeros(-record.payload % 64)
    row: Map = {
        **record.row(),
        "name": head.name,
        "method": head.method,
        "dtype": head.dtype,
        "shape": [*head.shape],
        "aliases": [[name, tied] for name, tied in head.aliases],
        "parts": [*parts],
    }
    return dense, head.online, head.digest, row


def object_record(source: Input, record: Record, limits: Limits, held: int) -> tuple[NDArray[np.float32], Map]:
    """The matrix and its row; `held` are the bytes of the objects in front of it."""
    head = tensor_head(record.head, record.payload, limits, None)
    if held + 4 * head.rows * head.cols > limits.objects:
        raise LimitError("RAC-OBJ-005: objects")
    dense, parts = read_tensor(source, head, {})
    source.zeros(-record.payload % 64)
    row: Map = {
        **record.row(),
        "name": head.name,
        "method": head.method,
        "dtype": head.dtype,
        "shape": [*head.shape],
        "parts": [*parts],
    }
    return np.frombuffer(dense, "<f4").reshape(head.rows, head.cols), row


def attachment_record(source: Input, record: Record, limits: Limits) -> tuple[bytes, Map]:
    head = attachment_head(record.head, record.payload, limits)
    content = read_attachment(source, head)
    source.zeros(-record.payload % 64)
    return content, {**record.row(), "name": head.name, "method": head.method}


# Section 15.


@dataclass(frozen=True)
class Archive:
    """All of an archive; a tensor with aliases stands under each of its names."""

    tensors: dict[str, Tensor]
    attachments: dict[str, bytes]
    metadata: dict[str, str]
    digest: bytes
    header: Header
    index: Index
    online: dict[str, transforms.Online]
    """Of the tensors that have one, under each of their names."""
    objects: dict[str, NDArray[np.float32]]

    def folded(self, name: str) -> NDArray[np.float64]:
        """What a layer without online transform has for a weight: stages/online.md section 5."""
        dtype, shape, dense = self.tensors[name]
        w = transforms.numbers(dense, dtype, shape)
        return w @ transforms.transform(self.online[name], self.objects) if name in self.online else w


def decode(source: Source, limits: Limits | None = None) -> Archive:
    """Decode and verify a whole archive, from front to back without seeking."""
    stream = Input(source)
    try:
        with only_rac_errors():
            return _decode(stream, limits or Limits())
    finally:
        stream.close()


def _decode(stream: Input, limits: Limits) -> Archive:
    header = read_header(stream, limits)  # step 1
    tensors: dict[str, Tensor] = {}
    attachments: dict[str, bytes] = {}
    digests: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    objects: dict[str, NDArray[np.float32]] = {}
    online: dict[str, transforms.Online] = {}
    summary: list[Map] = []
    while (record := read_record(stream, limits)).type != INDEX:  # steps 2 and 3
        row = record.row()
        if record.type == TENSOR:  # step 4
            dense, transform, digest, row = tensor_record(stream, record, limits, objects)
            dtype, shape = as_text(row["dtype"], ""), tuple(as_counts(row["shape"], ""))
            for name in row_names(row):
                if name in tensors:
                    raise FormatError(f"RAC-IDX-010: name {name!r} is there twice")
                tensors[name] = (dtype, shape, dense)
                digests[name] = (dtype, shape, digest)
                if transform:
                    online[name] = transform
        elif record.type == ATTACHMENT:
            content, row = attachment_record(stream, record, limits)
            if row_names(row)[0] in attachments:
                raise FormatError(f"RAC-IDX-010: attachment {row['name']!r} is there twice")
            attachments[row_names(row)[0]] = content
        elif record.type == OBJECT:
            matrix, row = object_record(stream, record, limits, sum(o.nbytes for o in objects.values()))
            if row_names(row)[0] in objects:
                raise FormatError(f"RAC-OBJ-004: object {row['name']!r} is there twice")
            objects[row_names(row)[0]] = matrix
        else:  # RAC-REC-010
            stream.skip(record.payload)
            stream.zeros(-record.payload % 64)
        summary.append(row)  # step 5
    index = read_index(stream, record, header, limits)  # step 6
    if check_trailer(stream.read(32)) != (record.at, record.size):  # step 7
        raise FormatError("RAC-TRL-004: trailer does not point at the index")
    if stream.some(1):  # step 8
        raise FormatError("RAC-FWD-003: bytes behind the trailer")
    if len(index.rows) != len(summary):  # step 9
        raise FormatError("RAC-FWD-004: number of rows")
    for row, seen in zip(index.rows, summary, strict=True):
        compare_row(row, seen)
    if content_digest(digests) != index.digest:
        raise ChecksumError("RAC-DIG-002: content digest")
    return Archive(tensors, attachments, header.metadata, index.digest, header, index, online, objects)


# Section 16.


class RandomAccess:
    """Index first, then what is asked for."""

    def __init__(self, source: Source, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.source = Input(source)
        try:
            with only_rac_errors():
                self._open()
        except BaseException:
            self.source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    def _open(self) -> None:
        source = self.source
        self.header = read_header(source, self.limits)  # step 1
        size = source.size()
        if size < self.header.end + 32:
            raise TruncatedError("RAC-TRL-001: no trailer")
        source.seek(size - 32)
        at, length = check_trailer(source.read(32))
        if at < self.header.end or at + length + 32 != size:
            raise FormatError("RAC-TRL-003: trailer points outside")
        source.seek(at)  # step 2
        record = read_record(source, self.limits)
        if record.type != INDEX or record.size != length:
            raise FormatError("RAC-TRL-004: trailer does not point at the index")
        self.index = read_index(source, record, self.header, self.limits)

    def names(self) -> list[str]:
        return [name for row in self.index.rows if row["type"] == TENSOR for name in row_names(row)]

    def _find(self, kind: int, name: str) -> tuple[Map, Record]:
        """Step 3; KeyError if there is no such name."""
        for row in self.index.rows:
            if row["type"] == kind and name in row_names(row):
                self.source.seek(as_count(row["at"], "RAC-IDX-005"))
                record = read_record(self.source, self.limits)
                compare_row(row, record.row())
                return row, record
        raise KeyError(name)

    def tensor(self, name: str) -> Tensor:
        with only_rac_errors():
            row, record = self._find(TENSOR, name)
            payload = self.source.at
            objects = {n: self._object(n) for n in dict.fromkeys(self._used(record))}
            self.source.seek(payload)
            dense, _, _, expected = tensor_record(self.source, record, self.limits, objects)
            compare_row(row, expected)
            return as_text(row["dtype"], ""), tuple(as_counts(row["shape"], "")), dense

    def _used(self, record: Record) -> list[str]:
        """Names of objects that are there and in front of the record; tensor_head says which are missing."""
        uses, online = record.head.get("uses", []), record.head.get("online")
        there = [row for row in self.index.rows if row["type"] == OBJECT and as_count(row["at"], "") < record.at]
        names = {as_text(row["name"], "") for row in there}
        wanted = [*uses] if isinstance(uses, list) else []
        wanted += [online.get("object")] if isinstance(online, dict) else []
        return [n for n in wanted if isinstance(n, str) and n in names]

    def _object(self, name: str) -> NDArray[np.float32]:
        row, record = self._find(OBJECT, name)
        matrix, expected = object_record(self.source, record, self.limits, 0)
        compare_row(row, expected)
        return matrix

    def attachment(self, name: str) -> bytes:
        with only_rac_errors():
            row, record = self._find(ATTACHMENT, name)
            content, expected = attachment_record(self.source, record, self.limits)
            compare_row(row, expected)
            return content
