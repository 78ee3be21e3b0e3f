"""Writing an archive: under another name until it is whole, then one rename."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from rac.container import index, wire
from rac.container.output import PART, destination, part, sync_folder
from rac.errors import OutputError
from rac.records import Entry, record_size


class Writer:
    """Writes records one after another to `path` + ".part"; `finish` adds the index and renames.

    An interrupted writer leaves the part behind; `resume` goes on with it.
    """

    def __init__(self, path: str | os.PathLike[str], force: bool = False) -> None:
        self.path = destination(path, force)
        self.part = self.path + PART
        self.entries: list[Entry] = []
        self.at, self._named = 0, False
        self._file: BinaryIO = part(self.path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.close()
            raise OutputError("another process is writing this file", file=self.part) from e

    def start(self, header: dict[str, Any]) -> None:
        """Begin anew."""
        self._guard(lambda: (self._file.seek(0), self._file.truncate(0)))
        self._write(wire.header(header))

    def go_on(self, entries: list[Entry], at: int) -> None:
        """Keep the finished records of an earlier run, which end at `at`, and cut off the rest."""
        self.entries, self.at = list(entries), at
        self._guard(lambda: (self._file.truncate(at), self._file.seek(at)))

    def _guard(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except OSError as e:
            raise OutputError(e.strerror or str(e), file=self.part, offset=self.at) from e

    def _write(self, *pieces: bytes | memoryview) -> None:
        def write() -> None:
            for piece in pieces:
                self._file.write(piece)

        self._guard(write)
        self.at += sum(map(len, pieces))

    def add(
        self, kind: int, flags: int, head: dict[str, Any], units: Sequence[bytes | memoryview], **fields: Any
    ) -> Entry:
        """Write one record; `head` gets its "units". `fields` are those of its index row."""
        head = head | {"units": wire.directory(units)}
        payload_size = sum(len(u) + wire.pad(len(u), wire.STREAM_ALIGN) for u in units)
        fixed, check, head_size = wire.record_head(kind, flags, head, payload_size)
        entry = Entry(kind, head.get("name", ""), self.at, head_size, payload_size, check, flags, **fields)
        pieces: list[bytes | memoryview] = [fixed]
        for u in units:
            pieces += [u, bytes(wire.pad(len(u), wire.STREAM_ALIGN))]
        pieces.append(bytes(wire.pad(payload_size)))
        self._write(*pieces)
        self.entries.append(entry)
        return entry

    def begin(self, entry: Entry, head: bytes) -> None:
        """Write what stands in front of the payload of a record that is copied from elsewhere; `more` goes on."""
        self.entries.append(replace(entry, at=self.at))
        self._write(head)

    def more(self, piece: bytes | memoryview) -> None:
        """Bytes of the record that was begun, padding included."""
        self._write(piece)

    def flush(self) -> None:
        """Give what is written to the operating system, so that a killed process does not lose it."""
        self._guard(self._file.flush)

    def finish(self, digest: bytes) -> None:
        """Write index and trailer, bring everything to disk, give the file its name."""
        self.seal(digest)
        self.publish()

    def seal(self, digest: bytes) -> None:
        """Write index and trailer, and bring everything to disk; the whole file has the name of the part still."""
        at = self.at
        head, unit = index.build(self.entries, digest)
        fixed, _, head_size = wire.record_head(4, 0, head, len(unit) + wire.pad(len(unit), wire.STREAM_ALIGN))
        size = record_size(head_size, len(unit) + wire.pad(len(unit), wire.STREAM_ALIGN))
        body = fixed + unit
        self._write(body, bytes(size - len(body)), wire.trailer(at, size))

        def close() -> None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

        self._guard(close)

    def publish(self) -> None:
        """Give the file that was sealed its name."""

        def rename() -> None:
            os.replace(self.part, self.path)
            self._named = True
            sync_folder(self.path)

        self._guard(rename)

    def close(self) -> None:
        """Stop without finishing; the part stays for `go_on`, unless nothing but a header is in it."""
        if not self._file.closed:
            with contextlib.suppress(OSError):  # what cannot be written was said before
                self._file.close()
            if not self.entries and os.path.exists(self.part):
                os.unlink(self.part)

    def discard(self) -> None:
        """Stop without finishing and take the part away, even where it was sealed; a file that has its name stays."""
        with contextlib.suppress(OSError):
            self._file.close()
        if not self._named and os.path.exists(self.part):
            os.unlink(self.part)
