"""What quantised weights are made of: the stored tensors of one scope, and the matrices that groups of these are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rac.errors import SourceError
from rac.stages.words import DTYPES, from_words, to_words

F32 = NDArray[np.float32]
Rows = Callable[[int, int], F32]  # rows [a, b) of a matrix, (b - a, C); it pickles
BLOCKS = (128, 64, 32, 16, 256, 512)  # sides of blocks that are tried where the configuration states none


SMALLEST = 1 << 14  # weights of the smallest matrix that is quantised


class Stored(Protocol):
    """A stored tensor; its bytes are in C order and little-endian."""

    @property
    def name(self) -> str:
        """Its name, for messages."""

    @property
    def dtype(self) -> str:
        """Data type, as the registry names it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def nbytes(self) -> int:
        """All its bytes."""

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop)."""


@dataclass(frozen=True, slots=True)
class Dequantised:
    """The bytes of a matrix that stored tensors stand for: made whenever they are read, kept nowhere."""

    rows: Rows
    dtype: str  # F32, F16 or BF16
    count: int  # rows
    cols: int

    @property
    def size(self) -> int:
        """All its bytes."""
        return self.count * self.cols * DTYPES[self.dtype].itemsize

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), in a fresh array."""
        width = self.cols * DTYPES[self.dtype].itemsize
        a, b = start // max(1, width), -(-stop // max(1, width))
        with np.errstate(all="ignore"):  # what damaged scales make infinite is refused where it is quantised
            words = to_words(np.ascontiguousarray(self.rows(a, b), np.float32), self.dtype)
        return words.reshape(-1).view(np.uint8)[start - a * width : stop - a * width]


@dataclass(frozen=True, slots=True)
class Logical:
    """One matrix, and the stored tensors that it stands for."""

    name: str
    shape: tuple[int, ...]
    rows: Rows
    parts: tuple[str, ...]  # the codes first
    scheme: str  # for people and the provenance


def rebound(rows: Any, tensors: Mapping[str, Stored]) -> Any:
    """What makes rows, or a part of it, with other tensors in place of those that were found, by name."""
    changed: dict[str, Any] = {}
    for f in fields(rows):
        value = getattr(rows, f.name)
        if hasattr(value, "read"):
            changed[f.name] = tensors[value.name]
        elif is_dataclass(value):
            changed[f.name] = rebound(value, tensors)
    return replace(rows, **changed)


@dataclass
class Scope:
    """The stored tensors of one folder, by their names in its files, and what its configuration says of them."""

    tensors: Mapping[str, Stored]
    stated: Mapping[str, Any]  # `quantization_config`; empty where there is none
    where: str  # the folder or file, for messages
    used: set[str] = field(default_factory=set)  # names of tensors that belong to a matrix that was found

    @property
    def method(self) -> str:
        """Name of the method that the configuration states; empty where it states none."""
        return str(self.stated.get("quant_method", "")) if self.stated else ""

    @cached_property
    def scaled(self) -> bool:
        """Whether eight-bit floats are codes here: the configuration says so, or some of them have scales."""
        codes = [n for n, t in self.tensors.items() if t.dtype.startswith("F8_E") and len(t.shape) > 1]
        return bool(self.method) or any(name in self.tensors for n in codes for name in scale_names(n))

    def left(self) -> Iterator[tuple[str, Stored]]:
        """Tensors that belong to no matrix yet."""
        return ((n, t) for n, t in self.tensors.items() if n not in self.used)

    def first(self, *names: str) -> str | None:
        """The first of some names that is there."""
        return next((n for n in names if n in self.tensors), None)

    def need(self, what: str, of: str, *names: str) -> str:
        """That, or SourceError: `what` of a tensor is missing beside its codes."""
        if (found := self.first(*names)) is None:
            tried = " or ".join(map(repr, names))
            raise self.wrong(of, f"has no {what}: {tried} is missing")
        return found

    def error(self, what: str) -> SourceError:
        """An error about the whole."""
        return SourceError(what, file=self.where)

    def wrong(self, name: str, what: str) -> SourceError:
        """An error about a stored tensor."""
        t = self.tensors[name]
        return SourceError(f"tensor {name!r} ({t.dtype} {list(t.shape)}) {what}", file=self.where)


def scale_names(codes: str) -> tuple[str, ...]:
    """Names that the scales of eight-bit codes have."""
    base = codes.removesuffix(".weight")
    others = (f"{base}.{n}" for n in ("scale", "qscale_weight", "scale_weight"))
    return (f"{codes}_scale_inv", f"{codes}_scale", *others)


def whole(t: Stored) -> NDArray[np.uint8]:
    """All bytes of a tensor, (bytes,)."""
    return t.read(0, t.nbytes)


