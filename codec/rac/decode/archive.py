"""Random access, the reading side of the public interface: `open`, `load_file`, `load`."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from rac import frameworks
from rac.container.access import Access, BytesAccess, FileAccess, InFile, NoRangesError, ObjectAccess, guarded
from rac.container.access import read as access_read
from rac.container.feed import Trace
from rac.container.reader import Archive
from rac.decode import random
from rac.decode.attachments import attachment_bytes, attachment_units
from rac.decode.engine import RING, Damaged
from rac.decode.gpu import engine_for
from rac.decode.slices import Slice
from rac.errors import DamagedError, FormatError, NameNotFoundError, SourceError
from rac.linalg.transform import Transform
from rac.machine import threads_of
from rac.records import Entry, Limits, Stated
from rac.registry import RECORD_ATTACHMENT, RECORD_OBJECT, RECORD_TENSOR
from rac.stages.table import is_quantised
from rac.tensor import Tensor

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.rac$")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://")  # fsspec has chains: simplecache::https://


def open_access(path: str) -> Access:
    """A local file, or what a URL names."""
    if path.startswith("hf://"):
        from rac.container import hub

        return hub.open_file(path)
    if _URL.match(path):
        from rac.container.remote import open_url

        return open_url(path)
    return FileAccess(path)


def of_repository(path: str | os.PathLike[str], keep: bool = False) -> str:
    """The path; where it names a repository of the Hub, the URL of the archive in it.

    With `keep` its place in the Hub's cache, where it is downloaded to.
    """
    name = os.fspath(path)
    if not os.path.lexists(name):
        from rac.container import hub  # imports more than a local path needs

        if (where := hub.address(name)) and not where.file:
            return hub.archive_of(where, keep)
    return name


def open_archives(path: str | os.PathLike[str], limits: Limits | None = None) -> list[Archive]:
    """The archive at `path`, or all shards of its set; `path` may be a folder of one set, or a repository."""
    name = of_repository(path)
    if os.path.isdir(name):
        found = sorted(f for f in os.listdir(name) if f.endswith(".rac"))
        first = [f for f in found if not (m := _SHARD.search(f)) or int(m[1]) == 1]
        if len(first) != 1:
            other = "; folders of models are for from_pretrained of transformers, after `import rac.runtime`"
            other = other if not first and os.path.isfile(os.path.join(name, "config.json")) else ""
            raise SourceError(f"{len(first)} archives in this folder; name the .rac file{other}", file=name)
        name = os.path.join(name, first[0])
    out = [Archive(open_access(name), limits)]
    try:
        k, n = out[0].header.get("shard", [1, 1])
        match = _SHARD.search(name)
        if n > 1 and (not match or (int(match[1]), int(match[2])) != (k, n)):
            raise SourceError(f"is shard {k} of {n}; its name must end in -{k:05d}-of-{n:05d}.rac", file=name)
        for i in range(1, n + 1):
            if i != k and match:
                part = name[: match.start()] + f"-{i:05d}-of-{n:05d}.rac"
                out.append(Archive(open_access(part), limits))
                if out[-1].header.get("shard") != [i, n]:
                    raise FormatError(f"is not shard {i} of {n}", file=part)
    except BaseException:
        for archive in out:
            archive.close()
        raise
    out.sort(key=lambda archive: archive.header.get("shard", [1, 1]))
    return out


class RacFile(AbstractContextManager["RacFile"]):
    """An open archive, used like `safetensors.safe_open`.

    Args:
        path: A .rac file, one shard of a set (the others are found beside it), or a folder that holds one; a URL;
            bytes, or a file object that can seek. Copies and pickles of the open file open it again by its path.
        framework: "np" for numpy arrays, "pt" for torch tensors; numpy by default, torch for a device.
        device: Where torch tensors go; "cuda" decodes whole tensors there where its kernels can be used.
        threads: Threads that decode; one per core up to 8 by default.
        limits: What to accept.
        ring: Bytes that may be held beyond the tensors: half for what is read ahead, half for tensors in work.
        trace: Called with what is done when: "read", "copy" or "decode", start, end (time.monotonic), bytes.

    Raises:
        RacError: The file is missing, damaged, or needs a newer version.
    """

    def __init__(
        self,
        path: Any,
        framework: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
        limits: Limits | None = None,
        ring: int = RING,
        trace: Trace | None = None,
    ) -> None:
        self._framework, self._device = frameworks.default(framework, device), device
        frameworks.check(self._framework, device)
        self._damaged: Damaged = {}
        self._trace = trace
        self._engines = {
            on_error: engine_for(device, threads_of(threads), ring, damaged, trace)
            for on_error, damaged in (("raise", None), ("report", self._damaged))
        }
        self._settings = framework, device, threads, limits, ring, trace
        if isinstance(path, list):  # of archives: what `__reduce__` gives
            self.archives: list[Archive] = path
        elif isinstance(path, str | os.PathLike):
            self.archives = open_archives(path, limits)
        else:
            self.archives = [Archive(access_of(path), limits)]
        try:
            self._tensors = self._named("tensor", RECORD_TENSOR)
            self._files = self._named("attachment", RECORD_ATTACHMENT)
        except BaseException:
            self.close()
            raise

    def _named(self, what: str, kind: int) -> dict[str, tuple[Archive, Entry]]:
        """Where everything of a kind is, by each of its names; FormatError where one is in two shards."""
        out: dict[str, tuple[Archive, Entry]] = {}
        rows = [(archive, e) for archive in self.archives for e in archive.index.entries if e.type == kind]
        for archive, e in rows:
            for name in (e.name, *(a for a, _ in e.aliases)):
                if name in out:
                    raise FormatError(f"{what} {name!r} is in two shards", file=archive.access.name)
                out[name] = archive, e
        return out

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles open the files again."""
        return RacFile, (self.archives, *self._settings)

    def close(self) -> None:
        """Close the files."""
        for archive in self.archives:
            archive.close()

    def keys(self) -> list[str]:
        """Names of all tensors, ties and duplicates included."""
        return list(self._tensors)

    def metadata(self) -> dict[str, str]:
        """Text to text, as the source had it."""
        return dict(self.archives[0].header.get("metadata", {}))

    @property
    def lossy(self) -> bool:
        """Whether any tensor was quantised: what comes back of it is near what was packed, not equal to it."""
        return any(e.type == RECORD_TENSOR and is_quantised(e.method) for a in self.archives for e in a.index.entries)

    def attachments(self) -> list[str]:
        """Names of the files that travel along."""
        return list(self._files)

    def attachment(self, name: str) -> bytes:
        """Content of an attached file; NameNotFoundError where it is not there."""
        archive, entry = self._find(self._files, name, "attachment")
        record = archive.record(entry)
        with InFile(archive.access.name, repr(name)):
            units = attachment_units(record, archive.limits)
            data = access_read(archive.access, record.payload, record.end - record.payload)
            if any(data[units[0].size :]):
                raise FormatError("padding is not zero", offset=record.payload + units[0].size)
            return attachment_bytes(record, data[: units[0].size])

    def _find(self, where: dict[str, tuple[Archive, Entry]], name: str, what: str) -> tuple[Archive, Entry]:
        if name not in where:
            raise NameNotFoundError(f"holds no {what} {name!r}", file=self.archives[0].access.name)
        return where[name]

    def get_tensor(self, name: str) -> Any:
        """A whole tensor; NameNotFoundError where it is not there, FormatError where it is damaged."""
        return self.read(name)[1]

    def read(self, name: str) -> tuple[Tensor, Any]:
        """What the record of a tensor states, and the whole tensor."""
        archive, entry = self._find(self._tensors, name, "tensor")
        out: dict[str, Any] = {}
        ((stated, value),) = random.load(archive, [entry], self._engines["raise"])
        frameworks.put(replace(stated, aliases=()), value, self._framework, self._device, out)
        return stated, out[stated.name]

    def online(self, name: str) -> Transform | None:
        """What the layer of a weight does to its input before it (format_spec/stages/online.md); None: nothing.

        With `t = f.online(name)` the layer computes `f.get_tensor(name) @ t.apply(x)`; `t.fold` gives the weight of a
        layer without it. Reads the head of the record, and an object where there is one.
        """
        return random.transform(*self._parsed(name))

    def get_slice(self, name: str) -> Slice:
        """A lazy view: `f.get_slice(n)[10:20, :]` reads and decodes only the tiles that it needs."""
        return Slice(*self._parsed(name), self._framework, self._device)

    def _parsed(self, name: str) -> tuple[Archive, Tensor]:
        archive, entry = self._find(self._tensors, name, "tensor")
        record = archive.record(entry)
        with InFile(archive.access.name, repr(name)):
            return archive, random.parse(archive, record)

    @property
    def decoder(self) -> str:
        """What decodes whole tensors; slices are decoded on the CPU."""
        return self._engines["raise"].name

    def load(self, done: Callable[[Stated], None] | None = None, on_error: str = "raise") -> dict[str, Any]:
        """All tensors by name. Tied tensors are one object, equal ones are copies.

        `on_error="report"` looks at all of them before it raises DamagedError, which names those that are damaged.
        """
        if on_error not in self._engines:
            raise ValueError(f"on_error must be 'raise' or 'report', not {on_error!r}")
        engine, out = self._engines[on_error], dict[str, Any]()
        self._damaged.clear()
        for archive in self.archives:
            entries = [e for e in archive.index.entries if e.type in (RECORD_TENSOR, RECORD_OBJECT)]
            for t, value in random.whole(archive, entries, engine, done):
                if t.type == RECORD_TENSOR:
                    start = time.monotonic()
                    frameworks.put(t, value, self._framework, self._device, out)
                    if self._trace and self._device != "cpu" and isinstance(value, np.ndarray):
                        self._trace("copy", start, time.monotonic(), t.nbytes)
        if self._damaged:
            raise DamagedError(self._damaged, file=self.archives[0].access.name)
        return {name: out[name] for name in self._tensors}


