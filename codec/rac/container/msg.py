"""Canonical msgpack: the only door to the msgpack package (format_spec/container.md, "Structure").

Canonical means: shortest integer and length forms, map keys are strings in strictly ascending order of their
UTF-8 bytes, no floats, no extension types. One value has one encoding, so re-encoding is the check.
"""

from __future__ import annotations

import operator
from typing import Any

import msgpack

from rac.errors import FormatError


def pack(value: Any) -> bytes:
    """Encode `value` (None, bool, int, str, bytes, list, dict with str keys) canonically."""
    return bytes(msgpack.packb(_ordered(value), use_bin_type=True))


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _ordered(value[k]) for k in sorted(value, key=lambda s: s.encode())}
    if isinstance(value, list | tuple):
        return [_ordered(v) for v in value]
    return value


def _token(b: int) -> tuple[int, int, int]:
    """(bytes that follow, items that follow, bytes of a length) of a first byte; (-1, ...) where it is not allowed."""
    if b < 0x80 or b >= 0xE0 or b in (0xC0, 0xC2, 0xC3):
        return 0, 0, 0
    if b <= 0x9F:
        return 0, (b & 15) * (2 if b <= 0x8F else 1), 0
    if b <= 0xBF:
        return b & 31, 0, 0
    if 0xCC <= b <= 0xD3:
        return 1 << (b - 0xCC & 3), 0, 0
    lengths = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
    return (0, 0, lengths[b]) if b in lengths else (-1, 0, 0)


_TOKENS = [_token(b) for b in range(256)]


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


_PLAIN = frozenset((str, int, bytes, bool, type(None)))


def _check(value: dict[str, Any] | list[Any], depth: int) -> None:
    """Refuse deep nesting, floats, and map keys that are not strings in strictly ascending UTF-8 order."""
    if depth == 0:
        raise FormatError("msgpack nests too deep")
    items: Any = value
    if isinstance(value, dict):
        keys = [k.encode() for k in value]
        if any(map(operator.ge, keys, keys[1:])):
            raise FormatError("msgpack map keys are not in ascending order")
        items = value.values()
    for v in items:
        kind = type(v)
        if kind is dict or kind is list:
            _check(v, depth - 1)
        elif kind not in _PLAIN:
            raise FormatError(f"msgpack type {kind.__name__} is not allowed")


def unpack(data: bytes, depth: int = 8) -> dict[str, Any]:
    """Decode one canonical msgpack map; FormatError on anything else."""
    if len(data) > 4096:  # below that the decoder cannot allocate enough to matter
        _scan(data, depth)
    try:
        value = msgpack.unpackb(data, strict_map_key=True, use_list=True)
        if not isinstance(value, dict):
            raise FormatError("msgpack is not a map")
        _check(value, depth)
        if msgpack.packb(value, use_bin_type=True) != data:
            raise FormatError("msgpack is not in its shortest form")
    except (ValueError, TypeError, AttributeError, msgpack.exceptions.UnpackException, OverflowError) as e:
        raise FormatError(f"msgpack does not decode: {e}") from None
    return value
