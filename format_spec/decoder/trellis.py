"""Stage trellis/1, stages/trellis.md."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UnsupportedError
from .frames import decompress
from .structure import Map, as_array, as_int

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Elements = NDArray[np.unsignedinteger]
KEYS = ("id", "states", "zero", "low", "scale", "sizes")
GAINS = "gains"  # the key that may be missing
WORDS = {"F32": 4, "F16": 2, "BF16": 2}  # data type -> bytes of a word
# Section 4: states -> H0, H1
WALKS = {4: (2, 1), 8: (5, 2), 16: (9, 2), 32: (18, 4), 64: (33, 10), 128: (78, 43), 256: (166, 121)}
WALKS |= {512: (447, 231), 1024: (663, 441)}
QUARTERS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], np.uint32).view(np.float32)  # Q of section 3
DEAD = -128


@dataclass(frozen=True)
class Parameters:
    """Section 1; the names are those of the text."""

    dtype: str
    states: int
    zero: int
    low: int
    scale: np.float32
    sizes: list[int]
    gains: int

    @property
    def unit_size(self) -> int:
        return sum(self.sizes) + self.gains  # RAC-TCQ-007


def parameters(stage: Map, dtype: str) -> Parameters:
    """Check the stage map of a tensor of that data type."""
    for key in KEYS:
        if key not in stage:
            raise FormatError(f"RAC-TCQ-001: key {key!r} is missing")
    for key in stage:
        if key not in (*KEYS, GAINS):
            raise UnsupportedError(f"RAC-TCQ-002: key {key!r} is not known")
    states, zero, low, scale = (as_int(stage[key], "RAC-TCQ-003") for key in ("states", "zero", "low", "scale"))
    sizes = [as_int(size, "RAC-TCQ-003") for size in as_array(stage["sizes"], "RAC-TCQ-003", 4)]
    if states != 1 and states not in WALKS:
        raise FormatError(f"RAC-TCQ-003: states is {states}")
    if not (0 <= zero <= 255 and 0 <= low <= 255):
        raise FormatError("RAC-TCQ-003: zero or low")
    if any(not 0 <= size <= 1 << 40 for size in sizes):
        raise FormatError("RAC-TCQ-003: sizes")
    gains = as_int(stage[GAINS], "RAC-TCQ-003") if GAINS in stage else 0
    if GAINS in stage and not 1 <= gains <= 1 << 40:
        raise FormatError("RAC-TCQ-003: gains")
    if not 0x21800000 <= scale <= 0x5D800000:  # positive numbers are in the order of their bits
        raise FormatError("RAC-TCQ-004: scale")
    if dtype not in WORDS:
        raise FormatError(f"RAC-TCQ-005: data type {dtype}")
    if low + sizes[0] > 256:
        raise FormatError("RAC-TCQ-006: corrections")
    return Parameters(dtype, states, zero, low, np.array([scale], np.uint32).view(np.float32)[0], sizes, gains)


@dataclass(frozen=True)
class Unit:
    """Section 2: what the trellis unit holds, as section 6 needs it."""

    magnitudes: Floats  # rec(u) of each word
    row_scales: Floats  # B, R numbers
    col_scales: Floats  # A, C numbers
    outlier_rows: Ints
    outlier_cols: Ints
    outliers: Elements


def trellis_unit(unit: bytes, p: Parameters, rows: int, cols: int) -> Unit:
    """Decode the trellis unit of a tensor of rows x cols words."""
    if len(unit) != p.unit_size:
        raise FormatError("RAC-TCQ-007: size of the trellis unit")
    a, b, c, d = p.sizes[0], p.sizes[0] + p.sizes[1], sum(p.sizes[:3]), sum(p.sizes)
    row_list, col_list = entries(unit[a:b], rows), entries(unit[b:c], cols)
    dead = col_list == DEAD
    col_list[dead] = 0
    if (abs(row_list) > 60).any() or (abs(col_list) > 60).any():
        raise FormatError("RAC-TCQ-008: entry out of range")
    col_scales = p.scale * power(col_list)
    col_scales[dead] = 0
    places, elements = outliers(unit[c:d], WORDS[p.dtype], rows, cols)
    row_scales = power(row_list) * gain(entries(unit[d:], rows))
    return Unit(magnitudes(unit[:a], p), row_scales, col_scales, places[:, 0], places[:, 1], elements)


def entries(section: bytes, n: int) -> Ints:
    """A list of n entries."""
    if not section:
        return np.zeros(n, np.int64)
    content = section if len(section) == n else decompress(section, n)
    return np.frombuffer(content, np.int8).astype(np.int64)


def power(e: Ints) -> Floats:
    """Section 3: P(e)."""
    return np.ldexp(QUARTERS[e % 4], e // 4)


def gain(g: Ints) -> Floats:
    """Section 3: G(g)."""
    return (256 + g).astype(np.float32) / np.float32(256)


def magnitudes(section: bytes, p: Parameters) -> Floats:
    """Section 4: rec(u) of all words, exact, in 64ths."""
    k = np.arange(256, dtype=np.int64) - p.zero
    numbers = 64 * k if p.states == 1 else 64 * 2 * k + 32
    numbers[p.low : p.low + len(section)] += np.frombuffer(section, np.int8)
    return numbers.astype(np.float32) / np.float32(64)


def outliers(section: bytes, word: int, rows: int, cols: int) -> tuple[Ints, Elements]:
    """(row, column) of each outlier, and the elements."""
    if len(section) % (8 + word):
        raise FormatError("RAC-TCQ-009: size of the outliers")
    table = np.frombuffer(section, [("row", "<u4"), ("col", "<u4"), ("element", f"<u{word}")])
    places = np.stack([table["row"], table["col"]], axis=1).astype(np.int64)
    previous = (-1, -1)
    for row, col in places.tolist():
        if row >= rows or col >= cols:
            raise FormatError("RAC-TCQ-009: outlier outside of the matrix")
        if (row, col) <= previous:
            raise FormatError("RAC-TCQ-009: outliers out of order")
        previous = row, col
    return places, table["element"]


def decode_tile(words: Elements, p: Parameters, unit: Unit, ys: slice, xs: slice) -> Elements:
    """Sections 4 to 6: the elements of one tile, its rows one after the other."""
    h, w = words.shape
    values = np.empty((h, w), np.float32)
    state = np.zeros(w, np.int64)  # of each column
    h0, h1 = WALKS.get(p.states, (0, 0))
    for y in range(h):
        u = words[y].astype(np.int64)
        magnitude = unit.magnitudes[u]
        signed = np.where(state % 2 == 1, -magnitude, magnitude)
        values[y] = (signed * unit.col_scales[xs]) * unit.row_scales[ys.start + y]
        if p.states > 1:
            state = state // 2 ^ h0 * (state % 2) ^ h1 * ((u - p.zero) % 2)
    tile = rounded(values, p.dtype)
    inside = (unit.outlier_rows >= ys.start) & (unit.outlier_rows < ys.stop)
    inside &= (unit.outlier_cols >= xs.start) & (unit.outlier_cols < xs.stop)
    tile[unit.outlier_rows[inside] - ys.start, unit.outlier_cols[inside] - xs.start] = unit.outliers[inside]
    return tile


def rounded(values: Floats, dtype: str) -> Elements:
    """Section 6: finite binary32 numbers as elements, to the nearest, ties to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    if dtype == "F32":
        return bits
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
