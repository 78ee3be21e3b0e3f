"""Checking an archive whole, alone or against its source."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rac.container import zstd
from rac.container.feed import Feed, RangeRing, StreamRing
from rac.container.forward import Forward, entries_by_name
from rac.container.index import content_digest
from rac.decode.archive import open_archives
from rac.decode.attachments import forward_attachment
from rac.decode.engine import RING
from rac.decode.stream import Found, forward_tensors
from rac.encode import ties
from rac.encode.sources import Source, SourceTensor, open_source
from rac.errors import ChecksumError, FormatError, MismatchError
from rac.machine import threads_of
from rac.provenance import Provenance
from rac.records import Record
from rac.registry import RECORD_OBJECT
from rac.stages.words import from_words
from rac.tensor import check_digest, extra_of

Progress = Callable[[str, int], None]


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


@dataclass
class _Seen:
    """Names to (dtype, shape, digest), and attachments to digests, of all shards."""

    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]
    files: dict[str, bytes]
    metadata: dict[str, str]
    extra: dict[str, dict[str, Any]]
    dense: int = 0
    digest: bytes = b""
    lossy: set[str] = field(default_factory=set)
    energy: float = 0.0
    error: float = 0.0
    source: Source | None = None
    theirs: dict[str, SourceTensor] = field(default_factory=dict)


def verify(
    path: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> Verified:
    """Check every byte, decode everything, compare each digest; with `against`, compare with a source too.

    `path` may be "-" for standard input. Tensors that the archive was told to leave out are not missed. A quantised
    tensor must have the type and shape of the source; its error is measured.

    Raises:
        FormatError: The archive is damaged; its subclass and message say how and where.
        MismatchError: It is whole, but not equal to the source.
    """
    seen = _Seen({}, {}, {}, {})
    name = os.fspath(path)
    if name == "-":
        _one(StreamRing(sys.stdin.buffer, "<stdin>", RING // 2), seen, against, progress)
    else:
        archives = open_archives(name)
        try:
            for archive in archives:
                whole = [(0, archive.access.size)]
                _one(RangeRing(archive.access, whole, RING // 2), seen, against, progress)
        finally:
            for archive in archives:
                archive.close()
    if seen.source is not None:
        _compare(seen, seen.source, name)
    snr = 10 * math.log10(seen.energy / seen.error) if seen.error and seen.energy else None
    return Verified(len(seen.tensors), len(seen.files), seen.dense, seen.digest, len(seen.lossy), snr)


def _one(feed: Feed, seen: _Seen, against: str | os.PathLike[str] | None, progress: Progress | None) -> None:
    try:
        _records(Forward(feed, feed.name), feed.name, seen, against, progress)
    finally:
        feed.close()


def _records(
    forward: Forward, name: str, seen: _Seen, against: str | os.PathLike[str] | None, progress: Progress | None
) -> None:
    if against is not None and seen.source is None:
        origin = Provenance.of(forward.header, name)
        seen.source = open_source(against, origin.include, origin.exclude)
        seen.theirs = {t.name: t for t in seen.source.tensors}
    content: list[list[Any]] = []
    parts: dict[str, tuple[int, ...]] = {}
    object_parts: dict[str, tuple[int, ...]] = {}

    def attachment(record: Record) -> None:
        data = forward_attachment(forward, record)
        if record.head["name"] in seen.files:
            raise FormatError("attachment is there twice", file=name, unit=repr(record.head["name"]), offset=record.at)
        seen.files[record.head["name"]] = zstd.digest(data)

    def of_object(found: Found) -> None:
        check_digest(*found[:2])
        object_parts[found[0].name] = found[2]

    for t, words, of_kind in forward_tensors(forward, attachment, of_object=of_object, threads=threads_of(None)):
        check_digest(t, words)
        parts[t.name] = of_kind
        for n in (t.name, *(a for a, _ in t.aliases)):
            if n in seen.tensors:
                raise FormatError("tensor is there twice", file=name, unit=repr(n), offset=t.record.at)
            seen.tensors[n] = (t.dtype, t.shape, t.digest)
            seen.extra[n] = extra_of(t.extra, n)
            content.append([n, t.dtype, list(t.shape), t.digest])
            seen.dense += t.nbytes
            if t.quantised:
                seen.lossy.add(n)
        if t.quantised and (original := seen.theirs.get(t.name)) and original.nbytes == t.nbytes:
            a = from_words(original.read(0, original.nbytes).view(words.dtype), t.dtype).astype(np.float64)
            b = from_words(words.reshape(-1), t.dtype).astype(np.float64)
            seen.energy += float(a @ a)
            seen.error += float((a - b) @ (a - b))
        if progress:
            progress(t.name, t.nbytes)
    digest = content_digest(content)
    index = forward.index
    if index is None or index.digest != digest:
        raise ChecksumError("the content digest of the index does not match", file=name, unit="index")
    stated = [(e, parts) for n, e in entries_by_name(index).items() if e.name == n]
    stated += [(e, object_parts) for e in index.entries if e.type == RECORD_OBJECT]
    for entry, found in stated:
        if entry.parts != found[entry.name]:
            raise FormatError("the index states wrong parts", file=name, unit=repr(entry.name), offset=entry.at)
    seen.metadata = forward.header.get("metadata", {}) or seen.metadata
    seen.digest = digest


def _compare(seen: _Seen, source: Source, name: str) -> None:
    theirs = seen.theirs
    if missing := theirs.keys() - seen.tensors.keys():
        raise MismatchError(f"{len(missing)} tensors are missing, one is {min(missing)!r}", file=name)
    if more := seen.tensors.keys() - theirs.keys():
        raise MismatchError(f"{len(more)} tensors are not in the source, one is {min(more)!r}", file=name)
    for n, t in theirs.items():
        dtype, shape, digest = seen.tensors[n]
        if (dtype, shape) != (t.dtype, t.shape):
            raise MismatchError(
                f"is {dtype} {list(shape)}, the source has {t.dtype} {list(t.shape)}", file=name, unit=repr(n)
            )
        if n in seen.lossy:
            continue
        if ties.digest(t) != digest or seen.extra[n] != (t.extra or {}):
            raise MismatchError("differs from the source", file=name, unit=repr(n))
    files = {a.name: zstd.digest(a.read()) for a in source.attachments}
    if files != seen.files:
        other = min(k for k in files.keys() | seen.files.keys() if files.get(k) != seen.files.get(k))
        raise MismatchError("attachment differs from the source", file=name, unit=repr(other))
    if source.metadata != seen.metadata:
        raise MismatchError("metadata differs from the source", file=name, unit="metadata")
