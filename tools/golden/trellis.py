"""An encoder of trellis/1, written from stages/trellis.md alone: it takes words as they come and says what they mean.

Its arithmetic is Python's: the product of two binary32 numbers is exact in binary64, and `struct` rounds it once.
"""

import struct
from dataclasses import dataclass, field
from math import prod
from typing import Any

from golden.good import dense, tensor
from golden.lanes import Lanes
from golden.model import Record, up
from golden.numbers import Numbers
from rac.container import zstd
from rac.registry import DTYPES

WALKS = {1: (0, 0), 4: (2, 1), 8: (5, 2), 16: (9, 2), 32: (18, 4), 64: (33, 10), 128: (78, 43), 256: (166, 121)}
WALKS |= {512: (447, 231), 1024: (663, 441)}
"""H0 and H1 by number of states."""
QUARTERS = (0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD)
DEAD = -128


@dataclass
class Trellis:
    """Parameters of one tensor under trellis/1. Names are those of the specification."""

    dtype: str
    states: int = 4
    zero: int = 128
    low: int = 0
    scale: int = 0x3F800000
    corrections: list[int] = field(default_factory=list)
    rows: list[int] | None = None
    """Entries; stored in 0 bytes where absent."""
    cols: list[int] | None = None
    framed: str = ""
    """Lists that are stored in a frame: "rows", "cols", "gains" or several of them."""
    outliers: dict[tuple[int, int], int] = field(default_factory=dict)
    """Words of the data type by (row, column)."""
    gains: list[int] | None = None
    """Entries; no section and no key where absent."""

    def sections(self) -> list[bytes]:
        """The sections of the trellis unit."""
        lists = []
        for name, entries in (("rows", self.rows), ("cols", self.cols), ("gains", self.gains)):
            data = bytes(e & 255 for e in entries or ())
            if name in self.framed.split():
                packed = zstd.compress(data)
                if len(packed) == len(data):
                    raise ValueError("the frame would be taken for the entries themselves")
                data = packed
            lists.append(data)
        outliers = b"".join(
            struct.pack("<II", y, x) + w.to_bytes(DTYPES[self.dtype].word, "little")
            for (y, x), w in sorted(self.outliers.items())
        )
        gains = lists.pop()
        every = [bytes(c & 255 for c in self.corrections), *lists, outliers]
        return every if self.gains is None else [*every, gains]

    def stage(self) -> dict[str, Any]:
        """The stage map."""
        return {
            "id": "trellis/1",
            "states": self.states,
            "zero": self.zero,
            "low": self.low,
            "scale": self.scale,
            "sizes": [len(s) for s in self.sections()[:4]],
        } | ({} if self.gains is None else {"gains": len(self.sections()[4])})

    def magnitude(self, u: int) -> float:
        """rec(u)."""
        i = u - self.low
        correction = self.corrections[i] if 0 <= i < len(self.corrections) else 0
        k = u - self.zero
        return (2 * k + 0.5 if self.states > 1 else k) + correction / 64

    def elements(self, words: list[int], rows: int, cols: int, tr: int, tc: int) -> list[int]:
        """Words of the data type that the bytes `words` stand for."""
        a = [0.0 if e == DEAD else binary32(number(self.scale) * power(e)) for e in self.cols or [0] * cols]
        b = [power(e) for e in self.rows or [0] * rows]
        b = [binary32(p * (1 + g / 256)) for p, g in zip(b, self.gains or [0] * rows, strict=True)]
        h0, h1 = WALKS[self.states]
        out = [0] * (rows * cols)
        for x in range(cols):
            s = 0
            for y in range(rows):
                if y % tr == 0:
                    s = 0
                u = words[y * cols + x]
                r = self.magnitude(u)
                v = binary32(binary32((-r if s & 1 else r) * a[x]) * b[y])
                out[y * cols + x] = element(v, self.dtype)
                s = s >> 1 ^ (h0 if s & 1 else 0) ^ (h1 if u - self.zero & 1 else 0)
        for (y, x), w in self.outliers.items():
            out[y * cols + x] = w
        return out


def number(bits: int) -> float:
    """The binary32 number of these bits."""
    out: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return out


def binary32(v: float) -> float:
    """Rounded to binary32."""
    out: float = struct.unpack("<f", struct.pack("<f", v))[0]
    return out


def power(e: int) -> float:
    """P(e)."""
    return number(QUARTERS[e % 4]) * 2.0 ** (e // 4)


def element(v: float, dtype: str) -> int:
    """A binary32 number as a word of the data type."""
    if dtype == "F16":
        try:
            return int.from_bytes(struct.pack("<e", v), "little")
        except OverflowError:
            return 0x7C00 if v > 0 else 0xFC00
    bits = int.from_bytes(struct.pack("<f", v), "little")
    if dtype == "F32":
        return bits
    kept, rest = divmod(bits, 1 << 16)
    return kept + (rest > 1 << 15 or (rest == 1 << 15 and kept & 1))


def lossy(
    name: str,
    shape: list[int],
    words: list[int],
    t: Trellis,
    front: str | Lanes = "raw/1",
    *,
    axis: int | None = None,
    tile: tuple[int, int] | None = None,
    more: dict[str, Any] | None = None,
) -> Record:
    """A tensor record of two stages; `words` are the bytes that `front` stores."""
    axis = max(0, len(shape) - 1) if axis is None else axis
    rows, cols = prod(shape[:axis]), prod(shape[axis:])
    r = tensor(name, "U8", [rows, cols], words, front, axis=1, tile=tile)
    tr, tc = r.head["tile"]
    r.head |= {
        "dtype": t.dtype,
        "shape": shape,
        "axis": axis,
        "stages": [*r.head["stages"], t.stage()],
        "digest": zstd.digest(dense(t.dtype, t.elements(words, rows, cols, tr, tc))),
    }
    r.head |= more or {}
    parts = list(r.parts or r.plain_parts())
    unit = b"".join(t.sections())
    r.units.insert(1 if isinstance(front, Lanes) else 0, unit)
    parts[0] += len(unit)
    parts[5] += up(len(unit), 16) - len(unit)
    r.parts = tuple(parts)
    return r


def integers(seed: int, n: int, zero: int = 128, spread: int = 3) -> list[int]:
    """`n` words around `zero`, the far ones rare."""
    g = Numbers(seed)
    out = []
    for _ in range(n):
        k = g.below(spread) + spread * g.small()
        out.append(min(255, max(0, zero + (k if g.below(2) else -k))))
    return out
