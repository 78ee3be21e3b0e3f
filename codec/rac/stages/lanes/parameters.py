"""lanes/1: the parameters that a record head states (format_spec/stages/lanes.md, whose names these are)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from rac.errors import FormatError
from rac.grid import Grid, is_int
from rac.native.prototypes import Array
from rac.stages.base import Coder, Context, Head, OpenCoder, check

MAX_LANES = 1024
MAX_BASE = 16  # base symbols that pairs may be made of


@functools.cache
def cut_planes(raw: int) -> list[tuple[int, int]]:
    """(bits, position of its lowest bit) of each plane of `raw` bits, largest first. Not to be written to."""
    sizes = [b for b in (32, 16, 8, 4, 2, 1) if raw & b]
    return [(b, sum(sizes[:k])) for k, b in enumerate(sizes)]


@functools.cache
def pairs(base: int, first_escape: int, per: int) -> NDArray[np.uint8]:
    """(symbols, per) base symbols of each coded symbol: those without an escape come first. Not to be written to."""
    if per == 1:
        return np.arange(base, dtype=np.uint8)[:, None]
    both = [(a, b) for b in range(base) for a in range(base)]
    return np.array(sorted(both, key=lambda ab: max(ab) >= first_escape), np.uint8)  # which keeps their order


@functools.lru_cache(64)
def _values(runs: tuple[int, ...]) -> NDArray[np.uint16]:
    out = np.zeros(256, np.uint16)
    tops = [top for start, n in zip(runs[::2], runs[1::2], strict=True) for top in range(start, start + n)]
    out[: len(tops)] = tops
    return out


@functools.lru_cache(64)
def bases(escapes: tuple[int, ...]) -> NDArray[np.uint32]:
    """(256,) base of each escape. Not to be written to."""
    out = np.zeros(256, np.uint32)
    out[: len(escapes)] = escapes
    return out


@functools.lru_cache(64)
def codes(base: int, first_escape: int, per: int) -> NDArray[np.uint8]:
    """(symbols,) a coded symbol as its base symbol, or as a | b << 4 for a pair. Not to be written to."""
    both = pairs(base, first_escape, per)
    return np.ascontiguousarray(both[:, 0] | both[:, -1] << np.uint8(4) if per == 2 else both[:, 0])


@dataclass(frozen=True, slots=True)
class Lanes(Coder):
    """lanes/1: a coded top of each word in interleaved ANS lanes, its other bits in raw planes."""

    id: ClassVar[str] = "lanes/1"
    resident: ClassVar[bool] = True
    lanes: int
    per: int
    zero: int
    sign: bool
    shift: int
    runs: tuple[int, ...]
    escapes: tuple[int, ...]
    tables: int
    order: int
    rows: int
    cols: int
    sizes: tuple[int, ...]
    packed: bool = False

    @property
    def front(self) -> int:
        """Bytes of the shared unit."""
        return sum(self.sizes) + self.rows * self.cols

    @property
    def framed(self) -> bool:
        """Whether raw planes may be Zstandard frames."""
        return self.packed

    @property
    def directory(self) -> int:
        """Bytes of a tile's directory, without padding."""
        return 4 + self.skip + 2 * self.lanes

    @property
    def skip(self) -> int:
        """Bytes of the stored sizes of the planes in it."""
        return 4 * self.raw.bit_count() if self.packed else 0

    @property
    def raw(self) -> int:
        """Raw bits per word."""
        return self.shift + self.sign

    @property
    def first_escape(self) -> int:
        """Symbols from this one on are escapes."""
        return sum(self.runs[1::2], 0)

    @property
    def base(self) -> int:
        """Size of the base alphabet: what one element can be."""
        return self.first_escape + len(self.escapes)

    @property
    def symbols(self) -> int:
        """Size of the coded alphabet: base symbols, or pairs of them."""
        return self.base * (self.base if self.per == 2 else 1)

    @property
    def first_escaping(self) -> int:
        """Coded symbols from this one on hold an escape."""
        return self.first_escape * (self.first_escape if self.per == 2 else 1)

    def pairs(self) -> NDArray[np.uint8]:
        """(symbols, per) base symbols of each coded symbol: those without an escape come first."""
        return pairs(self.base, self.first_escape, self.per)

    def steps(self, elements: Array | int) -> Array:
        """Coded symbols of a segment of so many elements."""
        out: Array = -(-np.asarray(elements) // self.per)
        return out

    def values(self) -> NDArray[np.uint16]:
        """(256,) top of each base symbol; 0 for escapes and unused entries. Not to be written to."""
        return _values(self.runs)

    def planes(self) -> list[tuple[int, int]]:
        """(bits, position of its lowest bit) of each raw plane, largest first."""
        return cut_planes(self.raw)

    @classmethod
    def from_head(cls, head: Head, context: Context) -> Self:
        """The coder of a stage map (stages/lanes.md, "Parameters"); FormatError or UnsupportedError."""
        bits = 8 * context.word
        ranges = {"lanes": (1, MAX_LANES), "per": (1, 2), "zero": (0, bits - 1), "sign": (0, 1), "shift": (0, bits - 1)}
        ranges |= {"tables": (1, 256), "order": (-8, 8), "rows": (1, 256), "cols": (1, 256), "packed": (0, 1)}
        check(head, ranges, "lanes", {"runs", "escapes", "sizes"})
        top = bits - head["zero"] - head["sign"] - head["shift"]
        if not 1 <= top <= 64:
            raise FormatError("lanes parameters leave no top bits")
        limit = 1 << min(top, 16)
        runs, escapes, sizes = head["runs"], head["escapes"], head["sizes"]
        if not all(isinstance(v, list) for v in (runs, escapes, sizes)) or len(sizes) != 3 or len(runs) % 2:
            raise FormatError("lanes parameter lists are malformed")
        end = 0
        for start, n in zip(runs[::2], runs[1::2], strict=True):
            if not is_int(start, end, limit - 1) or not is_int(n, 1, 256) or start + n > limit:
                raise FormatError("symbol runs overlap or leave the range of tops")
            end = start + n
        if any(not is_int(v, 0, limit - 1) for v in escapes):
            raise FormatError("escape base is out of range")
        most = 256 if head["per"] == 1 else MAX_BASE
        if not 2 <= sum(runs[1::2]) + len(escapes) <= most:
            raise FormatError(f"base alphabet must have 2 to {most} symbols")
        if any(not is_int(v, 0, 1 << 40) for v in sizes) or head["rows"] * head["cols"] > 4096:
            raise FormatError("lanes parameters sizes, rows or cols are out of range")
        small = {key: head[key] for key in ranges}
        small |= {"sign": bool(head["sign"]), "packed": bool(head["packed"])}
        return cls(**small, runs=tuple(runs), escapes=tuple(escapes), sizes=tuple(sizes))

    def open(self, unit: bytes, grid: Grid) -> OpenCoder:
        """Parse the shared unit (stages/lanes.md, "Shared unit"); FormatError where it breaks the format."""
        from rac.stages.lanes.opened import OpenLanes

        return OpenLanes(unit, self, grid)

    def details(self) -> dict[str, int]:
        """Number of classes and of tables."""
        return {"row_classes": self.rows, "column_classes": self.cols, "tables": self.tables}

    def parts(self, first: list[bytes], sizes: list[int], n: Array) -> tuple[int, int, int, int]:
        """Bytes of (directories, words, escapes, raw planes as stored) of tiles of `n` words each."""
        d = np.frombuffer(b"".join(first), np.uint8).reshape(len(first), self.directory)
        words = 4 * int(d[:, 4 + self.skip :].view("<u2").sum(dtype=np.int64))
        raw = sum(int((-(-n * b // 8)).sum()) for b, _ in self.planes())
        if self.packed:
            raw = int(d[:, 4 : 4 + self.skip].view("<u4").sum(dtype=np.int64))
        return self.directory * len(first), words, int(d[:, :4].view("<u4").sum(dtype=np.int64)), raw

    def plane_sizes(self, n: int) -> list[int]:
        """Bytes of each raw plane of a tile of `n` words, without padding."""
        return [-(-n * b // 8) for b, _ in self.planes()]
