"""What a tensor record states, checked (format_spec/container.md, "Tensor records")."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import index, wire
from rac.container.zstd import digest
from rac.errors import ChecksumError, FormatError, LimitError, UnsupportedError
from rac.grid import Band, Box, Grid, dense_size, matrix, up16
from rac.records import Limits, Online, Record, Units
from rac.registry import DTYPES, RECORD_OBJECT
from rac.stages import online
from rac.stages.base import Chain, Context
from rac.stages.table import CODERS, NUMBERS, PRODUCTS

Array = NDArray[Any]
ShapeOf = Callable[[str], tuple[int, ...] | None]
"""Shape of an object that stands before a record, by its name; None where there is no such object."""
_NEEDED = {"axis", "digest", "dtype", "name", "shape", "stages", "tile", "units"}
_OPTIONAL = {"aliases", "extra", "needs", "online", "uses"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """The head of a tensor record, or of an object record, checked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    grid: Grid
    chain: Chain
    uses: tuple[str, ...]  # names of the objects that the product of the chain computes with
    word: int  # bytes of a word of the dense tensor; `grid.word` is that of the words that the coder restores
    units: Units
    digest: bytes
    aliases: tuple[tuple[str, bool], ...]
    extra: dict[str, Any]
    record: Record
    online: Online | None = None  # what the layer does to its input first; the dense tensor does not depend on it

    @property
    def type(self) -> int:
        """Type of the record."""
        return self.record.type

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the objects that decoding or running the layer needs, each once."""
        return tuple(dict.fromkeys((*self.uses, *([self.online.object] if self.online and self.online.object else []))))

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *(alias for alias, _ in self.aliases))

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.grid.rows * self.grid.cols * self.word

    @property
    def quantised(self) -> bool:
        """Whether the numbers are only near those which were packed."""
        return self.chain.numbers is not None

    @property
    def context(self) -> Context:
        """What the chain's numbers are opened with: in front of a product they are binary32."""
        dtype = self.dtype if self.chain.product is None else "F32"
        return Context(dtype, self.grid.rows, self.grid.cols, self.grid.word)

    @property
    def first(self) -> int:
        """Number of units in front of the tiles."""
        return len(self.chain.fronts)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.grid.tiles

    def most(self, i: int) -> int:
        """Bytes that unit `i` may have, so that a false size allocates little."""
        if i < self.first:
            return self.chain.fronts[i]
        return 2 * self.grid.tr * self.grid.tc * self.grid.word + 65536

    def bands(self, first: int = 0, last: int | None = None) -> Iterator[Band]:
        """Rows first..last - 1 of the grid: each row of tiles where a product computes whole rows, else all in one."""
        grid, end = self.grid, self.grid.down if last is None else last
        step = max(1, end - first) if self.chain.product is None else 1
        for a in range(first, end, step):
            box = Box(a * grid.tr, min(grid.rows, (a + step) * grid.tr), 0, grid.cols)
            yield Band(box, range(a * grid.across, (a + step) * grid.across))


_VALUES = operator.itemgetter("name", "dtype", "digest", "units", "axis")
_TYPES = [str, str, bytes, bytes, int]


def parse(record: Record, limits: Limits, shape_of: ShapeOf = lambda _: None) -> Tensor:
    """Check the head of a tensor or object in the order of format_spec/container.md; nothing larger is allocated."""
    head, is_object = record.head, record.type == RECORD_OBJECT
    aliases = _check_keys(record)
    name, dtype = head["name"], head["dtype"]
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r} is not known to this version", offset=record.at)
    shape = index.parse_shape(head["shape"], limits)
    ids = _stage_ids(record)
    if is_object and (dtype != "F32" or len(shape) != 2 or 0 in shape or head["axis"] != 1):
        raise FormatError("object is not a matrix of F32", offset=record.at)
    grid = _grid(record, shape, 1 if len(ids) > 1 else DTYPES[dtype].word, limits)
    if len(ids) == len(head["stages"][0]) == 1:
        chain = _bare(ids[0], dtype, grid.rows, grid.cols, grid.word)
    else:
        chain = _chain(head["stages"], Context(dtype, grid.rows, grid.cols, grid.word))
    uses = _uses(head.get("uses", []), chain, grid, shape_of, record.at)
    mapped = online.parse(head["online"], dtype, shape, shape_of, record.at) if "online" in head else None
    units = wire.parse_units(head["units"], record.payload_size)
    out = Tensor(
        *(name, dtype, shape, head["axis"], grid, chain, uses, DTYPES[dtype].word, units, head["digest"]),
        *(aliases, head.get("extra", {}), record, mapped),
    )
    _check_units(out, limits)
    return out


