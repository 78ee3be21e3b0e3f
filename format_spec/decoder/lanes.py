"""Stage lanes/1, stages/lanes.md."""

from dataclasses import dataclass, field
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from .errors import ChecksumError, FormatError, UnsupportedError
from .frames import decompress
from .structure import Map, as_array, as_int

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]
Values = NDArray[np.uint64]
KEYS = (
    "id",
    "lanes",
    "packed",
    "per",
    "zero",
    "sign",
    "shift",
    "runs",
    "escapes",
    "tables",
    "order",
    "rows",
    "cols",
    "sizes",
)
POWERS = (32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Parameters:
    """Section 1; the names are those of the text."""

    width: int  # W
    lanes: int
    packed: int
    per: int
    zero: int
    sign: int
    shift: int
    runs: list[int]
    escapes: list[int]
    tables: int
    order: int
    rows: int
    cols: int
    sizes: list[int]
    # Derived.
    limit: int
    tops: list[int]  # the top of each symbol that is no escape; E = len(tops)
    base: int  # B
    coded: int  # S

    @property
    def raw_bits(self) -> int:
        return self.shift + self.sign

    @property
    def shared_size(self) -> int:
        return sum(self.sizes) + self.rows * self.cols  # RAC-LAN-010


def parameters(stage: Map, word: int) -> Parameters:
    """Check the stage map of a tensor whose words have `word` bytes."""
    for key in KEYS:
        if key not in stage:
            raise FormatError(f"RAC-LAN-001: key {key!r} is missing")
    for key in stage:
        if key not in KEYS:
            raise UnsupportedError(f"RAC-LAN-002: key {key!r} is not known")
    width = 8 * word

    def number(key: str, low: int, high: int) -> int:
        value = as_int(stage[key], "RAC-LAN-003")
        if not low <= value <= high:
            raise FormatError(f"RAC-LAN-003: {key} is {value}")
        return value

    def numbers(key: str, size: int | None = None) -> list[int]:
        return [as_int(item, "RAC-LAN-003") for item in as_array(stage[key], "RAC-LAN-003", size)]

    lanes, packed, per = number("lanes", 1, 1024), number("packed", 0, 1), number("per", 1, 2)
    zero, sign, shift = number("zero", 0, width - 1), number("sign", 0, 1), number("shift", 0, width - 1)
    tables, order = number("tables", 1, 256), number("order", -8, 8)
    rows, cols = number("rows", 1, 256), number("cols", 1, 256)
    runs, escapes, sizes = numbers("runs"), numbers("escapes"), numbers("sizes", 3)
    if any(not 0 <= size <= 1 << 40 for size in sizes):
        raise FormatError("RAC-LAN-003: sizes")
    topbits = width - zero - sign - shift
    if topbits < 1:
        raise FormatError("RAC-LAN-004: no top is left")
    if rows * cols > 4096:
        raise FormatError("RAC-LAN-005: too many pairs of classes")
    limit = 1 << min(topbits, 16)
    if len(runs) % 2:
        raise FormatError("RAC-LAN-007: odd number of entries")
    tops: list[int] = []
    end = 0
    for start, count in zip(runs[::2], runs[1::2], strict=True):
        if not (1 <= count <= 256 and end <= start and start + count <= limit):
            raise FormatError("RAC-LAN-007: run out of range")
        end = start + count
        tops += range(start, end)
    if any(not 0 <= escape < limit for escape in escapes):
        raise FormatError("RAC-LAN-008: escape out of range")
    base = len(tops) + len(escapes)
    if not 2 <= base <= (256 if per == 1 else 16):
        raise FormatError(f"RAC-LAN-009: alphabet of {base}")
    return Parameters(
        width,
        lanes,
        packed,
        per,
        zero,
        sign,
        shift,
        runs,
        escapes,
        tables,
        order,
        rows,
        cols,
        sizes,
        limit,
        tops,
        base,
        base**per,
    )


def coded_symbols(p: Parameters) -> Ints:
    """Section 4: row s has the base symbols of coded symbol s."""
    if p.per == 1:
        return np.arange(p.base, dtype=np.int64).reshape(-1, 1)
    e = len(p.tops)
    pairs = [(a, b) for b in range(p.base) for a in range(p.base)]
    plain = [(a, b) for a, b in pairs if a < e and b < e]
    others = [(a, b) for a, b in pairs if a >= e or b >= e]
    return np.array(plain + others, dtype=np.int64)


@dataclass
class Shared:
    """Section 5: what unit 0 holds."""

    tables: Ints  # T x S
    row_classes: Ints  # R
    col_classes: Ints  # C
    class_map: Ints  # Kr x Kc
    models: dict[int, Any] = field(default_factory=dict)  # constriction's form of a table
    slots: dict[int, tuple[Values, Values, Ints]] = field(default_factory=dict)
    """Frequencies, starts, and the symbol of each slot, of the tables that were used: made once, not for each tile."""


def shared_unit(unit: bytes, p: Parameters, rows: int, cols: int) -> Shared:
    """Decode unit 0 of a tensor of rows x cols words."""
    if len(unit) != p.shared_size:
        raise FormatError("RAC-LAN-010: size of the shared unit")
    a, b, c = p.sizes[0], p.sizes[0] + p.sizes[1], sum(p.sizes)
    class_map = np.frombuffer(unit, np.uint8, offset=c).astype(np.int64)
    if class_map.max() >= p.tables:
        raise FormatError("RAC-LAN-011: class map names a table that is not there")
    return Shared(
        frequency_tables(unit[:a], p.tables, p.coded, p.order),
        classes(unit[a:b], rows, p.rows),
        classes(unit[b:c], cols, p.cols),
        class_map.reshape(p.rows, p.cols),
    )


def frequency_tables(section: bytes, tables: int, symbols: int, order: int) -> Ints:
    """Section 6."""
    at = 0
    end = 8 * len(section)

    def bit() -> int:
        nonlocal at
        if at >= end:
            raise FormatError("RAC-LAN-012: tables run past their section")
        at += 1
        return section[(at - 1) // 8] >> (7 - (at - 1) % 8) & 1

    result = np.zeros((tables, symbols), np.int64)
    for table in range(tables):
        previous = 0
        for symbol in range(symbols):
            k = max(0, previous.bit_length() // 2 + order)
            q = 0
            while not bit():
                q += 1
                if q > 13:
                    raise FormatError("RAC-LAN-012: code is too long")
            v = 1
            for _ in range(q + k):
                v = 2 * v + bit()
            v -= 1 << k
            previous += v // 2 if v % 2 == 0 else -(v + 1) // 2
            if not 0 <= previous <= 4095:
                raise FormatError("RAC-LAN-013: frequency out of range")
            result[table, symbol] = previous
        if result[table].sum() != 4096:
            raise FormatError("RAC-LAN-013: frequencies do not sum to 4096")
    if end - at >= 8 or any(bit() for _ in range(end - at)):
        raise FormatError("RAC-LAN-014: bits behind the tables")
    return result


def classes(section: bytes, n: int, k: int) -> Ints:
    """Section 7."""
    if k == 1:
        if section:
            raise FormatError("RAC-LAN-015: section of a single class is not empty")
        return np.zeros(n, np.int64)
    content = section if len(section) == n else decompress(section, n)  # RAC-LAN-016
    result = np.frombuffer(content, np.uint8).astype(np.int64)
    if result.max() >= k:
        raise FormatError("RAC-LAN-017: class out of range")
    return result


@dataclass(frozen=True)
class Parts:
    """Bytes of a tile by kind, for `parts` of the index (container.md section 11)."""

    directory: int
    words: int
    escapes: int
    planes: int
    padding: int


@dataclass(frozen=True)
class Cut:
    """Section 9: a tile unit in its parts."""

    words: Words
    counts: Ints  # words of each lane
    escapes: Ints
    raw: Values  # of each element, in sequence order
    parts: Parts


def cut(unit: bytes, p: Parameters, n: int) -> Cut:
    """Cut the unit of a tile of n words."""
    at = 0
    parts: list[int] = []

    def take(size: int) -> bytes:
        """One row of the layout and the padding behind it."""
        nonlocal at
        start, end = at, at + size
        at = end + -end % 16
        if len(unit) < at:
            raise FormatError("RAC-LAN-020: unit is too short")
        if any(unit[end:at]):
            raise FormatError("RAC-LAN-021: padding is not zero")
        parts.append(size)
        return unit[start:end]

    powers = [power for power in POWERS if p.raw_bits & power]
    plain = [-(-n * power // 8) for power in powers]
    sized = 4 * len(powers) if p.packed else 0
    directory = take(4 + sized + 2 * p.lanes)
    stored = np.frombuffer(directory[4 : 4 + sized], "<u4").tolist() if p.packed else plain
    counts = np.frombuffer(directory, "<u2", offset=4 + sized).astype(np.int64)
    words = np.frombuffer(take(4 * int(counts.sum())), "<u4").astype(np.uint32)
    escapes = np.frombuffer(take(int.from_bytes(directory[:4], "little")), np.uint8).astype(np.int64)
    raw = np.zeros(n, np.uint64)
    low = 0
    for power, plain_size, size in zip(powers, plain, stored, strict=True):
        if size > plain_size:
            raise FormatError("RAC-LAN-028: stored size of a plane")
        data = take(size)
        if size < plain_size:
            data = decompress(data, plain_size)
        raw |= plane(data, power, n) << np.uint64(low)
        low += power
    if at != len(unit):
        raise FormatError("RAC-LAN-020: unit is too long")
    return Cut(words, counts, escapes, raw, Parts(parts[0], parts[1], parts[2], sum(parts[3:]), len(unit) - sum(parts)))


def order(p: Parameters, shared: Shared, row_classes: Ints, col_classes: Ints) -> tuple[Ints, list[tuple[int, int]]]:
    """Section 8: the place in the tile of each element, in sequence order, and (table, elements) of each segment.

    Elements are sorted by table, class of row, class of column: no class counts that does not occur in the tile.
    """
    blocks = (row_classes[:, None] * p.cols + col_classes[None, :]).reshape(-1)
    block_tables = shared.class_map.reshape(-1)[blocks]
    elements = np.bincount(block_tables, minlength=p.tables)
    return np.lexsort((blocks, block_tables)), [(int(t), int(elements[t])) for t in np.flatnonzero(elements)]


def coded_symbols_of(unit: Cut, p: Parameters, shared: Shared, segments: list[tuple[int, int]]) -> list[Ints]:
    """Section 10: the coded symbols of each segment."""
    rows = [(table, -(-m // p.per)) for table, m in segments]
    coded = [np.zeros(count, np.int64) for _, count in rows]
    for lane, own in enumerate(words_of_lanes(unit.words, unit.counts, rows, shared)):
        todo = [(table, max(0, -(-(count - lane) // p.lanes))) for table, count in rows]
        for segment, symbols in enumerate(decode_lane(own, todo, shared)):
            coded[segment][lane :: p.lanes] = symbols
    return coded


def decode_tile(
    unit: bytes, p: Parameters, shared: Shared, row_classes: Ints, col_classes: Ints
) -> tuple[Values, Parts]:
    """Sections 8 to 11: the h x w words of one tile."""
    n = len(row_classes) * len(col_classes)
    parts = cut(unit, p, n)
    sequence, segments = order(p, shared, row_classes, col_classes)
    coded = coded_symbols_of(parts, p, shared, segments)

    # Section 4: coded symbols to base symbols; RAC-LAN-019: fillers go.
    pairs = coded_symbols(p)
    symbols = np.concatenate([pairs[part].reshape(-1)[:m] for part, (_, m) in zip(coded, segments, strict=True)])

    # Section 11.
    escaping = symbols >= len(p.tops)
    if int(escaping.sum()) != len(parts.escapes):
        raise FormatError("RAC-LAN-027: number of escapes")
    tops = np.array(p.tops + p.escapes, np.int64)[symbols]
    tops[escaping] += parts.escapes
    if tops.max() >= p.limit:
        raise FormatError("RAC-LAN-026: escaped top out of range")
    value = tops.astype(np.uint64) << np.uint64(p.shift)
    value |= parts.raw & np.uint64((1 << p.shift) - 1)
    if p.sign:
        value |= (parts.raw >> np.uint64(p.shift)) << np.uint64(p.width - p.zero - 1)
    value <<= np.uint64(p.zero)
    tile = np.empty(n, np.uint64)
    tile[sequence] = value
    return tile.reshape(len(row_classes), len(col_classes)), parts.parts


def plane(data: bytes, power: int, n: int) -> Values:
    """Section 9: the n numbers of `power` bits in a raw plane."""
    if power >= 8:
        return np.frombuffer(data, f"<u{power // 8}").astype(np.uint64)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[n * power :].any():
        raise FormatError("RAC-LAN-022: bits behind a plane")
    result = np.zeros(n, np.uint64)
    for digit in range(power):
        result |= bits[digit : n * power : power].astype(np.uint64) << np.uint64(digit)
    return result


def words_of_lanes(words: Words, counts: Ints, segments: list[tuple[int, int]], shared: Shared) -> list[Words]:
    """Section 10: which lane takes which word; `segments` are (table, coded symbols).

    A row of lanes is stepped at once, for the states alone. The symbols are left to decode_lane.
    """
    lanes = len(counts)
    taken: list[list[int]] = [[] for _ in range(lanes)]
    x = np.zeros(lanes, np.uint64)
    left = counts.copy()
    at = 0
    for lane in range(lanes):
        for _ in range(min(2, int(counts[lane]))):
            x[lane] = x[lane] << np.uint64(32) | np.uint64(words[at])
            taken[lane].append(at)
            at += 1
            left[lane] -= 1
    for table, count in segments:
        if table not in shared.slots:
            frequencies = shared.tables[table].astype(np.uint64)
            owner = np.repeat(np.arange(len(frequencies)), shared.tables[table])
            shared.slots[table] = frequencies, np.cumsum(frequencies) - frequencies, owner
        frequencies, starts, owner = shared.slots[table]
        for first in range(0, count, lanes):
            state = x[: count - first]
            q = state & np.uint64(0xFFFFFF)
            s = owner[q >> np.uint64(12)]
            state = (state >> np.uint64(24)) * (frequencies[s] << np.uint64(12)) + q - (starts[s] << np.uint64(12))
            takers = np.flatnonzero((state < np.uint64(1 << 32)) & (left[: count - first] > 0))
            for lane in takers.tolist():
                state[lane] = state[lane] << np.uint64(32) | np.uint64(words[at])
                taken[lane].append(at)
                at += 1
            left[takers] -= 1
            x[: count - first] = state
    if left.any():
        raise ChecksumError("RAC-LAN-024: words are left")
    return [words[np.array(own, np.int64)] for own in taken]


def decode_lane(words: Words, todo: list[tuple[int, int]], shared: Shared) -> list[Ints]:
    """Section 10 through constriction: for each (table, count) of todo its coded symbols."""
    if len(words) and words[0] == 0:
        raise FormatError("RAC-LAN-023: first word of a lane is 0")
    # constriction's coder is a stack: it takes its first word from the end of the array.
    ansc = constriction.stream.stack.AnsCoder
    coder = ansc(np.ascontiguousarray(words[::-1])) if len(words) else ansc()
    result = []
    for table, count in todo:
        if count == 0:
            result.append(np.zeros(0, np.int64))
            continue
        present = np.flatnonzero(shared.tables[table])  # a model takes no frequency of 0
        if table not in shared.models:
            shared.models[table] = constriction.stream.model.Categorical(
                shared.tables[table][present] / 4096.0, perfect=True
            )
        result.append(present[coder.decode(shared.models[table], count)])
    if not coder.is_empty():
        raise ChecksumError("RAC-LAN-024: lane does not end in state 0 with all words taken")
    return result


def decode_lane_integers(words: list[int], todo: list[tuple[list[int], int]]) -> list[list[int]]:
    """Section 10 in plain integers, word for word as the text; for each (frequencies, count) its symbols."""
    if words and words[0] == 0:
        raise FormatError("RAC-LAN-023: first word of a lane is 0")
    x, taken = 0, min(2, len(words))
    for word in words[:2]:
        x = x << 32 | word
    result = []
    for frequencies, count in todo:
        symbols = []
        for _ in range(count):
            q = x % 2**24
            slot = q // 2**12
            s, start = 0, 0
            while slot >= start + frequencies[s]:
                start += frequencies[s]
                s += 1
            x = (x // 2**24) * frequencies[s] * 2**12 + q - start * 2**12
            if x < 2**32 and taken < len(words):
                x = x * 2**32 + words[taken]
                taken += 1
            symbols.append(s)
        result.append(symbols)
    if x or taken < len(words):
        raise ChecksumError("RAC-LAN-024: lane does not end in state 0 with all words taken")
    return result