def access_of(source: Any) -> Access:
    """Bytes (or a mapped file), a file object that can seek, or an Access, as an Access; SourceError for others."""
    if hasattr(source, "read_into"):
        return source  # type: ignore[no-any-return]
    with contextlib.suppress(TypeError), guarded(SourceError, "<bytes>", of=ValueError):  # no buffer; a closed map
        return BytesAccess(memoryview(source))
    name = str(getattr(source, "name", None) or "<file object>")
    with guarded(SourceError, name, of=ValueError):  # closed
        if not hasattr(source, "seek") or not getattr(source, "seekable", lambda: True)():
            where = "; a path is for load_file" if isinstance(source, str) else "; read it with rac.stream"
            raise SourceError(f"a {type(source).__name__} cannot seek{where}")
    return ObjectAccess(source)


def load_file(
    path: Any,
    device: str = "cpu",
    framework: str | None = None,
    threads: int | None = None,
    on_error: str = "raise",
    ring: int = RING,
) -> dict[str, Any]:
    """All tensors of an archive (or of a set of shards), from a path or a URL.

    numpy arrays by default; torch tensors with framework="pt" or where `device` is not the CPU, "cuda" for example.
    `on_error="report"` looks at all tensors before it raises DamagedError. `ring` is the memory beside the tensors.
    What a server without ranges has is read from front to back, as `stream` does.

    Raises:
        RacError: The file is missing, damaged, or needs a newer version.
    """
    try:
        with RacFile(path, framework, device, threads, ring=ring) as f:
            return f.load(on_error=on_error)
    except NoRangesError:
        from rac.decode.stream import load_forward  # which imports this

        how = {"framework": framework, "device": device, "threads": threads, "ring": ring, "on_error": on_error}
        return load_forward(shards_of(os.fspath(path)), **how)


def shards_of(name: str) -> list[str]:
    """Names of all shards of the set that one of them is named for; itself where it is no shard's."""
    match = _SHARD.search(name)
    n = int(match[2]) if match else 1
    return [f"{name[: match.start()]}-{i:05d}-of-{n:05d}.rac" for i in range(1, n + 1)] if match else [name]


def load(data: Any, device: str = "cpu", framework: str | None = None) -> dict[str, Any]:
    """All tensors of an archive that is in memory, or behind a file object that can seek; as `load_file`."""
    return load_file(access_of(data), device, framework)