def _check_keys(record: Record) -> tuple[tuple[str, bool], ...]:
    """Check the keys of a head and the types of its values; its aliases."""
    head = record.head
    if head.keys() == _NEEDED:
        return _check_types(head, record.at)
    if missing := _NEEDED - head.keys():
        raise FormatError(f"tensor head lacks {min(missing)!r}", offset=record.at)
    allowed = _NEEDED if record.type == RECORD_OBJECT else _NEEDED | _OPTIONAL
    if unknown := [k for k in head.keys() - allowed if not k.startswith("x-")]:
        raise UnsupportedError(f"tensor head has the unknown field {min(unknown)!r}", offset=record.at)
    if head.get("needs", []) != []:  # room for what later versions need to be known
        raise UnsupportedError(f"tensor needs {head['needs']!r}, which this version does not know", offset=record.at)
    return _check_types(head, record.at)


def _check_types(head: dict[str, Any], at: int) -> tuple[tuple[str, bool], ...]:
    """FormatError unless every value has its type (format_spec/maps.cddl); ranges come later, each in its turn."""
    lists = shape, tile, stages, uses = head["shape"], head["tile"], head["stages"], head.get("uses", [])
    if (
        [*map(type, _VALUES(head))] != _TYPES
        or not isinstance(head.get("extra", {}), dict)
        or not isinstance(head.get("online", {}), dict)
        or {*map(type, lists)} != {list}
        or not {*map(type, stages)} <= {dict}
        or not {*map(type, uses)} <= {str}
        or not index.are_counts((*shape, *tile))
        or len(head["digest"]) != 16
        or len(tile) != 2
    ):
        raise FormatError("tensor head is malformed", offset=at)
    return index.parse_aliases(head["aliases"]) if "aliases" in head else ()


def _stage_ids(record: Record) -> list[str]:
    """The stages of a record, all of them known and in an order that the format allows."""
    stages = record.head["stages"]
    if len(stages) == 1 and isinstance(only := stages[0].get("id"), str) and only in CODERS:
        return [only]
    if not stages:
        raise FormatError("tensor has no stage", offset=record.at)
    ids = [s.get("id") for s in stages]
    tables: list[Any] = [CODERS, NUMBERS] if record.type == RECORD_OBJECT else [CODERS, NUMBERS, PRODUCTS]
    inside = (isinstance(i, str) and i in table for i, table in zip(ids, tables, strict=False))
    known = len(ids) <= len(tables) and all(inside)
    if not known or (len(ids) > 2 and ids[1] not in PRODUCTS[ids[2]].behind):
        raise UnsupportedError(f"stages {', '.join(map(str, ids))!r} are not known to this version", offset=record.at)
    return ids


def _grid(record: Record, shape: tuple[int, ...], word: int, limits: Limits) -> Grid:
    """The tensor as a matrix of words of `word` bytes, cut into tiles."""
    head, tile = record.head, record.head["tile"]
    if not 0 <= head["axis"] <= len(shape) or 0 in tile:
        raise FormatError("axis or tile shape is out of range", offset=record.at)
    rows, cols = _matrix(head["dtype"], shape, head["axis"])
    tr, tc = min(tile[0], max(1, rows)), min(tile[1], max(1, cols))
    if [tr, tc] != tile:
        raise FormatError("tile is larger than the tensor", offset=record.at)
    size = tr * tc * DTYPES[head["dtype"]].word
    if size > limits.tile:
        raise LimitError(f"tile of {size} bytes exceeds the limit of {limits.tile}", offset=record.at)
    return Grid(rows, cols, word, tr, tc)


