"""Checking an archive whole, alone or against its source."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rac.container import zstd
from rac.container.access import NoRangesError
from rac.container.feed import Feed, RangeRing
from rac.container.forward import Forward, entries_by_name
from rac.container.index import content_digest
from rac.container.reader import Archive
from rac.decode.archive import RacFile, open_archives
from rac.decode.attachments import forward_attachment
from rac.decode.digests import files_of
from rac.decode.engine import RING
from rac.decode.stream import Found, forward_tensors, open_feed
from rac.decode.unpack import usual_headers
from rac.encode import ties
from rac.encode.options import Progress
from rac.encode.sources import Source, SourceTensor, open_source
from rac.errors import ChecksumError, FormatError, MismatchError, SourceError
from rac.machine import threads_of
from rac.provenance import Provenance, frame_name, header_name
from rac.records import Record
from rac.registry import RECORD_OBJECT
from rac.stages.words import from_words
from rac.tensor import check_digest, extra_of


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked."""

    tensors: int
    attachments: int
    dense: int
    digest: bytes
    lossy: int = 0
    """Tensors that were quantised."""
    snr: float | None = None
    """Signal to noise of these against the source, in dB over all; None where there is no source or no error."""
    files: int = 0
    """Files whose SHA-256 is the one that the archive, or the Hub, states."""
    hub: str = ""
    """Repository and commit of the Hub whose files these were compared with."""
    others: tuple[str, ...] = ()
    """Files of the Hub that were not compared: not packed, or their tensors quantised."""
    dequantised: tuple[str, ...] = ()
    """What the weights of the source are stored as, where the tensors were compared with what these stand for."""
    tuned: int = 0
    """Vectors, stored losslessly, that recovery has changed before."""


@dataclass
class _Check:
    """What is checked, and what was found of it in all shards so far."""

    against: str | os.PathLike[str] | None
    progress: Progress | None
    pickles: bool = False
    tensors: dict[str, tuple[str, tuple[int, ...], bytes, dict[str, Any]]] = field(default_factory=dict)
    """Names to (dtype, shape, digest, what else is stated)."""
    files: dict[str, bytes] = field(default_factory=dict)  # attachments to digests
    metadata: dict[str, str] = field(default_factory=dict)
    dense: int = 0
    digest: bytes = b""
    lossy: set[str] = field(default_factory=set)
    tuned: dict[str, bytes] = field(default_factory=dict)  # names of vectors to the digests that they had in the source
    energy: float = 0.0
    error: float = 0.0
    source: Source | None = None
    theirs: dict[str, SourceTensor] = field(default_factory=dict)

    def read(self, feed: Feed) -> None:
        """Check one archive."""
        with contextlib.closing(feed):
            self._records(Forward(feed, feed.name), feed.name)

    def _records(self, forward: Forward, name: str) -> None:
        if self.against is not None and self.source is None:
            origin = Provenance.of(forward.header, name)
            how = {"dequantise": bool(origin.dequantised), "all_files": bool(origin.pieces), "pickles": self.pickles}
            self.source = open_source(self.against, origin.include, origin.exclude, **how)
            if origin.source != self.source.kind:  # there is no such file
                self.source = replace(self.source, headers={}, frames={})
            self.theirs = {t.name: t for t in self.source.tensors}
        content: list[list[Any]] = []
        parts: dict[str, tuple[int, ...]] = {}
        object_parts: dict[str, tuple[int, ...]] = {}

        def attachment(record: Record) -> None:
            data, file = forward_attachment(forward, record), record.head["name"]
            if file in self.files:
                raise FormatError("attachment is there twice", file=name, unit=repr(file), offset=record.at)
            self.files[file] = zstd.digest(data)

        def of_object(found: Found) -> None:
            check_digest(*found[:2])
            object_parts[found[0].name] = found[2]

        for t, words, of_kind in forward_tensors(forward, attachment, of_object=of_object, threads=threads_of(None)):
            check_digest(t, words)
            parts[t.name] = of_kind
            for n in (t.name, *(a for a, _ in t.aliases)):
                if n in self.tensors:
                    raise FormatError("tensor is there twice", file=name, unit=repr(n), offset=t.record.at)
                self.tensors[n] = (t.dtype, t.shape, t.digest, extra_of(t.extra, n))
                content.append([n, t.dtype, list(t.shape), t.digest])
                self.dense += t.nbytes
                if t.quantised:
                    self.lossy.add(n)
                elif isinstance(before := t.record.head.get("x-source"), bytes):
                    self.tuned[n] = before
            if t.quantised and (original := self.theirs.get(t.name)) and original.nbytes == t.nbytes:
                a = from_words(original.read(0, original.nbytes).view(words.dtype), t.dtype).astype(np.float64)
                b = from_words(words.reshape(-1), t.dtype).astype(np.float64)
                self.energy += float(a @ a)
                self.error += float((a - b) @ (a - b))
            if self.progress:
                self.progress(t.name, t.nbytes)
        index, self.digest = forward.index, content_digest(content)
        if index is None or index.digest != self.digest:
            raise ChecksumError("the content digest of the index does not match", file=name, unit="index")
        stated = [(e, parts) for n, e in entries_by_name(index).items() if e.name == n]
        stated += [(e, object_parts) for e in index.entries if e.type == RECORD_OBJECT]
        for entry, found in stated:
            if entry.parts != found[entry.name]:
                raise FormatError("the index states wrong parts", file=name, unit=repr(entry.name), offset=entry.at)
        self.metadata = forward.header.get("metadata", {}) or self.metadata

    def compare(self, source: Source, name: str) -> None:
        """MismatchError unless all is equal to the source, but for what was quantised."""
        ours, theirs = self.tensors, self.theirs
        if missing := theirs.keys() - ours.keys():
            raise MismatchError(f"{len(missing)} tensors are missing, one is {min(missing)!r}", file=name)
        if more := ours.keys() - theirs.keys():
            raise MismatchError(f"{len(more)} tensors are not in the source, one is {min(more)!r}", file=name)
        for n, t in theirs.items():
            dtype, shape, digest, extra = ours[n]
            if (dtype, shape) != (t.dtype, t.shape):
                why = f"is {dtype} {list(shape)}, the source has {t.dtype} {list(t.shape)}"
                raise MismatchError(why, file=name, unit=repr(n))
            if n not in self.lossy and (ties.digest(t) != self.tuned.get(n, digest) or extra != (t.extra or {})):
                raise MismatchError("differs from the source", file=name, unit=repr(n))
        if source.metadata != self.metadata:
            raise MismatchError("metadata differs from the source", file=name, unit="metadata")
        files = {a.name: zstd.digest(a.read()) for a in source.attachments}
        files |= {frame_name(file): zstd.digest(frame) for file, frame in source.frames.items()}
        usual = usual_headers(((n, extra, d, s) for n, (d, s, _, extra) in ours.items()), self.metadata)
        for file, header in source.headers.items():
            if header_name(file) in self.files:
                files[header_name(file)] = zstd.digest(header)
            elif header != usual.get(file or "model.safetensors"):
                raise MismatchError("the header differs from that of the source", file=name, unit=repr(file))
        if files != self.files:
            other = min(k for k in files.keys() | self.files.keys() if files.get(k) != self.files.get(k))
            raise MismatchError("attachment differs from the source", file=name, unit=repr(other))


