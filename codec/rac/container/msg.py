"""Canonical msgpack, and that of others: the only door to the msgpack package (format_spec/container.md, "Structure").

Canonical means: shortest integer and length forms, map keys are strings in strictly ascending order of their
UTF-8 bytes, no floats, no extension types. One value has one encoding, so re-encoding is the check.
"""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any, NamedTuple

import msgpack

from rac.errors import FormatError


class Extension(NamedTuple):
    """A value of an extension type, in msgpack of others."""

    kind: int
    data: bytes


_SIMPLE = frozenset((str, int, bytes, bool, type(None)))
_KEY = operator.itemgetter(0)


def foreign(data: bytes) -> Any:
    """A value of any msgpack, as other programs write it; FormatError where it is damaged."""
    try:
        return msgpack.unpackb(data, ext_hook=Extension, strict_map_key=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as e:
        raise FormatError(str(e) or type(e).__name__) from e


def pack(value: Any) -> bytes:
    """Encode `value` (None, bool, int, str, bytes, list, dict with str keys) canonically."""
    return bytes(msgpack.packb(_ordered(value), use_bin_type=True))


def members(value: dict[str, Any]) -> bytes:
    """Keys and values of up to 15 items, the keys in ascending order, as `pack` has them within a map."""
    return bytes(msgpack.packb(value, use_bin_type=True)[1:])


def _ordered(value: Any) -> Any:
    """Maps with their keys in order: that of code points, which is that of their UTF-8 bytes."""
    if isinstance(value, dict):
        return {k: v if type(v) in _SIMPLE else _ordered(v) for k, v in sorted(value.items(), key=_KEY)}
    if isinstance(value, list | tuple) and {*map(type, value)} - _SIMPLE:
        return [_ordered(v) for v in value]
    return value


_PLAIN, _NOT = (0, 0, 0), (-1, 0, 0)
_TOKENS = [_PLAIN] * 128 + [(0, 2 * n, 0) for n in range(16)] + [(0, n, 0) for n in range(16)]  # numbers, maps, lists
_TOKENS += [(n, 0, 0) for n in range(32)] + [_PLAIN, _NOT, _PLAIN, _PLAIN]  # texts; nil, false and true
_TOKENS += [(0, 0, 1), (0, 0, 2), (0, 0, 4)] + [_NOT] * 5  # bytes; extensions and floats
_TOKENS += [(1, 0, 0), (2, 0, 0), (4, 0, 0), (8, 0, 0)] * 2 + [_NOT] * 5  # numbers; extensions
_TOKENS += [(0, 0, n) for n in (1, 2, 4, 2, 4, 2, 4)] + [_PLAIN] * 32  # texts, lists, maps; numbers
"""(bytes that follow, items that follow, bytes of a length) by first byte; _NOT where it is not allowed."""


def _scan(data: bytes, depth: int) -> None:
    """Refuse deep nesting and counts that exceed the bytes that follow, before msgpack allocates for them."""
    at, end, left, outer = 0, len(data), 1, list[int]()
    while True:
        while left == 0:
            if not outer:
                if at != end:
                    raise FormatError("bytes follow the msgpack value")
                return
            left = outer.pop()
        left -= 1
        if at >= end:
            raise FormatError("msgpack ends early")
        b = data[at]
        size, items, n = _TOKENS[b]
        at += 1
        if n:
            count = int.from_bytes(data[at : at + n], "big")
            at += n
            if b < 0xDC:
                size = count
            else:
                items = count * (2 if b >= 0xDE else 1)
        elif size < 0:
            raise FormatError(f"msgpack type 0x{b:02x} is not allowed")
        if size > end - at or items > end - at:
            raise FormatError("msgpack counts more than the bytes that follow")
        at += size
        if items:
            if len(outer) >= depth:
                raise FormatError(f"msgpack nests deeper than {depth}")
            outer.append(left)
            left = items


_NESTED = frozenset((dict, list))


def _check(value: dict[str, Any] | list[Any], depth: int) -> None:
    """Refuse deep nesting, floats, and map keys that are not strings in ascending order.

    Code points are in the order of their UTF-8 bytes; of equal keys msgpack keeps one, and packs to other bytes.
    """
    if depth == 0:
        raise FormatError("msgpack nests too deep")
    items: Any = value
    if type(value) is dict:
        keys = [*value]
        if {*map(type, keys)} - {str} or keys != sorted(keys):
            raise FormatError("msgpack map keys are not in ascending order")
        items = value.values()
    kinds = {*map(type, items)} - _SIMPLE
    if not kinds:
        return
    if other := kinds - _NESTED:
        raise FormatError(f"msgpack type {min(k.__name__ for k in other)} is not allowed")
    for v in items:
        if type(v) is list and depth > 1 and _SIMPLE.issuperset(map(type, v)):
            continue
        if type(v) in _NESTED:
            _check(v, depth - 1)


ITEMS = 4096  # of a list or map, and bytes: with so few the decoder cannot allocate enough to matter
SMALL = 1 << 20  # bytes of what may be copied into an error


def _small_lists(data: bytes) -> Any:
    """The value, where no list or map of it has many items; None where one has, and where anything is wrong."""
    if len(data) > SMALL:
        return None
    most: dict[str, Any] = {"max_array_len": ITEMS, "max_map_len": ITEMS}
    with suppress(ValueError, TypeError, msgpack.exceptions.UnpackException):
        return msgpack.unpackb(data, strict_map_key=True, use_list=True, **most)
    return None


def unpack(data: bytes, depth: int = 8) -> dict[str, Any]:
    """Decode one canonical msgpack map; FormatError on anything else."""
    try:
        value = _small_lists(data)
        if value is None:
            if len(data) > ITEMS:
                _scan(data, depth)
            value = msgpack.unpackb(data, strict_map_key=True, use_list=True)
        if not isinstance(value, dict):
            raise FormatError("msgpack is not a map")
        _check(value, depth)
        if msgpack.packb(value, use_bin_type=True) != data:
            raise FormatError("msgpack is not in its shortest form")
    except (ValueError, TypeError, AttributeError, msgpack.exceptions.UnpackException, OverflowError) as e:
        raise FormatError(f"msgpack does not decode: {e}") from None
    return value
