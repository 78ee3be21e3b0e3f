"""Files in which tensors lie as they are: what is around them is a frame, and the file comes back byte for byte."""

from __future__ import annotations

import bisect
import io
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.encode.sources.model import Data, Extent, Source, SourceTensor
from rac.errors import SourceError
from rac.registry import DTYPES

MOST = 64 << 20  # bytes of a frame
SHARE = 8  # a frame is at most this part of its file, or FREE bytes
FREE = 1 << 16
EXPANSION = 200  # compressed data that grow more than so many times are refused
SMALL = 1 << 8  # bytes of tensors that stay in the frame too: they are not worth a hole


@dataclass(frozen=True, slots=True)
class Strided:
    """An array of a file that is not in C order, or not little-endian, read as if it were."""

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    swap: bool = False

    @property
    def size(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the array in C order, in a fresh array."""
        item = DTYPES[self.dtype].bits // 8
        shape, strides = (self.shape, self.strides) if self.shape else ((1,), (item,))
        row = self.size // shape[0] if self.size else 1
        a, b = start // row, -(-stop // row)
        try:
            memory = np.memmap(self.path, np.uint8, "r")
            whole = np.ndarray(shape, f"V{item}", memory, self.offset, strides)
        except (ValueError, OSError) as e:
            raise SourceError(f"file became shorter: {e}", file=self.path, offset=self.offset) from e
        out = np.ascontiguousarray(whole[a:b]).reshape(-1).view(np.uint8)
        if self.swap:
            out = out.view(f"u{DTYPES[self.dtype].word}").byteswap().view(np.uint8)
        return out[start - a * row : stop - a * row].copy()


class Window(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, path: str, at: int, size: int) -> None:
        self._extent, self._at = Extent(path, at, size), 0

    def seekable(self) -> bool:
        """As all files."""
        return True

    def readable(self) -> bool:
        """As all files."""
        return True

    def tell(self) -> int:
        """Where it is read next."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Where it is read next; OSError in front of its begin."""
        base = (0, self._at, self._extent.size)[whence]
        if base + offset < 0:
            raise OSError("seek in front of the file")
        self._at = base + offset
        return self._at

    def readinto(self, out: Any) -> int:
        """Fill `out` as far as there are bytes."""
        view = memoryview(out).cast("B")
        n = max(0, min(len(view), self._extent.size - self._at))
        view[:n] = self._extent.read(self._at, self._at + n).data
        self._at += n
        return n


class Layout:
    """One file, and the ranges of it that are tensors."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name, self.size = path, name, os.path.getsize(path)
        self.holes: list[tuple[int, int]] = []
        self._map: mmap.mmap | None = None
        self._searched = 0

    def inside(self, at: int, size: int) -> None:
        """SourceError where a range leaves the file."""
        if at < 0 or at + size > self.size:
            what = f"damaged file: a tensor of {size} bytes at {at}"
            raise SourceError(f"{what}, the file has {self.size}", file=self.path)

    def take(self, at: int, size: int) -> bool:
        """Make a range a hole; False where there is one, or the range is small."""
        self.inside(at, size)
        i = bisect.bisect(self.holes, (at, size))
        before = self.holes[i - 1] if i else (0, 0)
        if size < SMALL or sum(before) > at or (i < len(self.holes) and self.holes[i][0] < at + size):
            return False
        self.holes.insert(i, (at, size))
        return True

    def at(self, name: str, dtype: str, shape: Sequence[int], at: int) -> SourceTensor:
        """A tensor whose bytes lie at an offset, in C order and little-endian."""
        size = math.prod(shape) * DTYPES[dtype].bits // 8
        extra = {"shard": self.name, "at": at} if self.take(at, size) else None
        return SourceTensor(name, dtype, tuple(shape), Extent(self.path, at, size), extra)

    def found(self, name: str, dtype: str, shape: Sequence[int], data: bytes) -> SourceTensor:
        """A tensor whose bytes are known, and looked for in the file, behind those that were found before it."""
        if len(data) != math.prod(shape) * DTYPES[dtype].bits // 8:
            what = f"tensor {name!r} has {len(data)} bytes, which is not what {dtype} {list(shape)} needs"
            raise SourceError(f"damaged file: {what}", file=self.path)
        if self._map is None:
            with open(self.path, "rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        at = self._map.find(data, self._searched) if len(data) >= SMALL else -1
        if at < 0:
            return SourceTensor(name, dtype, tuple(shape), np.frombuffer(data, np.uint8))
        self._searched = at + len(data)
        return self.at(name, dtype, shape, at)

    def frame(self) -> bytes | None:
        """Size of the file, and its bytes outside the holes; None where they are so many that they are no frame."""
        left = self.size - sum(n for _, n in self.holes)
        if left > min(MOST, max(FREE, self.size // SHARE)):
            return None
        ends = [0, *(at + n for at, n in self.holes)]
        starts = [*(at for at, _ in self.holes), self.size]
        parts = (Extent(self.path, a, b - a).read(0, b - a).tobytes() for a, b in zip(ends, starts, strict=True))
        return self.size.to_bytes(8, "little") + b"".join(parts)


def source(
    kind: str, tensors: Sequence[SourceTensor], layouts: Sequence[Layout], left: Sequence[str] = (), why: str = ""
) -> Source:
    """A source of these tensors, which comes back as its files where frames are small.

    `left` says what is in the files beside tensors that the format can hold, `why` it may not come back otherwise.
    SourceError where something is left, and would be lost.
    """
    frames = {o.name: o.frame() for o in layouts}
    path = layouts[0].path
    names = [t.name for t in tensors]
    if len(set(names)) != len(names):
        again = next(n for n in names if names.count(n) > 1)
        raise SourceError(f"two tensors have the name {again!r}", file=path)
    if all(f is not None for f in frames.values()):
        kept = {name: f for name, f in frames.items() if f is not None}
        return Source(kind, tuple(tensors), (), {}, frames=kept)
    if left:
        raise SourceError(f"cannot be packed: {left[0]}, which this format does not store", file=path)
    plain = tuple(replace(t, extra=None) for t in tensors)
    lost = f"{why or 'too much of it is no plain tensor'}: its tensors come back, as a safetensors file"
    return Source(kind, plain, (), {}, lost=lost)


def array(name: str, dtype: str, shape: Sequence[int], data: Data) -> SourceTensor:
    """A tensor that has no place in a file."""
    return SourceTensor(name, dtype, tuple(shape), data)


def too_large(stored: int, size: int) -> bool:
    """Whether compressed bytes claim to be so many that a small file would fill the memory."""
    return size > MOST and size > EXPANSION * max(1, stored)


def words(value: Any) -> NDArray[np.uint8]:
    """Bytes of a numpy array in C order, little-endian."""
    flat = np.ascontiguousarray(value).reshape(-1)
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8)
