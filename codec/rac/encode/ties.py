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


def _sample(t: SourceTensor) -> bytes:
    """A few KiB of three places: most unequal tensors differ there, and need not be read whole."""
    at = sorted({0, max(0, (t.nbytes - SAMPLE) // 2), max(0, t.nbytes - SAMPLE)})
    return b"".join(t.read(a, min(t.nbytes, a + SAMPLE)).tobytes() for a in at)


def find(tensors: Sequence[SourceTensor]) -> list[Group]:
    """Groups in the order of their first tensors. Empty tensors are on their own."""
    owner: dict[int, int] = {}
    tied: dict[int, bool] = {}
    by_tie: dict[int, int] = {}
    same: dict[tuple[str, tuple[int, ...], Online | None], list[int]] = {}
    uses: Counter[int | None] = Counter(t.tie for t in tensors if t.tie is not None)
    for i, t in enumerate(tensors):
        if t.tie is not None and t.tie in by_tie:
            if t.online != tensors[by_tie[t.tie]].online:
                raise SourceError(f"tensor {t.name!r} and one that is tied to it have different online transforms")
            owner[i], tied[i] = by_tie[t.tie], True
            continue
        if t.tie is not None:
            by_tie[t.tie] = i
        if t.nbytes:
            same.setdefault((t.dtype, t.shape, t.online), []).append(i)
    for _, members in same.items():
        if len(members) == 1:
            continue
        by_sample: dict[bytes, list[int]] = {}
        for i in members:
            by_sample.setdefault(_sample(tensors[i]), []).append(i)
        for close in by_sample.values():
            first: dict[bytes, int] = {}
            for i in close if len(close) > 1 else []:
                j = first.setdefault(digest(tensors[i]), i)
                # A duplicate that others are tied to keeps a record, or they could not be tied again.
                if j != i and uses.get(tensors[i].tie, 0) < 2:
                    owner[i], tied[i] = j, False
    aliases: dict[int, list[tuple[str, bool]]] = {}
    others: dict[int, dict[str, Any]] = {}
    for i in sorted(owner):
        root = owner[i]
        aliases.setdefault(root, []).append((tensors[i].name, tied[i]))
        if tensors[i].extra != tensors[root].extra:
            others.setdefault(root, {})[tensors[i].name] = tensors[i].extra or {}
    return [
        Group(t, tuple(aliases.get(i, ())), (t.extra or {}) | ({"aliases": others[i]} if i in others else {}))
        for i, t in enumerate(tensors)
        if i not in owner
    ]
