"""Tensors that are stored once: ties (one memory) and exact duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rac.container import zstd
from rac.encode.sources import Extent, SourceTensor
from rac.errors import SourceError
from rac.records import Online

PIECE = 1 << 22
SAMPLE = 4096
AT_ONCE = 16  # samples of remote tensors that are fetched at once


@dataclass(frozen=True, slots=True)
class Group:
    """A tensor and the other names of its content."""

    tensor: SourceTensor
    aliases: tuple[tuple[str, bool], ...]
    extra: dict[str, Any]
    """Fields of the record head: what the tensor carries, and under "aliases" what others carry that differs."""


def digest(t: SourceTensor) -> bytes:
    """XXH3-128 of a tensor's bytes, read piece by piece."""
    d = zstd.Digest()
    for a in range(0, t.nbytes, PIECE):
        d.update(t.read(a, min(t.nbytes, a + PIECE)).data)
    return d.value()


def _samples(tensors: Mapping[int, SourceTensor], first: bool) -> dict[int, bytes]:
    """A few KiB of the `first` place of each, or of two others: most unequal ones differ there, and need no more."""

    def sample(t: SourceTensor) -> bytes:
        at = [0] if first else sorted({max(0, (t.nbytes - SAMPLE) // 2), max(0, t.nbytes - SAMPLE)} - {0})
        return b"".join(t.read(a, min(t.nbytes, a + SAMPLE)).tobytes() for a in at)

    if not any(isinstance(t.data, Extent) and t.data.pinned for t in tensors.values()):
        return {i: sample(t) for i, t in tensors.items()}
    with ThreadPoolExecutor(AT_ONCE) as pool:  # far away: waiting is most of it
        return dict(zip(tensors, pool.map(sample, tensors.values()), strict=True))


def _close(tensors: Sequence[SourceTensor], groups: list[list[int]], first: bool) -> list[list[int]]:
    """Groups of several tensors, by their numbers, parted by their samples."""
    samples = _samples({i: tensors[i] for members in groups if len(members) > 1 for i in members}, first)
    out: list[list[int]] = []
    for members in groups:
        by_sample: dict[bytes, list[int]] = {}
        for i in members if len(members) > 1 else []:
            by_sample.setdefault(samples[i], []).append(i)
        out += by_sample.values()
    return [close for close in out if len(close) > 1]


def find(tensors: Sequence[SourceTensor]) -> list[Group]:
    """Groups in the order of their first tensors. Empty tensors are on their own."""
    owner: dict[int, tuple[int, bool]] = {}
    """Tensors that are stored with another, which that is, and whether they are tied to it."""
    by_tie: dict[int, int] = {}
    same: dict[tuple[str, tuple[int, ...], Online | None], list[int]] = {}
    uses: Counter[int | None] = Counter(t.tie for t in tensors if t.tie is not None)
    for i, t in enumerate(tensors):
        first = i if t.tie is None else by_tie.setdefault(t.tie, i)
        if first != i:
            if t.online != tensors[first].online:
                raise SourceError(f"tensor {t.name!r} and one that is tied to it have different online transforms")
            owner[i] = first, True
        elif t.nbytes:
            same.setdefault((t.dtype, t.shape, t.online), []).append(i)
    for close in _close(tensors, _close(tensors, [*same.values()], True), False):
        by_digest: dict[bytes, int] = {}
        for i in close:
            j = by_digest.setdefault(digest(tensors[i]), i)
            # A duplicate that others are tied to keeps a record, or they could not be tied again.
            if j != i and uses[tensors[i].tie] < 2:
                owner[i] = j, False
    aliases: dict[int, list[tuple[str, bool]]] = {}
    others: dict[int, dict[str, Any]] = {}
    for i, (root, tied) in sorted(owner.items()):
        aliases.setdefault(root, []).append((tensors[i].name, tied))
        if tensors[i].extra != tensors[root].extra:
            others.setdefault(root, {})[tensors[i].name] = tensors[i].extra or {}
    return [
        Group(t, tuple(aliases.get(i, ())), (t.extra or {}) | ({"aliases": others[i]} if i in others else {}))
        for i, t in enumerate(tensors)
        if i not in owner
    ]
