"""Stage bits/1, stages/bits.md."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UnsupportedError
from .structure import Map, as_int

Words = NDArray[np.uint8]


@dataclass(frozen=True)
class Parameters:
    """Section 1."""

    bits: int


def parameters(stage: Map, word: int) -> Parameters:
    """Check the stage map, given the bytes of the words that the stage restores."""
    if "bits" not in stage:
        raise FormatError("RAC-BIT-001: bits is missing")
    for key in stage:
        if key not in ("id", "bits"):
            raise UnsupportedError(f"RAC-BIT-002: key {key!r} is not known")
    bits = as_int(stage["bits"], "RAC-BIT-003")
    if not 1 <= bits <= 8:
        raise FormatError("RAC-BIT-003: range of bits")
    if word != 1:
        raise FormatError("RAC-BIT-004: words of more than one byte")
    return Parameters(bits)


def decode_tile(unit: bytes, p: Parameters, h: int, w: int) -> Words:
    """Sections 2 and 3: the words of a tile."""
    n, at, low = h * w, 0, 0
    words = np.zeros(n, np.uint8)
    for power in (8, 4, 2, 1):
        if not p.bits & power:
            continue
        size = -(-n * power // 8)
        plane = unit[at : at + size]
        padding = unit[at + size : at + size + -size % 16]
        if (len(plane), len(padding)) != (size, -size % 16):
            raise FormatError("RAC-BIT-005: the unit is too short")
        if any(padding):
            raise FormatError("RAC-BIT-006: padding")
        each = np.unpackbits(np.frombuffer(plane, np.uint8), bitorder="little")
        if each[n * power :].any():
            raise FormatError("RAC-BIT-007: bits behind the last word")
        for i, bit in enumerate(each[: n * power].reshape(n, power).T):
            words += bit << (low + i)
        at, low = at + size + len(padding), low + power
    if at != len(unit):
        raise FormatError("RAC-BIT-005: the unit is too long")
    return words.reshape(h, w)
