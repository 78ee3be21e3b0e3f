"""Frozen records: what an archive states. No behaviour beyond arithmetic on their own fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader accepts before it has seen the bytes (format_spec/security.md)."""

    header: int = 16 << 20
    head: int = 64 << 20
    index: int = 256 << 20
    rank: int = 64
    free_alloc: int = 64 << 20
    expansion: int = 65536
    depth: int = 8


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it lies in the file. `at` is its offset, `size` all its bytes with padding."""

    type: int
    flags: int
    at: int
    head: dict[str, Any]
    head_size: int
    payload: int
    payload_size: int
    check: int

    @property
    def size(self) -> int:
        """Bytes from the start of the record to the start of the next one."""
        return -(-(self.payload + self.payload_size - self.at) // 64) * 64


@dataclass(frozen=True, slots=True)
class Unit:
    """One independently read and checked byte range, relative to the payload."""

    offset: int
    size: int
    check: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the index says of one tensor; `parts` maps sub-stream kind to bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    at: int
    size: int
    head_size: int
    parts: dict[str, int] = field(default_factory=dict)