@functools.lru_cache(256)
def _matrix(dtype: str, shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """`matrix` of a tensor that has whole bytes."""
    dense_size(dtype, shape)
    return matrix(dtype, shape, axis)


@functools.lru_cache(256)
def _bare(coder: str, *context: Any) -> Chain:
    """A coder without parameters, alone."""
    return Chain(CODERS[coder].from_head({"id": coder}, Context(*context)))


def _chain(stages: list[dict[str, Any]], context: Context) -> Chain:
    """The stages of a record, their parameters checked; their ids are known."""
    numbers = NUMBERS[stages[1]["id"]].from_head(stages[1], context) if len(stages) > 1 else None
    coder = CODERS[stages[0]["id"]].from_head(stages[0], context)
    product = PRODUCTS[stages[2]["id"]].from_head(stages[2]) if len(stages) > 2 else None
    return Chain(coder, numbers, product)


def _uses(names: list[str], chain: Chain, grid: Grid, shape_of: ShapeOf, at: int) -> tuple[str, ...]:
    """Names of the objects of a tensor; they are there, and have the shapes that the chain's product asks for."""
    wanted = 0 if chain.product is None else chain.product.objects
    if len(names) != wanted:
        raise FormatError(f"tensor uses {len(names)} objects, its stages {wanted}", offset=at)
    shapes = []
    for n in names:
        if (shape := shape_of(n)) is None:
            raise FormatError(f"object {n!r}, which the tensor uses, does not stand before it", offset=at)
        shapes.append(shape)
    if chain.product is not None:
        chain.product.check(shapes, grid.rows, grid.cols)
    return tuple(names)


def _check_units(t: Tensor, limits: Limits) -> None:
    """Number and sizes of the units, against the grid and against what a tile can need."""
    at, chain, size = t.record.at, t.chain, t.record.payload_size
    if len(t.units) != t.first + t.tiles:
        raise FormatError("number of units does not match the grid of tiles", offset=at)
    if t.first and not t.tiles:
        raise FormatError(f"an empty tensor has no {chain.method}", offset=at)
    if t.nbytes > limits.free_alloc + limits.expansion * size:
        raise LimitError(f"tensor of {t.nbytes} bytes from {size} stored bytes", offset=at)
    sizes, first, of_tile = t.units.sizes, t.first, t.most(t.first)
    large = [i for i, (n, most) in enumerate(zip(sizes, chain.fronts, strict=False)) if n > most]
    if max(sizes[first:], default=0) > of_tile:
        large += [i for i, n in enumerate(sizes) if i >= first and n > of_tile]
    if large:
        at = t.record.payload + t.units.starts[large[0]]
        raise FormatError(f"unit {large[0]} is larger than its tile can need", offset=at)


def extra_of(extra: dict[str, Any], name: str) -> dict[str, Any]:
    """What one name of a tensor carries: its own where it differs from the first, else that of the record."""
    own = extra.get("aliases", {})
    found: Any = own.get(name) if isinstance(own, dict) else None
    return found if isinstance(found, dict) else {k: v for k, v in extra.items() if k != "aliases"}


def empty(t: Tensor) -> Array:
    """The dense matrix of words (R, C), not yet filled; LimitError where memory is short."""
    return _room(t, (t.grid.rows, t.grid.cols), t.word)


def numbers(t: Tensor, rows: int, cols: int) -> Array:
    """Room for (rows, cols) words that the tiles are decoded to: binary32 in front of a product, else of the tensor."""
    return _room(t, (rows, cols), t.word if t.chain.product is None else 4)


def _room(t: Tensor, shape: tuple[int, int], word: int) -> Array:
    try:
        return np.empty(shape, f"<u{word}")
    except (MemoryError, ValueError) as e:
        raise LimitError(f"not enough memory for a tensor of {t.nbytes} bytes", unit=repr(t.name)) from e


def check_digest(t: Tensor, words: Array) -> None:
    """ChecksumError unless the decoded content has the digest that the record states."""
    if digest(np.ascontiguousarray(words).reshape(-1).view(np.uint8).data) != t.digest:
        raise ChecksumError("the decoded tensor is not the one that was packed", unit=repr(t.name), offset=t.record.at)


def _tile_sizes(grid: Grid) -> NDArray[np.int64]:
    """(tiles,) words of each tile."""
    high = np.minimum(grid.tr, grid.rows - np.arange(grid.down) * grid.tr)
    wide = np.minimum(grid.tc, grid.cols - np.arange(grid.across) * grid.tc)
    out: NDArray[np.int64] = np.outer(high, wide).reshape(-1)
    return out


def parts(grid: Grid, chain: Chain, sizes: list[int], first: Callable[[int, int], bytes]) -> tuple[int, ...]:
    """Payload bytes by kind (records.PARTS) of units of `sizes`; `first(i, n)` gives the first n bytes of unit i."""
    front, coder = len(chain.fronts), chain.coder
    of = (0, 0, 0, 0)
    if len(sizes) > front:
        firsts = [first(i, coder.directory) for i in range(front, len(sizes))]
        of = coder.parts(firsts, sizes[front:], _tile_sizes(grid))
    out = (sum(sizes[:front]), *of)
    return (*out, sum(map(up16, sizes)) - sum(out))
