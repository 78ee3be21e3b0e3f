"""Tensors that are stored once: ties (one memory) and exact duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rac.container import zstd
from rac.encode.sources import SourceTensor
from rac.errors import SourceError
from rac.records import Online

PIECE = 1 << 22
SAMPLE = 4096


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
    for members in same.values():
        by_sample: dict[bytes, list[int]] = {}
        for i in members if len(members) > 1 else []:
            t = tensors[i]  # most unequal ones differ in a few KiB of three places, and need not be read whole
            at = sorted({0, max(0, (t.nbytes - SAMPLE) // 2), max(0, t.nbytes - SAMPLE)})
            sample = b"".join(t.read(a, min(t.nbytes, a + SAMPLE)).tobytes() for a in at)
            by_sample.setdefault(sample, []).append(i)
        for close in by_sample.values():
            by_digest: dict[bytes, int] = {}
            for i in close if len(close) > 1 else []:
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
