"""Stage groups/1, stages/groups.md."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UnsupportedError
from .frames import decompress
from .structure import Map, as_array, as_int
from .trellis import WORDS, rounded

Elements = NDArray[np.unsignedinteger]
KEYS = ("id", "bits", "group", "zero", "exponent", "sizes")


@dataclass(frozen=True)
class Parameters:
    """Section 1; the names are those of the text."""

    dtype: str
    bits: int
    group: int
    zero: int
    exponent: int
    sizes: list[int]

    @property
    def unit_size(self) -> int:
        return sum(self.sizes)  # RAC-GRP-007


def parameters(stage: Map, dtype: str, cols: int) -> Parameters:
    """Check the stage map of a tensor of that data type and number of columns."""
    for key in KEYS:
        if key not in stage:
            raise FormatError(f"RAC-GRP-001: key {key!r} is missing")
    for key in stage:
        if key not in KEYS:
            raise UnsupportedError(f"RAC-GRP-002: key {key!r} is not known")
    bits, group, zero, exponent = (as_int(stage[key], "RAC-GRP-003") for key in KEYS[1:5])
    sizes = [as_int(size, "RAC-GRP-003") for size in as_array(stage["sizes"], "RAC-GRP-003", 3)]
    if not (1 <= bits <= 8 and 1 <= group <= cols and 0 <= zero <= 255 and -60 <= exponent <= 60):
        raise FormatError("RAC-GRP-003: range")
    if any(not 0 <= size <= 1 << 40 for size in sizes):
        raise FormatError("RAC-GRP-003: sizes")
    if dtype not in WORDS:
        raise FormatError(f"RAC-GRP-004: data type {dtype}")
    if sizes[2] and zero:
        raise FormatError("RAC-GRP-005: zero")
    return Parameters(dtype, bits, group, zero, exponent, sizes)


@dataclass(frozen=True)
class Unit:
    """Section 2: what the groups unit holds, R x G each."""

    scales: NDArray[np.float64]
    zeros: NDArray[np.int64]


def groups_unit(unit: bytes, p: Parameters, rows: int, cols: int) -> Unit:
    """Decode the groups unit of a tensor of rows x cols words."""
    if len(unit) != p.unit_size:
        raise FormatError("RAC-GRP-007: size of the groups unit")
    n, width = rows * -(-cols // p.group), -(-cols // p.group)
    a, b = p.sizes[0], p.sizes[0] + p.sizes[1]
    upper, lower = entries(unit[:a], n, 0), entries(unit[a:b], n, 0)
    numbers = 256 * upper + lower
    if (numbers < 0x0400).any() or (numbers > 0x7BFF).any():
        raise FormatError("RAC-GRP-008: a scale is not normal, or not above 0")
    scales = np.ldexp((1024 + numbers % 1024).astype(np.float64), numbers // 1024 - 25 + p.exponent)
    return Unit(scales.reshape(rows, width), entries(unit[b:], n, p.zero).reshape(rows, width))


def entries(section: bytes, n: int, without: int) -> NDArray[np.int64]:
    """A list of n entries; `without` is what all are where nothing is stored."""
    if not section:
        return np.full(n, without, np.int64)
    content = section if len(section) == n else decompress(section, n)
    return np.frombuffer(content, np.uint8).astype(np.int64)


def decode_tile(words: Elements, p: Parameters, unit: Unit, ys: slice, xs: slice) -> Elements:
    """Section 4: the elements of one tile."""
    if (words >= 1 << p.bits).any():
        raise FormatError("RAC-GRP-009: a word is too large")
    group = np.arange(xs.start, xs.stop) // p.group
    steps = words.astype(np.int64) - unit.zeros[ys][:, group]
    values = (steps * unit.scales[ys][:, group]).astype(np.float32)  # exact in both
    return rounded(values, p.dtype)
