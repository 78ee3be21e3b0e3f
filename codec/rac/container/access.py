"""Positioned reads from a file, from bytes, or from anything that offers `read_at`."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rac.errors import MissingFileError, RacError, SourceError, TruncatedError
from rac.system import RAW, Positioned


class NoRangesError(SourceError):
    """The server of a URL sends whole files only: it can be read forward, not at random."""


class ChangedError(SourceError):
    """What is read is not what it was, or not what it was stated to be: nothing that was made of it is kept."""


@contextmanager
def guarded(kind: type[RacError], file: str, offset: int | None = None, of: Any = OSError) -> Iterator[None]:
    """Context in which errors of the system become a `kind` that names the file; a missing source has its own."""
    try:
        yield
    except RacError:
        raise
    except of as e:
        if kind is SourceError and isinstance(e, FileNotFoundError):
            raise MissingFileError(file=file) from e
        raise kind(getattr(e, "strerror", None) or str(e), file=file, offset=offset) from e


class InFile:
    """Context that adds file, unit (number `i` of the tensor `unit`) and offset to RacErrors that do not have them."""

    __slots__ = ("_file", "_i", "_offset", "_unit")

    def __init__(
        self, file: str | None, unit: str | None = None, offset: int | None = None, i: int | None = None
    ) -> None:
        self._file, self._unit, self._offset, self._i = file, unit, offset, i

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, e: BaseException | None, tb: object) -> None:
        if isinstance(e, RacError):
            e.file = e.file or self._file
            e.unit = e.unit or (self._unit if self._i is None else f"{self._unit!r} unit {self._i}")
            e.offset = self._offset if e.offset is None else e.offset


class Access:
    """Bytes at an offset. Implementations may be used by several threads at once."""

    name: str
    size: int
    parallel = 1  # reads that are worth having in flight at once
    near = False  # whether a read takes no longer than a copy: then bytes are best read where they are decoded

    def view(self, at: int, size: int) -> memoryview | None:
        """The bytes themselves where they are in memory; None: they have to be read."""
        return None

    def ahead(self) -> None:
        """Have the system read ahead, from here on: bytes will be asked for in their order."""

    def read_into(self, at: int, out: memoryview) -> None:
        """Fill `out` from offset `at`; TruncatedError where the bytes end."""
        raise NotImplementedError

    def read_parts(self, at: int, parts: list[memoryview]) -> None:
        """Fill these one after the other, from offset `at` on, in one request."""
        if len(parts) == 1:
            self.read_into(at, parts[0])
            return
        whole = memoryview(bytearray(sum(map(len, parts))))
        self.read_into(at, whole)
        start = 0
        for part in parts:
            part[:] = whole[start : start + len(part)]
            start += len(part)

    def changed(self) -> str:
        """How the file has changed since it was opened, as far as that can be seen without reading; empty: not."""
        return ""

    def close(self) -> None:
        """Release what is held; what belongs to the caller stays open."""


def read(access: Access, at: int, size: int) -> bytes:
    """`size` bytes from `at`, checked against the size of the file before anything is allocated."""
    if at < 0 or size < 0 or at + size > access.size:
        raise TruncatedError(f"{size} bytes are needed, the file has {access.size}", file=access.name, offset=at)
    out = bytearray(size)
    access.read_into(at, memoryview(out))
    return bytes(out)


class FileAccess(Access):
    """A regular file, read at places. It is closed when nobody refers to it; copies and pickles open it again."""

    parallel = 4
    near = hasattr(os, "preadv")  # else threads would wait for each other

    def __init__(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        self.name, self._path = name or os.fspath(path), os.path.abspath(path)
        with guarded(SourceError, self.name):
            if os.path.exists(self._path) and not os.path.isfile(self._path):  # opening a pipe would wait
                raise SourceError("not a regular file", file=self.name)
            fd = os.open(self._path, os.O_RDONLY | RAW)
            self._file, self._close = Positioned(fd), weakref.finalize(self, os.close, fd)
            self._close.atexit = False
            found = os.fstat(fd)
            self.size, self._written = found.st_size, found.st_mtime_ns

    def read_into(self, at: int, out: memoryview) -> None:
        """Fill `out` from offset `at`."""
        self.read_parts(at, [out])

    def read_parts(self, at: int, parts: list[memoryview]) -> None:
        """By one call of the system, where it has one for that."""
        if not self._close.alive:  # its number may be that of another file by now
            raise SourceError("was closed before it was read", file=self.name)
        left = [part for part in parts if len(part)]
        try:
            while left:
                got = self._file.read(left[0], at) if len(left) == 1 else self._file.scatter(left, at)
                if not got:
                    raise TruncatedError("file ends early", file=self.name, offset=at)
                at += got
                while left and got >= len(left[0]):
                    got -= len(left.pop(0))
                if got:
                    left[0] = left[0][got:]
        except OSError as e:
            raise SourceError(e.strerror or str(e), file=self.name, offset=at) from e

    def changed(self) -> str:
        """By its size, and by when it was last written."""
        with suppress(OSError):
            now = self._file.stat() if self._close.alive else None
            if now is not None and now.st_size != self.size:
                return f"had {self.size} bytes, and has {now.st_size}"
            if now is not None and now.st_mtime_ns != self._written:
                return "was written to"
        return ""

    def ahead(self) -> None:
        """Have the system read ahead."""
        with suppress(OSError):  # a file system that cannot
            if self._close.alive:
                self._file.ahead()

    def close(self) -> None:
        """Close the file."""
        self._close()

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._close.alive:
            raise SourceError("was closed before it was copied", file=self.name)
        return FileAccess, (self._path, self.name)


class BytesAccess(Access):
    """Bytes in memory."""

    near = True

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "<bytes>") -> None:
        self.name, self._data = name, memoryview(data).cast("B")
        self.size = len(self._data)

    def view(self, at: int, size: int) -> memoryview:
        """The bytes themselves."""
        return self._piece(at, size)

    def _piece(self, at: int, size: int) -> memoryview:
        with guarded(SourceError, self.name, at, ValueError):  # closed
            piece = self._data[at : at + size]
        if len(piece) != size:
            raise TruncatedError("bytes end early", file=self.name, offset=at + len(piece))
        return piece

    def read_into(self, at: int, out: memoryview) -> None:
        """Fill `out` from offset `at`."""
        out[:] = self._piece(at, len(out))

    def close(self) -> None:
        """Let go of the bytes: a map that they are of can be closed."""
        with suppress(BufferError):  # somebody has a part of them
            self._data.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return BytesAccess, (bytes(self._data), self.name)


class ObjectAccess(Access):
    """A file object that can seek. It is read under a lock, and stays open."""

    def __init__(self, stream: Any, name: str | None = None) -> None:
        self.name = name or str(getattr(stream, "name", None) or "<file object>")
        self._stream, self._lock = stream, threading.Lock()
        with guarded(SourceError, self.name, 0, (OSError, ValueError)):
            self.size = stream.seek(0, os.SEEK_END)

    def read_into(self, at: int, out: memoryview) -> None:
        """Fill `out` from offset `at`."""
        done = 0
        with self._lock, guarded(SourceError, self.name, at, (OSError, ValueError)):
            self._stream.seek(at)
            while done < len(out) and (data := self._stream.read(len(out) - done)):
                out[done : done + len(data)] = data
                done += len(data)
        if done < len(out):
            raise TruncatedError("the file object ends early", file=self.name, offset=at + done)

    def __reduce__(self) -> tuple[Any, ...]:
        raise SourceError("was opened from a file object, of which there are no copies; open its path", file=self.name)
