"""The work folder: small files and records by name, on a disk or behind a URL that fsspec knows.

Nothing here relies on a listing: a store may list late. A name holds a whole file or none on a disk; elsewhere what was
cut off shows by the checksums of what is in it.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from rac.container.access import Access, FileAccess, guarded, read
from rac.container.remote import open_url, system
from rac.container.zstd import Digest
from rac.errors import OutputError, RacError, SourceError
from rac.scratch import Scratch

PIECE = 1 << 24
AT_ONCE = 16  # small files that are asked for at once
RETRIES, BACKOFF = (
    6,
    0.1,
)  # times that a store is asked again, and seconds before the first; each next wait is twice that
WAITS = (0.1, 0.3, 1.0, 3.0)  # seconds that a file is waited for which a store shows late
OBJECTS = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "oci"))
"""Stores without folders, where asking for one might make a bucket."""
FINAL = (
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
    TypeError,
    ValueError,
)
"""Errors that are the same when it is asked again."""
T = TypeVar("T")


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
    """A folder of any file system that fsspec knows: S3 with `s3fs`, for example. What fails is asked for again."""

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self._fs, self._path = system(self.where)
        kinds = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol
        self._made = None if OBJECTS.intersection(kinds) else set[str]()

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _tried(self, kind: type[RacError], ask: Callable[[], T]) -> T:
        """What is asked for; FileNotFoundError where it is not there, a `kind` of error for all else that is raised."""
        for attempt in range(RETRIES + 1):
            try:
                return ask()
            except (RacError, FileNotFoundError):
                raise
            except Exception as e:
                what = str(e) or type(e).__name__
                if isinstance(e, FINAL):
                    raise kind(what, file=self.where) from e
                if attempt == RETRIES:
                    raise kind(f"{what}; gave up after {attempt + 1} attempts", file=self.where) from e
                time.sleep(min(5.0, BACKOFF * 2**attempt) * (1 + random.random() / 4))
        raise AssertionError

    def get(self, name: str) -> bytes | None:
        """A small file."""
        try:
            return self._tried(SourceError, lambda: bytes(self._fs.cat_file(self._at(name))))
        except FileNotFoundError:
            return None

    def _sent(self, name: str, send: Callable[[str], object]) -> None:
        """Write a file, its folder first where there are such."""
        at = self._at(name)
        folder = at.rpartition("/")[0]
        try:
            if self._made is not None and folder not in self._made:
                self._tried(OutputError, lambda: self._fs.makedirs(folder, exist_ok=True))
                self._made.add(folder)
            self._tried(OutputError, lambda: send(at))
        except FileNotFoundError as e:
            raise OutputError(str(e) or "no such place", file=self.where) from e

    def put(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._sent(name, lambda at: self._fs.pipe_file(at, data))

    def create(self, name: str, data: bytes) -> None:
        """Write a small file where there is none yet."""

        def send(at: str) -> None:
            try:
                self._fs.pipe_file(at, data, mode="create")
            except FileExistsError:
                pass
            except Exception:  # one that knows no such mode
                self._fs.pipe_file(at, data)

        if self.get(name) is None:
            self._sent(name, send)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A stream to a local file, which is sent when it is whole."""
        with Scratch("send") as scratch:
            path = str(scratch.path / "file")
            with guarded(OutputError, path), open(path, "wb") as f:
                yield f
            self._sent(name, lambda at: self._fs.put_file(path, at))

    def access(self, name: str) -> Access:
        """Positioned reads of a file, which may show late."""
        for wait in (*WAITS, None):
            self._fs.invalidate_cache()
            try:
                return open_url(f"{self.where}/{name}")
            except SourceError:
                if wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError

    def names(self, folder: str) -> list[str]:
        """Names in a folder."""
        found: list[Any] = []
        with contextlib.suppress(Exception):
            self._fs.invalidate_cache()
            found = self._fs.ls(self._at(folder), detail=False)
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def remove(self, name: str) -> None:
        """Remove a file or a folder; a folder where nothing is in it is none."""
        if name:
            with contextlib.suppress(FileNotFoundError):
                self._tried(OutputError, lambda: self._fs.rm(self._at(name), recursive=True))
