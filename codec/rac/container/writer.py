"""Writing an archive: under another name until it is whole, then one rename."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

from rac.container import index, wire
from rac.container.access import guarded
from rac.container.output import PART, destination, part
from rac.errors import OutputError
from rac.records import Entry
from rac.registry import RECORD_INDEX
from rac.system import lock, start_writing, sync_folder

AT_ONCE = 4 << 20  # bytes of a record that are handed to the system in one call
SOON = 8 << 20  # bytes after which the disk begins to write, so that little is left to wait for at the end


class Writer:
    """Writes records to `path` + ".part", which stays where it is interrupted; `finish` adds the index and renames."""

    def __init__(self, path: str | os.PathLike[str], force: bool = False) -> None:
        self.path = destination(path, force)
        self.part = self.path + PART
        self.entries: list[Entry] = []
        self.at, self._named, self._dirty = 0, False, 0
        buffered: Any = part(self.path)
        self._file: Any = buffered.detach()  # what is written goes to the system at once, in large pieces
        try:
            lock(self._file)
        except OSError as e:
            self._file.close()
            raise OutputError("another process is writing this file", file=self.part) from e

    def start(self, header: dict[str, Any]) -> None:
        """Begin anew."""
        with self._guard():
            self._file.seek(0)
            self._file.truncate(0)
        self.write(wire.header(header))

    def go_on(self, entries: list[Entry], at: int) -> None:
        """Keep the finished records of an earlier run, which end at `at`, and cut off the rest."""
        self.entries, self.at = list(entries), at
        with self._guard():
            self._file.truncate(at)
            self._file.seek(at)

    def _guard(self) -> AbstractContextManager[None]:
        return guarded(OutputError, self.part, self.at)

    def write(self, *pieces: bytes | memoryview) -> None:
        """Bytes of the record that was begun, padding included."""
        with self._guard():
            self._put([piece for piece in pieces if len(piece)])
        self.at += sum(map(len, pieces))

    def _put(self, pieces: list[bytes | memoryview]) -> None:
        """Write pieces, many in one call where the system knows how."""
        left = deque(memoryview(piece) for piece in pieces)
        while left:
            if hasattr(os, "writev"):
                done = os.writev(self._file.fileno(), [*itertools.islice(left, 1024)])
            else:
                done = self._file.write(left[0])
            while left and done >= len(left[0]):
                done -= len(left.popleft())
            if done:
                left[0] = left[0][done:]
        self._dirty += sum(map(len, pieces))
        if self._dirty > SOON:
            self._dirty = 0
            start_writing(self._file.fileno())

    def add(
        self, kind: int, flags: int, head: dict[str, Any], units: Sequence[bytes | memoryview], **fields: Any
    ) -> Entry:
        """Write one record; `head` gets its "units". `fields` are those of its index row."""
        at, directory = self.at, wire.directory(units)
        payload_size = wire.payload_size(directory)
        fixed, check, head_size = wire.record_head(kind, flags, head | {"units": directory}, payload_size)
        padded = (piece for u in units for piece in (u, bytes(wire.pad(len(u), wire.STREAM_ALIGN))))
        some, size = list[bytes | memoryview]([fixed]), len(fixed)
        for piece in itertools.chain(padded, [bytes(wire.pad(payload_size))]):
            some.append(piece)
            size += len(piece)
            if size >= AT_ONCE:  # units may be in a file, and more than memory holds
                self.write(*some)
                some, size = [], 0
        self.write(*some)
        sizes: Any = {"head_size": head_size, "payload_size": payload_size}
        self.entries.append(Entry(kind, head.get("name", ""), at, check=check, flags=flags, **sizes, **fields))
        return self.entries[-1]

    def begin(self, entry: Entry, head: bytes) -> None:
        """Write what stands in front of the payload of a record that is copied from elsewhere; `write` goes on."""
        self.entries.append(entry._replace(at=self.at))
        self.write(head)

    def flush(self) -> None:
        """Give what is written to the operating system, so that a killed process does not lose it."""
        with self._guard():
            self._file.flush()

    def finish(self, digest: bytes) -> None:
        """Write index and trailer, bring everything to disk, give the file its name."""
        self.seal(digest)
        self.publish()

    def seal(self, digest: bytes) -> None:
        """Write index and trailer, and bring everything to disk; the whole file has the name of the part still."""
        e = self.add(RECORD_INDEX, 0, *index.build(self.entries, digest))
        self.write(wire.trailer(e.at, e.size))
        with self._guard():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def publish(self) -> None:
        """Give the file that was sealed its name."""
        with self._guard():
            os.replace(self.part, self.path)
            self._named = True
            sync_folder(self.path)

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


class PipeWriter(Writer):
    """Writes an archive forward into a stream: nothing to resume; a reader knows by the trailer that it is whole."""

    def __init__(self, stream: BinaryIO, name: str = "<stdout>") -> None:
        self.path = self.part = name
        self.entries = []
        self.at, self._named = 0, True
        self._file = stream

    def _guard(self) -> AbstractContextManager[None]:
        return guarded(OutputError, self.part, self.at, (OSError, ValueError))  # the latter where it is closed

    def _put(self, pieces: list[bytes | memoryview]) -> None:
        """Write pieces."""
        for piece in pieces:
            self._file.write(piece)

    def start(self, header: dict[str, Any]) -> None:
        """Begin."""
        self.write(wire.header(header))

    def go_on(self, entries: list[Entry], at: int) -> None:
        """OutputError: there is nothing to go on with."""
        raise OutputError("a pipe cannot be resumed", file=self.path)

    def seal(self, digest: bytes) -> None:
        """Write index and trailer."""
        e = self.add(RECORD_INDEX, 0, *index.build(self.entries, digest))
        self.write(wire.trailer(e.at, e.size))
        self.flush()

    def publish(self) -> None:
        """Nothing: it has no name."""

    def close(self) -> None:
        """Nothing: whoever opened the stream closes it."""

    def discard(self) -> None:
        """Nothing: what was written cannot be taken back, and has no trailer."""
