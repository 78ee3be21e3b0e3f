"""Positioned reads from a file, from bytes, or from anything that offers `read_at`."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Protocol

from rac.errors import RacError, SourceError, TruncatedError


class Access(Protocol):
    """Bytes at an offset. Implementations may be used by several threads at once."""

    name: str
    size: int

    def read_into(self, at: int, out: memoryview) -> None:
        """Fill `out` from offset `at`; TruncatedError where the bytes end."""

    def close(self) -> None:
        """Release what is held."""


def read(access: Access, at: int, size: int) -> bytes:
    """`size` bytes from `at`, checked against the size of the file before anything is allocated."""
    if at < 0 or size < 0 or at + size > access.size:
        raise TruncatedError(f"{size} bytes are needed, the file has {access.size}", file=access.name, offset=at)
    out = bytearray(size)
    access.read_into(at, memoryview(out))
    return bytes(out)


class FileAccess:
    """A regular file, read with pread."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            self._fd = os.open(self.name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self.size = os.fstat(self._fd).st_size
            if not os.path.isfile(self.name):
                os.close(self._fd)
                raise SourceError("not a regular file", file=self.name)
        except OSError as e:
            raise SourceError(e.strerror or str(e), file=self.name) from e

    def read_into(self, at: int, out: memoryview) -> None:
        """Fill `out` from offset `at`."""
        done = 0
        try:
            while done < len(out):
                got = os.preadv(self._fd, [out[done:]], at + done)
                if not got:
                    raise TruncatedError("file ends early", file=self.name, offset=at + done)
                done += got
        except OSError as e:
            raise SourceError(e.strerror or str(e), file=self.name, offset=at) from e

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class BytesAccess:
    """Bytes in memory."""

    def __init__(self, data: bytes | bytearray | memoryview, name: str = "<bytes>") -> None:
        self.name, self._data = name, memoryview(data).cast("B")
        self.size = len(self._data)

    def read_into(self, at: int, out: memoryview) -> None:
        """Fill `out` from offset `at`."""
        piece = self._data[at : at + len(out)]
        if len(piece) != len(out):
            raise TruncatedError("bytes end early", file=self.name, offset=at + len(piece))
        out[:] = piece

    def close(self) -> None:
        """Nothing to release."""


class InFile:
    """Context that adds the file's name, and a unit where none is known, to the RacErrors that pass."""

    def __init__(self, file: str, unit: str | None = None) -> None:
        self._file, self._unit = file, unit

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(e, RacError):
            e.file = e.file or self._file
            e.unit = e.unit or self._unit
