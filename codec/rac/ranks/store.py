"""The work folder: small files and records by name, on a disk or behind a URL that fsspec knows.

Nothing here relies on a listing: a store may list late. A name holds a whole file or none on a disk; elsewhere what was
cut off shows by the checksums of what is in it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rac.container.access import Access, FileAccess, guarded, read
from rac.container.remote import open_url, system
from rac.container.zstd import Digest
from rac.errors import OutputError, RacError, SourceError

PIECE = 1 << 24
AT_ONCE = 16  # small files that are asked for at once


class Told:
    """A stream that knows the size and the digest of what went through it; a new digest may be begun in between."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest, self.size = stream, Digest(), 0

    def write(self, data: Any) -> int:
        """Write all of it; its length."""
        self._stream.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """As of the stream."""
        self._stream.flush()


class Store(Protocol):
    """Files by name."""

    where: str
    """The folder, as it was named."""

    def get(self, name: str) -> bytes | None:
        """A small file; None where it is not there."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small file; OutputError where it cannot be written."""

    def create(self, name: str, data: bytes) -> None:
        """Write a small file unless there is one; where a store cannot be asked that, one may replace the other."""

    def writing(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A stream whose bytes become the file when it is left without an error."""

    def access(self, name: str) -> Access:
        """Positioned reads of a file; SourceError where it is not there."""

    def names(self, folder: str) -> list[str]:
        """Names in a folder, for people: some that are there may be missing."""

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, where there is one; OutputError where it stays.

        An empty name is the work folder itself, which stays where anything is in it.
        """


def open_store(where: str | os.PathLike[str]) -> Store:
    """The work folder at a path or URL; SourceError where nothing knows it."""
    name = os.fspath(where)
    if name.startswith(("file://", "local://")):
        name = name.partition("://")[2]
    return Far(name) if "://" in name else Disk(name)


def several(store: Store, names: Iterable[str]) -> dict[str, bytes | None]:
    """Small files by name, many at once."""
    asked = list(names)
    if len(asked) < 2 or isinstance(store, Disk):
        return {name: store.get(name) for name in asked}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(asked, pool.map(store.get, asked), strict=True))


def fetched(store: Store, name: str, folder: str) -> str:
    """The path of a large file: where it lies, or of a copy in a local folder; SourceError where it is not there."""
    if isinstance(store, Disk):
        return store.path(name)
    access, path = store.access(name), os.path.join(folder, name.replace("/", "."))
    with guarded(OutputError, path), open(path, "wb") as f:
        for at in range(0, access.size, PIECE):
            f.write(read(access, at, min(PIECE, access.size - at)))
    access.close()
    return path


class Disk:
    """A folder of a file system that renames at once: a local one, or one that machines share."""

    def __init__(self, path: str) -> None:
        self.where, self._path = path, Path(path).absolute()

    def path(self, name: str) -> str:
        """Where a file lies."""
        return str(self._path / name)

    def get(self, name: str) -> bytes | None:
        """A small file."""
        with guarded(SourceError, self.where):
            try:
                return (self._path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.writing(name) as f:
            f.write(data)

    def create(self, name: str, data: bytes) -> None:
        """Write a small file unless there is one."""
        with self._part(name) as (part, f):
            f.write(data)
            f.close()
            try:
                os.link(part, self._path / name)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                if not (self._path / name).exists():
                    os.replace(part, self._path / name)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A stream of a file under another name, which is renamed."""
        with self._part(name) as (part, f):
            yield f
            f.close()
            os.replace(part, self._path / name)

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[tuple[Path, BinaryIO]]:
        """A file beside another, which is removed where it is still there."""
        path = self._path / name
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with guarded(OutputError, self.where):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(part, "wb") as f:
                    yield part, f
            finally:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)

    def access(self, name: str) -> Access:
        """Positioned reads of a file."""
        return FileAccess(self._path / name)

    def names(self, folder: str) -> list[str]:
        """Names in a folder."""
        with contextlib.suppress(OSError):
            return sorted(p.name for p in (self._path / folder).iterdir() if not p.name.startswith("."))
        return []

    def remove(self, name: str) -> None:
        """Remove a file or a folder."""
        path = self._path / name
        if not name:
            with contextlib.suppress(OSError):
                path.rmdir()
            return
        with guarded(OutputError, self.where), contextlib.suppress(FileNotFoundError):
            (shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink)(path)


class Far:
    """A folder of any file system that fsspec knows: S3 with `s3fs`, for example."""

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self._fs, self._path = system(self.where)
        self._made = set[str]()

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    @contextlib.contextmanager
    def _named(self, kind: type[RacError]) -> Iterator[None]:
        """Whatever the file system raises becomes a `kind`."""
        try:
            yield
        except RacError:
            raise
        except Exception as e:
            raise kind(str(e) or type(e).__name__, file=self.where) from e

    def get(self, name: str) -> bytes | None:
        """A small file."""
        with self._named(SourceError):
            try:
                return bytes(self._fs.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def _folder(self, name: str) -> None:
        """Make the folder that a file lies in, where there are folders."""
        folder = self._at(name).rpartition("/")[0]
        if folder not in self._made:
            self._fs.makedirs(folder, exist_ok=True)
            self._made.add(folder)

    def put(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self._named(OutputError):
            self._folder(name)
            self._fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> None:
        """Write a small file where there is none yet."""
        if self.get(name) is None:
            self.put(name, data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A stream; what an error cuts off has no marker."""
        with self._named(OutputError):
            self._folder(name)
            with self._fs.open(self._at(name), "wb") as f:
                yield f

    def access(self, name: str) -> Access:
        """Positioned reads of a file."""
        self._fs.invalidate_cache()
        return open_url(f"{self.where}/{name}")

    def names(self, folder: str) -> list[str]:
        """Names in a folder."""
        found: list[Any] = []
        with contextlib.suppress(Exception):
            self._fs.invalidate_cache()
            found = self._fs.ls(self._at(folder), detail=False)
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def remove(self, name: str) -> None:
        """Remove a file or a folder; a folder where nothing is in it is none."""
        with self._named(OutputError), contextlib.suppress(FileNotFoundError):
            if name:
                self._fs.rm(self._at(name), recursive=True)
                self._made.discard(self._at(name))
