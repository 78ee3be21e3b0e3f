"""Models of the Hub as sources: files at one commit, read by ranges; nothing is kept of them but what is in work."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from rac import system
from rac.calibrate.text import Note
from rac.container.access import Access, ChangedError, guarded
from rac.container.access import read as access_read
from rac.container.feed import RangeRing
from rac.container.hub import Address, HubFile, Snapshot, UnreachableError, cached_snapshot
from rac.decode.unpack import safe_name
from rac.encode.sources import hf, safetensors
from rac.encode.sources.model import Extent, Source, SourceTensor
from rac.errors import OutputError, SourceError

RING = 32 << 20  # bytes that are read ahead in memory
PIECE = 1 << 20
AT_ONCE = 8  # small files that are fetched at once
START = 1 << 16  # bytes of a safetensors file that are read first
JOIN = 5.0  # seconds that closing waits for a read that cannot be interrupted
HELD = 64 << 20  # bytes of small files that are kept in memory from their check to their use


def hash_file(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with guarded(SourceError, path), open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _differs(file: HubFile, what: str) -> ChangedError:
    return ChangedError(f"{what} is not the one that the Hub lists; is it whole?", file=file.url)


@dataclass(frozen=True, slots=True, eq=False)
class HubExtent(Extent):
    """A byte range of a file on the Hub: read from what the tape brings, or by a request of its own."""

    file: HubFile
    tape: HubTape
    pinned: ClassVar[bool] = True

    @property
    def whole(self) -> int:
        """Bytes of the file, as the Hub lists them."""
        return self.file.size

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the range; ChangedError where they are not those that the Hub has listed."""
        out = np.empty(stop - start, np.uint8)
        if not self.tape.read(self, start, out.data):
            self.tape.access(self.file).read_into(self.offset + start, out.data)
            if (start, stop) == (0, self.size):
                self.tape.add(self, out.data)
        return out


