"""The records of an item: an archive like any other, written where they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, cast

from rac.container import index, wire
from rac.container.access import Access, InFile, read
from rac.container.reader import Archive
from rac.container.writer import PipeWriter
from rac.container.zstd import Digest, xxh3
from rac.encode.encoded import Bytes, Encoded
from rac.errors import ChecksumError, FormatError
from rac.records import Entry
from rac.registry import RECORD_OBJECT, RECORD_TENSOR


class _End:
    """A stream, and the digest of what was written behind a place."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest, self.size = stream, Digest(), 0

    def write(self, data: Any) -> None:
        self._stream.write(data)
        self.digest.update(data)
        self.size += len(data)

    def flush(self) -> None:
        self._stream.flush()


def write(stream: BinaryIO, encoded: Iterable[Encoded], provenance: Mapping[str, Any]) -> tuple[int, str]:
    """An archive of tensors and their objects; its size, and the digest in hexadecimal of what it ends with."""
    out = _End(stream)
    writer, there, content = PipeWriter(cast(BinaryIO, out), "<records>"), set[str](), list[list[Any]]()
    writer.start({"features": [], "metadata": {}, "provenance": dict(provenance)})
    for e in encoded:
        e.write(writer, there)
        for name in (e.name, *(alias for alias, _ in e.row["aliases"])):
            content.append([name, e.head["dtype"], e.head["shape"], e.head["digest"]])
    out.digest = Digest()
    writer.seal(index.content_digest(content))
    return out.size, out.digest.value().hex()


class Records:
    """The records of an item, opened; RacError unless it ends with what its marker states."""

    def __init__(self, access: Access, size: int, check: str) -> None:
        self._archive = Archive(access)
        try:
            at = self._archive.index.at
            digest = Digest()
            digest.update(read(access, at, access.size - at))
            if access.size != size or digest.value().hex() != check:
                raise ChecksumError("records are not those that were made", file=access.name)
            self._rows = {e.name: e for e in self._archive.index.entries if e.type == RECORD_TENSOR}
            self._objects = {e.name: e for e in self._archive.index.entries if e.type == RECORD_OBJECT}
        except BaseException:
            self.close()
            raise

    def tensor(self, name: str) -> Encoded:
        """A tensor with its objects; RacError where a byte of it is another than was written."""
        if name not in self._rows:
            raise FormatError(f"no record of {name!r}", file=self._archive.access.name)
        entry = self._rows[name]
        own = self._read(entry)
        uses = [*own.head.get("uses", ())]
        uses += [o] if (o := own.head.get("online", {}).get("object")) else []
        objects = tuple(self._read(self._objects[use]) for use in uses)
        return Encoded(own.head, own.units, own.row | {"aliases": entry.aliases}, objects)

    def _read(self, entry: Entry) -> Encoded:
        record = self._archive.record(entry)
        access = self._archive.access
        data = memoryview(read(access, record.payload, record.payload_size))
        units: list[Bytes] = []
        with InFile(access.name, repr(entry.name)):
            for unit in wire.parse_units(record.head["units"], record.payload_size):
                units.append(data[unit.offset : unit.offset + unit.size])
                if xxh3(units[-1]) != unit.check:
                    raise ChecksumError("checksum does not match", offset=record.payload + unit.offset)
        head = {k: v for k, v in record.head.items() if k != "units"}
        row = {"method": entry.method, "dtype": entry.dtype, "shape": entry.shape, "parts": entry.parts}
        return Encoded(head, units, row)

    def close(self) -> None:
        """Let go of the file."""
        self._archive.close()
