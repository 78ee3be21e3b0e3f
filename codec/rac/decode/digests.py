"""SHA-256 of the files that an archive unpacks to, without writing them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rac.decode import random
from rac.decode.archive import RacFile
from rac.decode.unpack import File, names_of_files, planned
from rac.machine import threads_of
from rac.provenance import Provenance, piece_name
from rac.records import Entry
from rac.registry import RECORD_ATTACHMENT, RECORD_TENSOR
from rac.stages.table import is_quantised


@dataclass
class Digests:
    """The digests of one file while its bytes go by."""

    name: str
    size: int
    weights: bool = False  # whether it is made of tensors
    _sha256: Any = field(default_factory=hashlib.sha256)
    _blob: Any = field(init=False)

    def __post_init__(self) -> None:
        self._blob = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def update(self, data: Any) -> None:
        """More bytes."""
        self._sha256.update(data)
        self._blob.update(data)

    @property
    def sha256(self) -> str:
        """SHA-256, in hexadecimal."""
        return str(self._sha256.hexdigest())

    @property
    def blob(self) -> str:
        """The name that git has for such a file, in hexadecimal."""
        return str(self._blob.hexdigest())


def files_of(f: RacFile, done: Callable[[str, int], None] | None = None) -> Iterator[Digests | str]:
    """The digests of each file; only the name of a file some of whose tensors are quantised: it is another one.

    `done` is called with the name of each tensor that was decoded, and its bytes.
    """
    origin = Provenance.of(f.archives[0].header, f.archives[0].access.name)
    rows = {name: (a, e) for a in f.archives for e in a.index.entries if e.type == RECORD_TENSOR for name in e.names}
    for file in planned(f):
        order = sorted(file.places, key=lambda name: file.places[name])
        if any(is_quantised(rows[name][1].method) for name in order):
            yield file.name
        else:
            yield _digests(f, file, [rows[name] for name in order], done)
    for name in names_of_files(f):
        data = f.attachment(name)
        found = Digests(name, len(data))
        found.update(data)
        yield found
    for name, n in origin.pieces.items():
        pieces = [piece_name(name, i) for i in range(n)]
        found = Digests(name, sum(_size(f, piece) for piece in pieces))
        for piece in pieces:
            found.update(f.attachment(piece))
        yield found


def _size(f: RacFile, name: str) -> int:
    """Bytes of an attachment, as its head states them."""
    rows = ((a, e) for a in f.archives for e in a.index.entries if e.type == RECORD_ATTACHMENT and e.name == name)
    return sum(int(a.record(e).head["size"]) for a, e in rows)


def _digests(
    f: RacFile, file: File, rows: Sequence[tuple[Any, Entry]], done: Callable[[str, int], None] | None
) -> Digests:
    """The digests of a file whose tensors are these rows, in their order."""
    found, at = Digests(file.name, file.end, weights=True), len(file.head)
    found.update(file.head)
    places, around = sorted(file.places.values()), dict(file.around)
    threads = threads_of(None)
    for archive, some in groupby(rows, key=lambda row: row[0]):
        for t, words in random.load(archive, [e for _, e in some], threads):
            start, size = places.pop(0)
            found.update(around.get(at, b"") or bytes(start - at))  # between tensors of a GGUF file lie zeros
            found.update(words.data.cast("B") if words.size else b"")
            at = start + size
            if done:
                done(t.name, t.nbytes)
    found.update(around.get(at, b"") or bytes(file.end - at))
    return found
