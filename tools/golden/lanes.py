"""An encoder of lanes/1, written from stages/lanes.md alone; plain and slow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rac.container import zstd


@dataclass
class Lanes:
    """Parameters and free choices of one tensor under lanes/1. Names are those of the specification."""

    width: int
    lanes: int = 1
    packed: int = 0
    per: int = 1
    zero: int = 0
    sign: int = 0
    shift: int = 0
    runs: list[int] = field(default_factory=list)
    escapes: list[int] = field(default_factory=list)
    order: int = -2
    row_class: list[int] | None = None
    col_class: list[int] | None = None
    rows: int = 0
    """Row classes; 0: as many as are used."""
    cols: int = 0
    class_map: list[int] | None = None
    """Table of each class pair; one table each where absent."""
    tables: list[list[int]] | None = None
    """Frequencies; counted where absent."""
    filler: int = 0
    small_classes: bool = False
    """Classes in a Zstandard frame."""

    @property
    def plain(self) -> int:
        """E."""
        return sum(self.runs[1::2])

    @property
    def base(self) -> int:
        """B."""
        return self.plain + len(self.escapes)

    def pairs(self) -> list[tuple[int, ...]]:
        """Base symbols of each coded symbol (section 4)."""
        if self.per == 1:
            return [(s,) for s in range(self.base)]
        e, b = self.plain, self.base
        inner: list[tuple[int, ...]] = [(x, y) for y in range(e) for x in range(e)]
        return inner + [(x, y) for y in range(b) for x in range(b) if x >= e or y >= e]

    def symbol(self, top: int) -> tuple[int, int | None]:
        """(base symbol, escape byte) of a top."""
        first = 0
        for start, count in zip(self.runs[::2], self.runs[1::2], strict=True):
            if start <= top < start + count:
                return first + top - start, None
            first += count
        for j, escape in enumerate(self.escapes):
            if escape <= top < escape + 256:
                return first + j, top - escape
        raise ValueError(f"no symbol for top {top}")

    def powers(self) -> list[int]:
        """Planes, largest first."""
        return [b for b in (32, 16, 8, 4, 2, 1) if self.shift + self.sign & b]


def normalise(counts: Sequence[int]) -> list[int]:
    """Counts to frequencies that sum to 4096, none of which is 4096."""
    total = sum(counts)
    if total == 0:
        return [4095, 1] + [0] * (len(counts) - 2)
    f = [max(1, c * 4096 // total) if c else 0 for c in counts]
    while (left := 4096 - sum(f)) != 0:
        k = f.index(max(f))
        f[k] += max(left, 1 - f[k] // 2)
    if 4096 in f:
        k = f.index(4096)
        f[k], f[k - 1] = 4095, 1
    return f


def table_code(tables: list[list[int]], order: int) -> bytes:
    """Section 6 backwards."""
    bits = ""
    for table in tables:
        previous = 0
        for frequency in table:
            k = max(0, previous.bit_length() // 2 + order)
            d = frequency - previous
            v = (2 * d if d >= 0 else -2 * d - 1) + (1 << k)
            q = v.bit_length() - 1 - k
            bits += "0" * q + f"{v:b}"
            previous = frequency
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


def encode_lanes(
    symbols: list[tuple[int, int]], lanes: list[int], tables: list[list[int]], count: int
) -> tuple[list[int], list[int]]:
    """(words of all `count` lanes in the order of reading, words of each), section 14.

    `symbols` are (table, coded symbol) in order, `lanes` the lane of each.
    """
    states, counts, out = [0] * count, [0] * count, []

    def emit(lane: int) -> None:
        out.append(states[lane] & 0xFFFFFFFF)
        states[lane] >>= 32
        counts[lane] += 1

    for (table, s), lane in zip(reversed(symbols), reversed(lanes), strict=True):
        frequency = tables[table][s]
        f, g = frequency << 12, sum(tables[table][:s]) << 12
        if not frequency:
            raise ValueError(f"symbol {s} has frequency 0 in table {table}")
        if states[lane] >= f << 40:
            emit(lane)
        x = states[lane]
        states[lane] = ((x // f) << 24) + x % f + g
    for lane in reversed(range(count)):
        while states[lane]:
            emit(lane)
    return out[::-1], counts


def plane(values: list[int], bits: int) -> bytes:
    """Element k at bits k x bits onwards."""
    whole = 0
    for k, v in enumerate(values):
        whole |= v << k * bits
    return whole.to_bytes(-(-len(values) * bits // 8), "little")


def up16(data: bytes) -> bytes:
    """Padded to 16."""
    return data + bytes(-len(data) % 16)


@dataclass
class Coded:
    """A tensor under lanes/1."""

    stage: dict[str, Any]
    units: list[bytes]
    parts: tuple[int, ...]
    steps: list[tuple[list[tuple[int, int]], list[list[Any]]]]
    """Of each tile: the places of its elements in sequence order, and (table, coded symbols) of its segments."""


def encode(p: Lanes, words: list[int], rows: int, cols: int, tr: int, tc: int) -> Coded:
    """Stage map, units and index parts of a matrix of words."""
    row_class = p.row_class or [0] * rows
    col_class = p.col_class or [0] * cols
    kr, kc = p.rows or max(row_class) + 1, p.cols or max(col_class) + 1
    class_map = p.class_map or list(range(kr * kc))
    if len(class_map) != kr * kc:
        raise ValueError("class map has another size")
    count = len(p.tables) if p.tables else max(class_map) + 1
    pairs = p.pairs()
    number = {pair: s for s, pair in enumerate(pairs)}
    counts = [[0] * len(pairs) for _ in range(count)]
    tiles, steps = [], []
    for r0 in range(0, rows, tr):
        for c0 in range(0, cols, tc):
            segments: dict[int, list[tuple[int, int]]] = {}
            places = [(y, x) for y in range(r0, min(rows, r0 + tr)) for x in range(c0, min(cols, c0 + tc))]
            blocks = [row_class[y] * kc + col_class[x] for y, x in places]
            for _, _, y, x in sorted((class_map[b], b, y, x) for b, (y, x) in zip(blocks, places, strict=True)):
                segments.setdefault(class_map[row_class[y] * kc + col_class[x]], []).append((y, x))
            coded: dict[int, list[int]] = {}
            escapes, raw = bytearray(), []
            for t, elements in segments.items():
                base = []
                for y, x in elements:
                    w = words[y * cols + x]
                    if w & ((1 << p.zero) - 1):
                        raise ValueError("low bits are not zero")
                    v = w >> p.zero
                    signbit = v >> (p.width - p.zero - 1) if p.sign else 0
                    top = (v & ((1 << (p.width - p.zero - p.sign)) - 1)) >> p.shift
                    raw.append(v & ((1 << p.shift) - 1) | signbit << p.shift)
                    s, escape = p.symbol(top)
                    base.append(s)
                    if escape is not None:
                        escapes.append(escape)
                base += [p.filler] * (-len(base) % p.per)
                coded[t] = [number[tuple(base[i : i + p.per])] for i in range(0, len(base), p.per)]
                for s in coded[t]:
                    counts[t][s] += 1
            tiles.append((coded, bytes(escapes), raw))
            steps.append(
                ([place for found in segments.values() for place in found], [[t, s] for t, s in coded.items()])
            )
    tables = p.tables or [normalise(c) for c in counts]

    def classes(values: list[int] | None) -> bytes:
        if values is None:
            return b""
        packed = zstd.compress(bytes(values)) if p.small_classes else bytes(values)
        if p.small_classes and len(packed) == len(values):
            raise ValueError("the frame would be taken for the classes themselves")
        return packed

    sections = [table_code(tables, p.order), classes(p.row_class), classes(p.col_class)]
    shared = b"".join(sections) + bytes(class_map)
    stage: dict[str, Any] = {
        "id": "lanes/1",
        "lanes": p.lanes,
        "packed": p.packed,
        "per": p.per,
        "zero": p.zero,
        "sign": p.sign,
        "shift": p.shift,
        "runs": p.runs,
        "escapes": p.escapes,
        "tables": len(tables),
        "order": p.order,
        "rows": kr,
        "cols": kc,
        "sizes": [len(s) for s in sections],
    }
    units = [shared]
    parts = [len(shared), 0, 0, 0, 0]
    for coded, escape_bytes, raw in tiles:
        sequence = [(t, s) for t, symbols in coded.items() for s in symbols]
        owners = [i % p.lanes for symbols in coded.values() for i in range(len(symbols))]
        stream, word_counts = encode_lanes(sequence, owners, tables, p.lanes)
        planes, low = [], 0
        for b in p.powers():
            data = plane([v >> low & ((1 << b) - 1) for v in raw], b)
            if p.packed and len(small := zstd.compress(data)) < len(data):
                data = small
            planes.append(data)
            low += b
        directory = len(escape_bytes).to_bytes(4, "little")
        if p.packed:
            directory += b"".join(len(d).to_bytes(4, "little") for d in planes)
        directory += b"".join(n.to_bytes(2, "little") for n in word_counts)
        flat = b"".join(w.to_bytes(4, "little") for w in stream)
        units.append(b"".join(up16(d) for d in (directory, flat, escape_bytes, *planes)))
        for k, n in enumerate((len(directory), len(flat), len(escape_bytes), sum(map(len, planes))), 1):
            parts[k] += n
    return Coded(stage, units, (*parts, sum(len(up16(u)) for u in units) - sum(parts)), steps)