def _compare_files(archives: list[Archive], hub: bool, progress: Progress | None) -> tuple[int, str, tuple[str, ...]]:
    """Files that are as the archive states, or with `hub` as the Hub lists them; where it does; those not compared."""
    name, origin = archives[0].access.name, Provenance.of(archives[0].header, archives[0].access.name)
    want = {file or "model.safetensors": ("sha256", digest) for file, digest in origin.sha256.items()}
    where, by = "", "that was packed"
    if hub:
        if origin.hub is None:
            raise SourceError("states no repository of the Hub: it was not packed from one", file=name)
        from rac.container.hub import Address, Snapshot

        listed = Snapshot.of(Address(*origin.hub)).files
        want = {n: ("sha256", f.sha256) if f.sha256 else ("blob", str(f.blob)) for n, f in listed.items()}
        where, by = "@".join(origin.hub), "that the Hub lists"
    if not want:
        return 0, where, ()
    same, seen = 0, set[str]()
    rewritten = bool(origin.dequantised) or origin.transformed or not origin.whole
    with RacFile(archives) as f:
        for found in files_of(f, progress):
            if isinstance(found, str) or found.name not in want or (rewritten and found.weights):
                continue
            kind, digest = want[found.name]
            seen.add(found.name)
            if getattr(found, kind) != digest:
                raise MismatchError(f"is not the file {by}: another SHA-256", file=name, unit=repr(found.name))
            same += 1
    return same, where, tuple(sorted(want.keys() - seen)) if hub else ()


def verify(
    path: Any,
    against: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    pickles: bool = False,
    hub: bool = False,
) -> Verified:
    """Check every byte, decode everything, compare each digest; with `against`, compare with a source too.

    `path` is a path, a URL, bytes, or a file object, which is read forward; "-" is standard input. Tensors that the
    archive was told to leave out are not missed. A quantised tensor must have the type and shape of the source; its
    error is measured; `pickles` is as `pack` has it. Where the archive states the SHA-256 of its files, or with `hub`
    by what the Hub lists for its repository and commit, each file is put together once more and compared; not of a
    stream. FormatError where the archive is damaged, its subclass and message say how and where, MismatchError where it
    is whole, but not equal to the source.
    """
    seen, named = _Check(against, progress, pickles), isinstance(path, str | os.PathLike)
    name = os.fspath(path) if named else str(getattr(path, "name", None) or "<stream>")
    archives = []
    with contextlib.suppress(NoRangesError):  # it is read forward, as a pipe is
        archives = open_archives(name) if named and name != "-" else []
    files: tuple[int, str, tuple[str, ...]] = (0, "", ())
    try:
        for archive in archives:
            seen.read(RangeRing(archive.access, [(0, archive.access.size)], RING // 2))
        if archives:
            files = _compare_files(archives, hub, progress)
    finally:
        for archive in archives:
            archive.close()
    if not archives:
        if hub:
            raise SourceError("a stream goes by once: its files cannot be compared with the Hub's", file=name)
        feed, close = open_feed(sys.stdin.buffer if named and name == "-" else path, RING // 2)
        try:
            seen.read(feed)
        finally:
            close()
    if seen.source is not None:
        seen.compare(seen.source, name)
    snr = 10 * math.log10(seen.energy / seen.error) if seen.error and seen.energy else None
    found = Verified(len(seen.tensors), len(seen.files), seen.dense, seen.digest, len(seen.lossy), snr, *files)
    return replace(found, dequantised=seen.source.dequantised if seen.source else (), tuned=len(seen.tuned))