class HubTape:
    """Brings safetensors files one after the other, each byte once, and compares the SHA-256 of each on the way.

    What the tensors in work need lies in an unnamed file that is written round and round, as large as the largest of
    the files. A reader waits until its bytes have come, this waits until there is room.
    """

    def __init__(self) -> None:
        self.files: list[HubFile] = []
        self.check = True  # whether whole files are read, for their SHA-256; else what is asked for alone
        self._change = threading.Condition()
        self._open: dict[HubFile, Access] = {}
        self._sums: dict[HubFile, tuple[Any, int]] = {}  # SHA-256 of the beginnings of files, and where these end
        self._thread: threading.Thread | None = None
        self._file: BinaryIO | None = None
        self._extents: dict[int, int] = {}  # identities, to where they begin in the sequence of all that is kept
        self._places: dict[str, tuple[int, int]] = {}  # names of tensors to the same, and where they end
        self._order: list[str] = []  # of these
        self._released: set[str] = set()
        self._first = self._head = self._tail = 0  # name that is not released; bytes that have come, and are done with
        self._most = 0
        self._error: BaseException | None = None
        self._stopped = False

    def __reduce__(self) -> tuple[Any, ...]:
        return HubTape, ()  # in another process there is nothing but requests

    @property
    def limit(self) -> int:
        """Bytes of tensors that it holds at once."""
        return max(self._most, *(f.size for f in self.files), 0)

    def access(self, file: HubFile) -> Access:
        """The file, opened once."""
        with self._change:
            if file not in self._open:
                self._open[file] = file.open()
            return self._open[file]

    def add(self, extent: HubExtent, data: memoryview) -> None:
        """Hash an extent that was read whole, where extents are read from the beginning of a file to its end."""
        file, at = extent.file, extent.offset
        sha256, end = self._sums.pop(file, (None, 0)) if at else (hashlib.sha256(), 0)
        if sha256 is None or end != at or file.sha256 is None:
            return
        sha256.update(data)
        if at + len(data) < file.size:
            self._sums[file] = sha256, at + len(data)
        elif sha256.hexdigest() != file.sha256:
            raise _differs(file, "its SHA-256")

    def start(self, tensors: Sequence[SourceTensor], beside: str) -> None:
        """Bring tensors from now on; what is left of the files that they are in is read too, for their SHA-256."""
        number = {file: i for i, file in enumerate(self.files)}
        found = [(t.name, t.data) for t in tensors if isinstance(t.data, HubExtent) and t.data.size]
        found.sort(key=lambda pair: (number[pair[1].file], pair[1].offset))
        self._most = max((t.nbytes for t in tensors), default=0)  # others may lie on the disk
        at, by_file = 0, dict[HubFile, list[tuple[int, int]]]()
        for name, extent in found:
            self._order.append(name)
            self._extents[id(extent)], self._places[name] = at, (at, at + extent.size)
            at += extent.size
            by_file.setdefault(extent.file, []).append((extent.offset, extent.size))
        if found:
            with guarded(OutputError, beside):
                folder = os.path.dirname(os.path.abspath(beside))
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `close` closes it
                self._disk = system.Positioned(self._file.fileno())
            self._thread = threading.Thread(target=self._work, args=(by_file,), name="rac-hub", daemon=True)
            self._thread.start()

    def read(self, extent: HubExtent, start: int, out: memoryview) -> bool:
        """Fill `out` from byte `start` of an extent once it has come; False where the tape does not bring it."""
        if self._file is None or id(extent) not in self._extents:
            return False
        at, done = self._extents[id(extent)] + start, 0
        with self._change:
            while self._head < at + len(out):
                if self._error:
                    raise self._error
                if self._stopped:
                    raise SourceError("was closed while it was read", file=extent.path)
                self._change.wait()
        while done < len(out):  # in two parts where it goes over the end of the file
            place = (at + done) % self.limit
            part = out[done : done + min(len(out) - done, self.limit - place)]
            done += self._disk.read(part, place)
        return True

    def release(self, tensor: SourceTensor) -> None:
        """The place of a tensor may be written over."""
        with self._change:
            self._released.add(tensor.name)
            while self._first < len(self._order) and self._order[self._first] in self._released:
                self._tail = self._places[self._order[self._first]][1]
                self._first += 1
            self._change.notify_all()

    def finish(self) -> None:
        """Wait for the last file; ChangedError where one is not what the Hub lists."""
        if self._thread:
            self._thread.join()
        if self._error:
            raise self._error

    def close(self) -> None:
        """End it, and give the file back."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
            for access in self._open.values():
                access.close()
        if self._thread:
            self._thread.join(JOIN)
        with self._change:
            if self._file:
                self._file.close()

    def _work(self, by_file: Mapping[HubFile, list[tuple[int, int]]]) -> None:
        try:
            for file, ranges in by_file.items():
                self._bring(file, ranges)
        except BaseException as e:
            with self._change:
                self._error = e
                self._change.notify_all()

    def _bring(self, file: HubFile, ranges: list[tuple[int, int]]) -> None:
        """Keep these ranges of a file, and hash all of it."""
        sha256 = hashlib.sha256() if self.check and file.sha256 else None
        parts, at = list[tuple[int, bool]](), 0  # sizes, and whether they are kept
        for offset, size in ranges:
            parts += [(offset - at, False), (size, True)]
            at = offset + size
        parts.append((file.size - at, False))
        parts = [(size, keep) for size, keep in parts if keep or sha256]
        feed = RangeRing(self.access(file), [(0, file.size)] if sha256 else ranges, RING)
        try:
            for left, keep in parts:
                while left:
                    view, held = feed.take(min(PIECE, left))
                    if sha256:
                        sha256.update(view)
                    if keep:
                        self._keep(view)
                    left -= len(view)
                    if held:
                        held.give()
        finally:
            feed.close()
        if sha256 and sha256.hexdigest() != file.sha256:
            raise _differs(file, "the SHA-256 of this file")

    def _keep(self, view: memoryview) -> None:
        """Write bytes behind those that have come, as soon as there is room."""
        done, size = 0, self.limit
        with self._change:
            while self._head + len(view) - self._tail > size and not self._stopped:
                self._change.wait()
            while done < len(view):
                if self._stopped or self._file is None:
                    raise SourceError("was stopped")
                place = (self._head + done) % size
                part = view[done : done + min(len(view) - done, size - place)]
                with guarded(OutputError, "the temporary file beside the output"):
                    done += self._disk.write(part, place)
            self._head += done
            self._change.notify_all()


class HubPlace:
    """Where the files of a snapshot are: in the cache of the Hub those that lie whole there, else on the Hub."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.name, self._files = f"hf://{snapshot.repository}@{snapshot.commit}", snapshot.files
        how = f"`hf download {snapshot.repository} --local-dir DIR`, then `rac pack DIR --allow-pickle-weights`"
        self.refusal = f"holds pickled weights alone, which are not read from the Hub: {how}"
        self.tape, self._content = HubTape(), dict[str, bytes]()
        self.sha256: dict[str, str] = {}
        """SHA-256 of the files that were asked for."""

    def path(self, file: str) -> str:
        """Its address."""
        return self._files[file].url

    def size(self, file: str) -> int:
        """Its bytes, as the Hub lists them."""
        return self._files[file].size

    def fetch(self, files: Sequence[str]) -> None:
        """Read files that git itself holds, several at once: only from their bytes follows their SHA-256."""
        small = [f for f in files if self._files[f].sha256 is None]
        held = sum(map(self.size, small)) <= HELD
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name, data in zip(small, pool.map(self.content, small), strict=True):
                if held:
                    self._content[name] = data

    def content(self, file: str) -> bytes:
        """All bytes of a file, checked; ChangedError where they are not those that the Hub lists."""
        if file in self._content:
            return self._content[file]
        f = self._files[file]
        access = f.open()
        try:
            data = access_read(access, 0, access.size)
        finally:
            access.close()
        name = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        sha256 = hashlib.sha256(data).hexdigest()
        if name != f.blob if f.blob else sha256 != f.sha256:
            raise _differs(f, "its content")
        self.sha256[file] = sha256
        return data

    def data(self, file: str, at: int, size: int) -> Extent | bytes:
        """Some bytes of a file, to be read later."""
        if file in self._content:
            return self._content[file][at : at + size]
        f = self._files[file]
        if f.sha256:
            self.sha256[file] = f.sha256
        return Extent(path, at, size) if (path := self._cached(f)) else HubExtent(f.url, at, size, f, self.tape)

    def weights(self, file: str, extra: dict[str, Any] | None) -> tuple[list[SourceTensor], dict[str, str], bytes]:
        """What a safetensors file holds."""
        f = self._files[file]
        if f.sha256:
            self.sha256[file] = f.sha256
        if path := self._cached(f):
            return safetensors.read(path, extra)
        self.tape.files.append(f)
        access = self.tape.access(f)
        start = access_read(access, 0, min(f.size, START))
        end = 8 + safetensors.header_size(start[:8], f.size, f.url)
        front = start[:end] if end <= len(start) else access_read(access, 0, end)
        return safetensors.parse(front, f.size, f.url, lambda at, n: HubExtent(f.url, at, n, f, self.tape), extra)

    def _cached(self, f: HubFile) -> str | None:
        """Path of a file in the cache, whose SHA-256 is compared."""
        path = f.cached
        if path and f.sha256 and hash_file(path) != f.sha256:
            raise ChangedError("the Hub lists other bytes than this file of its cache has; delete it", file=path)
        return path


