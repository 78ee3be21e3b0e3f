"""Encoders of bits/1 and groups/1, written from stages/bits.md and stages/groups.md alone."""

import struct
from dataclasses import dataclass
from math import prod
from typing import Any

from golden.good import dense, tensor
from golden.lanes import Lanes, plane, up16
from golden.model import Record, up
from golden.numbers import Numbers
from golden.trellis import element
from rac.container import zstd

Front = str | int | Lanes
"""A coder: an id, the bits of bits/1, or lanes/1."""


def planes(words: list[int], bits: int) -> bytes:
    """The unit of a tile."""
    out, low = b"", 0
    for p in (8, 4, 2, 1):
        if bits & p:
            out += up16(plane([w >> low & (1 << p) - 1 for w in words], p))
            low += p
    return out


def in_bits(r: Record, bits: int, first: int = 0) -> Record:
    """A record of words of one byte behind raw/1, behind bits/1 instead; tiles begin at unit `first`."""
    r.head["stages"] = [{"id": "bits/1", "bits": bits}, *r.head["stages"][1:]]
    front = sum(len(u) for u in r.units[:first])
    r.units[first:] = [planes(list(u), bits) for u in r.units[first:]]
    raw = sum(len(u) for u in r.units) - front
    r.parts = (front, 0, 0, 0, raw, sum(up(len(u), 16) for u in r.units) - front - raw)
    return r


@dataclass
class Groups:
    """Parameters of one tensor under groups/1. Names are those of the specification."""

    dtype: str
    bits: int
    group: int
    scales: list[int]
    """R x G, bits of binary16."""
    zeros: list[int] | int = 0
    """R x G, or the one of all."""
    exponent: int = 0
    framed: str = ""
    """Lists that are stored in a frame: some of "upper", "lower", "zeros"; or "none": a list of zeros in 0 bytes."""

    def sections(self) -> list[bytes]:
        """The sections of the groups unit."""
        lists = {
            "upper": bytes(s >> 8 for s in self.scales),
            "lower": bytes(s & 255 for s in self.scales),
            "zeros": b"" if isinstance(self.zeros, int) else bytes(self.zeros),
        }
        for name in self.framed.split():
            if name == "none":
                lists = {k: v if any(v) else b"" for k, v in lists.items()}
                continue
            packed = zstd.compress(lists[name])
            if len(packed) == len(lists[name]):
                raise ValueError("the frame would be taken for the entries themselves")
            lists[name] = packed
        return list(lists.values())

    def stage(self) -> dict[str, Any]:
        """The stage map."""
        return {
            "id": "groups/1",
            "bits": self.bits,
            "group": self.group,
            "exponent": self.exponent,
            "zero": self.zeros if isinstance(self.zeros, int) else 0,
            "sizes": [len(s) for s in self.sections()],
        }

    def elements(self, words: list[int], cols: int) -> list[int]:
        """Words of the data type that the codes stand for."""
        width, out = -(-cols // self.group), []
        for i, u in enumerate(words):
            g = i // cols * width + i % cols // self.group
            zero = self.zeros if isinstance(self.zeros, int) else self.zeros[g]
            scale: float = struct.unpack("<e", struct.pack("<H", self.scales[g]))[0]
            out.append(element((u - zero) * scale * 2.0**self.exponent, self.dtype))
        return out


def grouped(
    name: str,
    shape: list[int],
    words: list[int],
    g: Groups,
    front: Front = "raw/1",
    *,
    axis: int | None = None,
    tile: tuple[int, int] | None = None,
    more: dict[str, Any] | None = None,
) -> Record:
    """A tensor record of two stages; `words` are the codes that `front` stores."""
    axis = max(0, len(shape) - 1) if axis is None else axis
    rows, cols = prod(shape[:axis]), prod(shape[axis:])
    r = tensor(name, "U8", [rows, cols], words, "raw/1" if isinstance(front, int) else front, axis=1, tile=tile)
    if isinstance(front, int):
        r = in_bits(r, front)
    r.head |= {
        "dtype": g.dtype,
        "shape": shape,
        "axis": axis,
        "stages": [*r.head["stages"], g.stage()],
        "digest": zstd.digest(dense(g.dtype, g.elements(words, cols))),
    }
    r.head |= more or {}
    parts = list(r.parts or r.plain_parts())
    unit = b"".join(g.sections())
    r.units.insert(1 if isinstance(front, Lanes) else 0, unit)
    parts[0] += len(unit)
    parts[5] += up(len(unit), 16) - len(unit)
    r.parts = tuple(parts)
    return r


def codes(seed: int, n: int, bits: int) -> list[int]:
    """`n` words below 2**bits."""
    g = Numbers(seed)
    return [g.below(1 << bits) for _ in range(n)]


def scales(seed: int, n: int, spread: int = 3) -> list[int]:
    """`n` bits of binary16, about 2**-5 and up to `spread` octaves from there."""
    g = Numbers(seed)
    return [(10 - spread + g.below(2 * spread)) << 10 | g.below(1024) for _ in range(n)]
