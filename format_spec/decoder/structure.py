"""Structured data: canonical MessagePack subset, container.md section 3."""

from typing import NoReturn, Union

import msgpack  # type: ignore[import-untyped, unused-ignore]

from .errors import DEPTH, MAX_COUNT, FormatError, UnsupportedError

Value = Union[None, bool, int, str, bytes, list["Value"], dict[str, "Value"]]  # noqa: UP007
Map = dict[str, Value]


def parse_map(data: bytes) -> Map:
    """Return the one map that data holds."""
    parser = _Parser(data)
    value = parser.value(1)
    if not isinstance(value, dict):
        raise FormatError("RAC-MSG-001: not a map")
    if parser.at != len(data):
        raise FormatError("RAC-MSG-001: bytes behind the map")
    return value


def encode(value: Value) -> bytes:
    """Canonical encoding of a value without maps, for the content digest (section 13)."""
    encoded: bytes = msgpack.packb(value, use_bin_type=True)  # takes the shortest forms
    return encoded


class _Parser:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:  # RAC-MSG-007, before the slice is made
            raise FormatError("RAC-MSG-007: structured data is cut off")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int, smallest: int) -> int:
        """Unsigned number of size bytes that would not fit a shorter form."""
        number = int.from_bytes(self.take(size), "big")
        if number < smallest:
            raise FormatError("RAC-MSG-002: not the shortest form")
        return number

    def value(self, level: int) -> Value:
        first = self.take(1)[0]
        if first <= 0x7F:
            return first
        if first >= 0xE0:
            return first - 256
        if first <= 0x8F:
            return self.map(first - 0x80, level)
        if first <= 0x9F:
            return self.array(first - 0x90, level)
        if first <= 0xBF:
            return self.text(first - 0xA0)
        if first == 0xC0:
            return None
        if first in (0xC2, 0xC3):
            return first == 0xC3
        if first in (0xC4, 0xC5, 0xC6):
            return self.take(self.number(*[(1, 0), (2, 0x100), (4, 0x10000)][first - 0xC4]))
        if 0xCC <= first <= 0xCF:
            return self.number(*[(1, 0x80), (2, 0x100), (4, 0x10000), (8, 0x100000000)][first - 0xCC])
        if 0xD0 <= first <= 0xD3:
            size, below = [(1, -32), (2, -0x80), (4, -0x8000), (8, -0x80000000)][first - 0xD0]
            number = int.from_bytes(self.take(size), "big", signed=True)
            if number >= below:
                raise FormatError("RAC-MSG-002: not the shortest form")
            return number
        if first in (0xD9, 0xDA, 0xDB):
            return self.text(self.number(*[(1, 32), (2, 0x100), (4, 0x10000)][first - 0xD9]))
        if first in (0xDC, 0xDD):
            return self.array(self.number(*[(2, 16), (4, 0x10000)][first - 0xDC]), level)
        if first in (0xDE, 0xDF):
            return self.map(self.number(*[(2, 16), (4, 0x10000)][first - 0xDE]), level)
        raise FormatError(f"RAC-MSG-003: first byte 0x{first:02x}")

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode("utf-8", "strict")  # refuses surrogates and overlong forms
        except UnicodeDecodeError as error:
            raise FormatError("RAC-MSG-005: text is not UTF-8") from error

    def nest(self, count: int, level: int) -> None:
        if level > DEPTH:
            raise FormatError("RAC-MSG-006: nested too deep")
        if count > len(self.data) - self.at:
            raise FormatError("RAC-MSG-007: structured data is cut off")

    def array(self, count: int, level: int) -> list[Value]:
        self.nest(count, level)
        return [self.value(level + 1) for _ in range(count)]

    def map(self, count: int, level: int) -> Map:
        self.nest(count, level)
        result: Map = {}
        previous: bytes | None = None
        for _ in range(count):
            start = self.at
            key = self.value(level + 1)
            if not isinstance(key, str):
                raise FormatError("RAC-MSG-004: key is not text")
            encoded = key.encode("utf-8")
            if previous is not None and encoded <= previous:
                raise FormatError(f"RAC-MSG-004: keys out of order at {start}")
            previous = encoded
            result[key] = self.value(level + 1)
        return result


# Types of values. Each takes the value and the clause that asks for the type.


def _wrong(clause: str, kind: str) -> NoReturn:
    raise FormatError(f"{clause}: not {kind}")


def as_int(value: Value, clause: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _wrong(clause, "an int")
    return value


def as_count(value: Value, clause: str) -> int:
    number = as_int(value, clause)
    if not 0 <= number <= MAX_COUNT:
        _wrong(clause, "a count")
    return number


def as_text(value: Value, clause: str) -> str:
    if not isinstance(value, str):
        _wrong(clause, "text")
    return value


def as_binary(value: Value, clause: str, size: int | None = None) -> bytes:
    if not isinstance(value, bytes) or (size is not None and len(value) != size):
        _wrong(clause, f"binary of {size} bytes" if size is not None else "binary")
    return value


def as_array(value: Value, clause: str, size: int | None = None) -> list[Value]:
    if not isinstance(value, list) or (size is not None and len(value) != size):
        _wrong(clause, f"an array of {size}" if size is not None else "an array")
    return value


def as_map(value: Value, clause: str) -> Map:
    if not isinstance(value, dict):
        _wrong(clause, "a map")
    return value


def as_counts(value: Value, clause: str, size: int | None = None) -> list[int]:
    return [as_count(item, clause) for item in as_array(value, clause, size)]


def as_aliases(value: Value, clause: str) -> list[tuple[str, bool]]:
    result = []
    for item in as_array(value, clause):
        name, tied = as_array(item, clause, 2)
        if not isinstance(tied, bool):
            _wrong(clause, "a bool")
        result.append((as_text(name, clause), tied))
    return result


def check_keys(table: Map, required: set[str], optional: set[str], clauses: tuple[str, str]) -> None:
    """Required keys are there (FormatError), others only as listed or `x-` (UnsupportedError)."""
    missing = required - table.keys()
    if missing:
        raise FormatError(f"{clauses[0]}: key {min(missing)!r} is missing")
    for key in table:
        if key not in required and key not in optional and not key.startswith("x-"):
            raise UnsupportedError(f"{clauses[1]}: key {key!r} is not known")
