"""The records of an item: an archive like any other, written where they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, cast

from rac.container import index, wire
from rac.container.access import Access, BytesAccess, InFile, read
from rac.container.reader import Archive
from rac.container.writer import PipeWriter
from rac.container.zstd import Digest, xxh3
from rac.encode.code.plan import LARGE
from rac.encode.encoded import Bytes, Encoded
from rac.errors import ChecksumError, FormatError
from rac.ranks.store import Told
from rac.records import Entry, Units
from rac.registry import RECORD_OBJECT, RECORD_TENSOR


def write(stream: BinaryIO, encoded: Iterable[Encoded], provenance: Mapping[str, Any], where: str) -> tuple[int, str]:
    """An archive of tensors and their objects; its size, and the digest in hexadecimal of what it ends with.

    OutputError that names `where` if it cannot be written.
    """
    out = Told(stream)
    writer, there, content = PipeWriter(cast(BinaryIO, out), where), set[str](), list[list[Any]]()
    writer.start({"features": [], "metadata": {}, "provenance": dict(provenance)})
    for e in encoded:
        e.write(writer, there)
        for name in (e.name, *(alias for alias, _ in e.row["aliases"])):
            content.append([name, e.head["dtype"], e.head["shape"], e.head["digest"]])
    out.digest = Digest()
    writer.seal(index.content_digest(content))
    return out.size, out.digest.value().hex()


class _Units(Sequence[Bytes]):
    """The units of a record, each read and checked where it is asked for."""

    def __init__(self, access: Access, at: int, units: Units) -> None:
        self._access, self._at, self._units = access, at, units

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        unit = self._units[i]
        data = read(self._access, self._at + unit.offset, unit.size)
        if xxh3(data) != unit.check:
            raise ChecksumError("checksum does not match", offset=self._at + unit.offset)
        return data


class Records:
    """The records of an item, opened; RacError unless it ends with what its marker states."""

    def __init__(self, access: Access, size: int, check: str) -> None:
        self._archive, self._lent = Archive(access), False
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
        with InFile(self._archive.access.name, repr(entry.name)):
            access, at = self._archive.access, record.payload
            places = wire.parse_units(record.head["units"], record.payload_size)
            units: Sequence[Bytes] = _Units(access, at, places)
            if record.payload_size < LARGE:
                held = BytesAccess(read(access, at, record.payload_size), access.name)
                units = [*_Units(held, 0, places)]
            else:
                self._lent = True
                for _ in units:  # all are checked before any is used; what is large is read again, not held
                    pass
        head = {k: v for k, v in record.head.items() if k != "units"}
        row = {"method": entry.method, "dtype": entry.dtype, "shape": entry.shape, "parts": entry.parts}
        return Encoded(head, units, row)

    def close(self) -> None:
        """Let go of the file; one of which large tensors are still to be read closes with the last of them."""
        if not self._lent:
            self._archive.close()
