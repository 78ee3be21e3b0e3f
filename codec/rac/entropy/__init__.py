"""Symbols to words and back: integer frequency tables, ANS lanes.

`encode` and `decode` turn small integers into bytes and back with one frequency table and one lane of range-variant ANS
(Duda, arXiv 1311.2540; constriction: Bamler, arXiv 2201.01741). It is not lanes/1: no classes, a head of its own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rac.entropy import tables
from rac.errors import FormatError

__all__ = ["decode", "encode"]

_HEAD = struct.Struct("<QIHhBb")
"""Integers, words, bytes of the table, least integer, symbols - 1, order of the table's code; then table and words."""


def encode(integers: ArrayLike) -> bytes:
    """Code integers of any shape with the table of their own frequencies; the shape is not stored.

    They are of an integer type, -32768 to 32767, the largest at most 255 above the least, ValueError otherwise. What
    is returned are a head of 18 bytes, the table, and the words of the coder, which take the entropy of the integers
    under frequencies of 12 bits and up to 8 bytes.
    """
    from rac.entropy import ans  # not above: constriction is loaded only where it codes

    v = np.asarray(integers)
    if v.dtype.kind not in "iu":
        raise ValueError(f"integers are needed, not {v.dtype}")
    least, most = (int(v.min()), int(v.max())) if v.size else (0, 0)
    if not -(1 << 15) <= least <= most <= min(least + 255, (1 << 15) - 1):
        raise ValueError(f"integers from {least} to {most}: the range must be within 16 bits, and at most 256 values")
    symbols = (v.ravel().astype(np.int64) - least).astype(np.uint8)
    size = max(2, most - least + 1)
    freq = tables.normalise(np.bincount(symbols, minlength=size).astype(np.int64))[None]
    table, order = min(((tables.to_bytes(freq, o), o) for o in range(-8, 9)), key=lambda found: len(found[0]))
    models = ans.Models(freq)
    words = models.encode(models.index[0][symbols].astype(np.int32), [(v.size, 0)])
    return _HEAD.pack(v.size, len(words), len(table), least, size - 1, order) + table + words.astype("<u4").tobytes()


def decode(data: bytes, shape: Sequence[int]) -> NDArray[np.int16]:
    """The integers of `encode` in the shape given, int16.

    FormatError where the bytes are no such code, or one of another number of integers, ChecksumError where the coder
    does not end in its initial state.
    """
    from rac.entropy import ans

    if len(data) < _HEAD.size:
        raise FormatError("coded integers are cut off", offset=len(data))
    n, count, size, least, last, order = _HEAD.unpack_from(data)
    if n != math.prod(shape):
        raise FormatError(f"{n} integers do not have the shape {tuple(shape)}", offset=0)
    if last < 1 or not -8 <= order <= 8 or least + last >= 1 << 15:
        raise FormatError("the head of coded integers is malformed", offset=0)
    table, words = data[_HEAD.size : _HEAD.size + size], data[_HEAD.size + size :]
    if len(words) != 4 * count:
        raise FormatError(f"coded integers need {count} words behind the table", offset=len(data))
    freq = tables.from_bytes(table, 1, last + 1, order)
    symbols = ans.Models(freq).decode(np.frombuffer(words, "<u4"), [(n, 0)])
    return (symbols.astype(np.int16) + np.int16(least)).reshape(shape)