def band(t: Stored, a: int, b: int, cols: int, word: str = "u1") -> NDArray[Any]:
    """Rows [a, b) of a stored matrix of `cols` words each."""
    width = cols * np.dtype(word).itemsize
    return t.read(a * width, b * width).view(f"<{word}").reshape(b - a, cols)


def _table(exponent: int, mantissa: int, kind: str = "") -> F32:
    """(256,) values of eight-bit floats of so many bits each; "fn": one NaN and no infinity; "fnuz": and no -0."""
    code = np.arange(256)
    e, m = code >> mantissa & (1 << exponent) - 1, code & (1 << mantissa) - 1
    bias = (1 << exponent - 1) - (kind != "fnuz")
    value = np.where(e > 0, (1 + m / (1 << mantissa)) * 2.0 ** (e - bias), m * 2.0 ** (1 - bias - mantissa))
    last = (1 << exponent) - 1
    if kind == "fn":
        value[(e == last) & (m == (1 << mantissa) - 1)] = np.nan
    elif not kind:
        value[e == last] = np.where(m[e == last] == 0, np.inf, np.nan)
    out: F32 = np.where(code >> 7, -value, value).astype(np.float32)
    if kind == "fnuz":
        out[128] = np.nan
    return out


def _powers() -> F32:
    """(256,) values of F8_E8M0: powers of two, and NaN."""
    out = np.ldexp(1.0, np.arange(256) - 127)
    out[255] = np.nan
    return out.astype(np.float32)


TABLES = {
    "F8_E4M3": _table(4, 3, "fn"),
    "F8_E5M2": _table(5, 2),
    "F8_E4M3FNUZ": _table(4, 3, "fnuz"),
    "F8_E5M2FNUZ": _table(5, 2, "fnuz"),
    "F8_E8M0": _powers(),
}
"""Values of the codes of data types of eight bits."""


def numbers(t: Stored, powers: bool = False) -> F32:
    """A small stored tensor in float32, flat; `powers`: bytes of U8 are exponents, as of F8_E8M0."""
    raw = whole(t)
    if t.dtype in DTYPES:
        return from_words(raw.view(f"<u{DTYPES[t.dtype].itemsize}"), t.dtype)
    if t.dtype in TABLES or (powers and t.dtype == "U8"):
        return TABLES.get(t.dtype, TABLES["F8_E8M0"])[raw]
    if t.dtype in ("F64", "I8", "U8", "I32", "I64"):
        kind = {"F64": "<f8", "I8": "i1", "U8": "u1", "I32": "<i4", "I64": "<i8"}[t.dtype]
        return raw.view(kind).astype(np.float32)
    raise SourceError(f"tensor {t.name!r} ({t.dtype}) cannot be a scale")


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a matrix (lead * R, C) shares scales (lead * S, T): a block has so many rows and columns."""

    lead: int
    rows: int
    scale_rows: int
    scale_cols: int
    high: int
    wide: int

    def spread(self, scales: F32, a: int, b: int, cols: int) -> F32:
        """(b - a, 1 or C) scales of the rows [a, b)."""
        at = np.arange(a, b)
        index = at // self.rows * self.scale_rows + at % self.rows // self.high
        found = scales.reshape(-1, self.scale_cols)[index % (self.lead * self.scale_rows)]
        return found if self.scale_cols == 1 else np.repeat(found, self.wide, 1)[:, :cols]


def blocks_of(scope: Scope, codes: str, shape: Sequence[int], scale: str, stated: Sequence[int] = ()) -> Blocks:
    """How a matrix (..., R, C) of `shape` shares the stored scales; SourceError where their shape says nothing."""
    *lead, rows, cols = shape
    given = list(scope.tensors[scale].shape)
    if math.prod(given) == 1:
        return Blocks(1, math.prod(lead) * rows, 1, 1, math.prod(lead) * rows, cols)
    if len(given) < len(shape) and given[0] == shape[0]:
        given += [1] * (len(shape) - len(given))
    high = wide = None
    if len(given) == len(shape) and given[:-2] == lead:
        one, other = (*stated, 0, 0)[:2]
        high, wide = _side(rows, given[-2], one), _side(cols, given[-1], other)
    if high is None or wide is None:
        raise scope.wrong(codes, f"does not fit the shape {list(scope.tensors[scale].shape)} of its scales {scale!r}")
    return Blocks(math.prod(lead), rows, given[-2], given[-1], high, wide)


def sides(value: Any) -> list[int]:
    """Rows and columns of a block that a configuration states; none where it states none."""
    good = isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    return [*value] if good else []


def _side(n: int, count: int, stated: int) -> int | None:
    """Rows or columns of a block, `count` of which make `n`; None where no size is known."""
    if count in (1, n):
        return n // count
    tried = (stated, *BLOCKS) if stated else BLOCKS
    found = next((side for side in tried if -(-n // side) == count), None)
    return n // count if found is None and count and n % count == 0 else found
