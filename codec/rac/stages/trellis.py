"""Sign-symmetric trellis: small integers and scales to numbers (format_spec/stages/trellis.md).

The numpy functions here are the reference; rac/native/trellis.c is held to them bit for bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.errors import FormatError, UnsupportedError
from rac.native import Dequant, product
from rac.native import trellis as native
from rac.stages.lanes.layout import is_int

Array = NDArray[Any]
KEYS = {"id", "states", "zero", "low", "scale", "sizes"}
CODES = {
    1: (0, 0),
    4: (2, 1),
    8: (5, 2),
    16: (9, 2),
    32: (18, 4),
    64: (33, 10),
    128: (78, 43),
    256: (166, 121),
}
"""States to (H0, H1)."""
DEAD, MOST = -128, 60
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
QUIET = {"F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}
"""The NaN that a computed one becomes."""
_QUARTERS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], np.uint32).view(np.float32)


def power(e: Array) -> NDArray[np.float32]:
    """2**(e / 4) of int8 exponents, the binary32 numbers of section 3."""
    e = e.astype(np.int32)
    out: NDArray[np.float32] = np.ldexp(_QUARTERS[e & 3], e >> 2)
    return out


@dataclass(frozen=True, slots=True)
class Trellis:
    """Parameters of trellis/1 as they stand in the stage map of a record head."""

    states: int
    zero: int
    low: int
    scale: int
    sizes: tuple[int, int, int, int]
    id: ClassVar = "trellis/1"

    def to_head(self) -> dict[str, Any]:
        """The stage map."""
        return {
            "id": self.id,
            "states": self.states,
            "zero": self.zero,
            "low": self.low,
            "scale": self.scale,
            "sizes": list(self.sizes),
        }

    @classmethod
    def from_head(cls, head: dict[str, Any], dtype: str) -> Trellis:
        """Check every field (stages/trellis.md, section 1)."""
        if KEYS - head.keys():
            raise FormatError("trellis parameters are incomplete")
        if head.keys() - KEYS:
            raise UnsupportedError(f"unknown trellis parameters: {', '.join(sorted(head.keys() - KEYS))}")
        if type(head["states"]) is not int or head["states"] not in CODES:
            raise FormatError("trellis parameter states is out of range")
        if not is_int(head["zero"], 0, 255) or not is_int(head["low"], 0, 255):
            raise FormatError("trellis parameters zero or low are out of range")
        if not is_int(head["scale"], 0x21800000, 0x5D800000):
            raise FormatError("trellis parameter scale is out of range")
        sizes = head["sizes"]
        if not isinstance(sizes, list) or len(sizes) != 4 or any(not is_int(v, 0, 1 << 40) for v in sizes):
            raise FormatError("trellis parameter sizes is malformed")
        if dtype not in DTYPES:
            raise FormatError(f"trellis numbers cannot be {dtype}")
        if head["low"] + sizes[0] > 256:
            raise FormatError("trellis corrections leave the range of words")
        return cls(head["states"], head["zero"], head["low"], head["scale"], tuple(sizes))


@dataclass(frozen=True, slots=True)
class Tables:
    """What the unit of trellis/1 holds, ready for use."""

    rec: NDArray[np.float32]
    """(256,) magnitude of each word."""
    rows: NDArray[np.float32]
    """(R,) B(y)."""
    cols: NDArray[np.float32]
    """(C,) A(x)."""
    places: NDArray[np.int64]
    """(N, 2) row and column of each outlier, ascending."""
    values: Array
    """(N,) words of the data type."""


@functools.lru_cache(16)
def magnitudes(states: int, zero: int) -> NDArray[np.float32]:
    """(256,) magnitude of each word without corrections. Not to be written to."""
    k = np.arange(256, dtype=np.float32) - np.float32(zero)
    return 2 * k + np.float32(0.5) if states > 1 else k


def parse_unit(unit: bytes, p: Trellis, dtype: str, rows: int, cols: int) -> Tables:
    """The unit of a tensor of rows x cols elements (stages/trellis.md, section 2); FormatError where it breaks it."""
    if len(unit) != sum(p.sizes):
        raise FormatError("trellis unit does not have the size of its sections")
    a, b, c, _ = np.cumsum(p.sizes).tolist()
    rec = magnitudes(p.states, p.zero).copy()
    rec[p.low : p.low + p.sizes[0]] += np.frombuffer(unit[:a], np.int8).astype(np.float32) / np.float32(64)
    by_row, by_col = _list(unit[a:b], rows), _list(unit[b:c], cols)
    if (np.abs(by_row.astype(np.int16)) > MOST).any() or (
        (np.abs(by_col.astype(np.int16)) > MOST) & (by_col != DEAD)
    ).any():
        raise FormatError("trellis scale is out of range")
    col = np.array(p.scale, np.uint32).view(np.float32) * power(by_col)
    col[by_col == DEAD] = 0
    kind = _outliers(DTYPES[dtype].itemsize)
    if p.sizes[3] % kind.itemsize:
        raise FormatError("trellis outliers are malformed")
    found = np.frombuffer(unit[c:], kind)
    places = np.stack([found["row"], found["col"]], axis=1).astype(np.int64)
    flat = places[:, 0] * cols + places[:, 1]
    if (places >= (rows, cols)).any() or (np.diff(flat) <= 0).any():
        raise FormatError("trellis outliers are not in order or outside the tensor")
    return Tables(rec, power(by_row), col, places, found["value"].copy())


def _list(data: bytes, n: int) -> NDArray[np.int8]:
    """Exponents of `n` rows or columns: nothing where all are 0, plain bytes of size n, or else a zstd frame."""
    if not data:
        return np.zeros(n, np.int8)
    return np.frombuffer(zstd.expand(data, n), np.int8)


def build_unit(
    corrections: NDArray[np.int8],
    rows: NDArray[np.int8],
    cols: NDArray[np.int8],
    places: NDArray[np.int64],
    values: Array,
) -> tuple[tuple[int, int, int, int], bytes]:
    """Inverse of `parse_unit`: (sizes, unit). Outliers at `places` (N, 2), ascending, are `values` (N,), words."""
    outliers = np.zeros(len(places), _outliers(values.itemsize))
    outliers["row"], outliers["col"], outliers["value"] = places[:, 0], places[:, 1], values
    lists = [zstd.shorter(v.tobytes(), 19) if v.any() else b"" for v in (rows, cols)]
    a, b, c, d = corrections.tobytes(), *lists, outliers.tobytes()
    return (len(a), len(b), len(c), len(d)), a + b + c + d


def _outliers(word: int) -> np.dtype[Any]:
    return np.dtype([("row", "<u4"), ("col", "<u4"), ("value", f"<u{word}")])


def from_words(words: Array, dtype: str) -> NDArray[np.float32]:
    """Words of F32, F16 or BF16, shape kept, as the binary32 numbers that they are."""
    if dtype == "BF16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view("<f4" if dtype == "F32" else "<f2").astype(np.float32)


def to_words(v: NDArray[np.float32], dtype: str) -> Array:
    """Binary32 to words of the data type, to nearest, ties to even; any NaN to the quiet one."""
    bits: Array = v.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            bits = v.astype(np.float16).view(np.uint16)
    elif dtype == "BF16":
        bits = ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(v)
    return np.where(nan, bits.dtype.type(QUIET[dtype]), bits) if nan.any() else bits


def put_words(v: NDArray[np.float32], dtype: str, dst: Array, reference: bool = False) -> None:
    """`to_words` of contiguous numbers into `dst`, contiguous words of their shape."""
    if reference or not product.rounded(v, dtype, dst):
        dst[...] = to_words(v, dtype)


def decode(
    words: NDArray[np.uint8],
    p: Trellis,
    t: Tables,
    box: tuple[int, int, int, int],
    dst: Array,
    dtype: str,
    reference: bool = False,
) -> None:
    """Words (h, w) of one tile, contiguous, to elements in `dst` (h, w), words of the data type."""
    r0, r1, c0, c1 = box
    rows, cols = t.rows[r0:r1], t.cols[c0:c1]
    if not reference and (numbers := dequant(t, p, dtype)):
        native.decode(words, numbers, cols, rows, dst)
    else:
        h0, h1 = CODES[p.states]
        state: Array = np.zeros(c1 - c0, np.uint8)
        for y in range(r1 - r0):
            v = t.rec[words[y]]
            v = np.where(state & 1, -v, v) * cols * rows[y]
            dst[y] = to_words(v, dtype)
            odd = (words[y] ^ np.uint8(p.zero & 1)) & 1
            state = (
                (state >> 1) ^ np.where(state & 1, np.uint8(h0), np.uint8(0)) ^ np.where(odd, np.uint8(h1), np.uint8(0))
            )
    outliers(t, box, dst)


def dequant(t: Tables, p: Trellis, dtype: str) -> Dequant | None:
    """What words stand for, as the kernel of a tile wants it (`native.trellis.dequant`); `t` is to stay."""
    return native.dequant(t.rec, not p.sizes[0], CODES[p.states], p.zero, dtype)


def outliers(t: Tables, box: tuple[int, int, int, int], dst: Array) -> None:
    """The outliers of one tile to their places in `dst` (h, w), words of the data type."""
    r0, r1, c0, c1 = box
    a, b = np.searchsorted(t.places[:, 0], (r0, r1))
    for (y, x), value in zip(t.places[a:b].tolist(), t.values[a:b], strict=True):
        if c0 <= x < c1:
            dst[y - r0, x - c0] = value