def read(where: Address, all_files: bool = False) -> Source:
    """A repository of the Hub; SourceError where it is not there, cannot be read, or holds no model."""
    snapshot = _snapshot(where)
    place, tree = HubPlace(snapshot), hf.Tree(files=sorted(snapshot.files))
    place.fetch([f for f in tree.files if place.size(f) <= hf.MAX_ATTACHMENT and not f.endswith(".safetensors")])
    source = hf.assemble(place, tree, all_files)
    return replace(source, hub=_origin(snapshot), sha256=dict(sorted(place.sha256.items())), tape=place.tape)


def _snapshot(where: Address) -> Snapshot:
    """What the Hub lists; UnreachableError, which names what the cache has, where it cannot be asked."""
    try:
        return Snapshot.of(where)
    except UnreachableError as e:
        if there := cached_snapshot(where):
            raise UnreachableError(f"{e.message}; its cache has {there}, which can be packed", file=e.file) from e
        raise


def _origin(snapshot: Snapshot) -> dict[str, str]:
    return {"repository": snapshot.repository, "revision": snapshot.commit}


@contextlib.contextmanager
def downloaded(where: Address, beside: str, note: Note) -> Iterator[tuple[str, Source]]:
    """A temporary folder beside a path with the files of a repository that are packed, and a source without tensors.

    The source states what the provenance is to. Files of the cache are linked.
    """
    snapshot = _snapshot(where)
    folder = tempfile.mkdtemp(prefix=".rac-", suffix=".download", dir=os.path.dirname(os.path.abspath(beside)))
    sha256 = {}
    try:
        wanted = [
            f for n, f in sorted(snapshot.files.items()) if f.size <= hf.MAX_ATTACHMENT or n.lower().endswith(_WEIGHTS)
        ]
        for i, f in enumerate(wanted):
            note("downloading files to a temporary folder", i, len(wanted))
            path = os.path.join(folder, *safe_name(f.name).split("/"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            sha256[f.name] = _download(f, path)
        skipped = tuple(sorted(snapshot.files.keys() - sha256.keys()))
        yield folder, Source("hf", (), (), {}, skipped, hub=_origin(snapshot), sha256=sha256)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(file: HubFile, path: str) -> str:
    """Write a file; returns its SHA-256."""
    if cached := file.cached:
        system.link(cached, path)
        found = hash_file(path)
    else:
        access, sha256 = file.open(), hashlib.sha256()
        feed = RangeRing(access, [(0, file.size)] if file.size else [], RING)
        with contextlib.closing(feed), guarded(OutputError, path), open(path, "wb") as out:
            while len((taken := feed.take(PIECE))[0]):
                sha256.update(taken[0])
                out.write(taken[0])
                if taken[1]:
                    taken[1].give()
        access.close()
        found = sha256.hexdigest()
    if file.sha256 not in (None, found):
        raise _differs(file, "its SHA-256")
    return found


_WEIGHTS = ".safetensors"
_SNAPSHOT = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$")


def of_cache(folder: str, source: Source) -> Source:
    """A source out of a snapshot of the Hub's cache states repository, commit, and the SHA-256 of its files.

    ChangedError where that is not the one by which the cache calls a file.
    """
    match = _SNAPSHOT.search(os.path.abspath(folder).replace(os.sep, "/"))
    if not match:
        return source
    sha256 = {}
    left = {piece.rsplit("/", 1)[0] if piece.rsplit("/", 1)[0] in source.pieces else piece for piece in names(source)}
    for file in sorted({*source.headers, *left}):
        path = os.path.join(folder, file)
        sha256[file] = hash_file(path)
        name = os.path.basename(os.path.realpath(path))
        if len(name) == len(sha256[file]) and name != sha256[file]:
            raise ChangedError("is not the file that the Hub's cache takes it for; download it again", file=path)
    return replace(source, hub={"repository": f"{match[1]}/{match[2]}", "revision": match[3]}, sha256=sha256)


def names(source: Source) -> list[str]:
    """Names of the attachments."""
    return [a.name for a in source.attachments]
