"""A tensor to the units, head and index row of its record; `budget` and `pack` both need to know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.encode import ties
from rac.encode.code.plan import Encoder, Level, Plan, axis_of
from rac.encode.code.table import analyse, proposed
from rac.encode.encoded import Bytes, Encoded, Fidelity
from rac.encode.sources import Attachment, SourceTensor
from rac.errors import SourceError
from rac.grid import Grid
from rac.stages.base import Chain, Numbers, Product
from rac.tensor import parts

PIECE = 1 << 22  # bytes of words that a thread codes at once, about


@dataclass(frozen=True, slots=True)
class Behind:
    """What stands behind the coder in the record of a quantised tensor."""

    numbers: Numbers
    digest: bytes  # XXH3-128 of the dense bytes that a decoder restores
    source: bytes  # XXH3-128 of the bytes that were packed
    product: Product | None = None
    uses: tuple[str, ...] = ()  # names of the objects that the product computes with; their records come first
    alignment: str = ""  # a note for people: decoding needs to know nothing of it


def lossless(t: SourceTensor, level: Level) -> Encoder:
    """What encodes a tensor losslessly."""
    return analyse(lambda grid, a, b: _words(t, grid, a, b), t.dtype, t.shape, level)


def estimate(t: SourceTensor, level: Level) -> int:
    """About the bytes that a tensor takes losslessly."""
    return proposed(lambda grid, a, b: _words(t, grid, a, b), t.dtype, t.shape, level)[1]


def pieces(grid: Grid) -> list[range]:
    """Rows of tiles that are coded at once: about PIECE bytes of words."""
    most = max(1, PIECE // max(1, grid.tr * grid.cols * grid.word))
    return [range(a, min(grid.down, a + most)) for a in range(0, grid.down, most)]


def whole(group: ties.Group, level: Level) -> Encoded:
    """A lossless tensor, coded by one thread."""
    t = group.tensor
    encoder = lossless(t, level)
    units = [unit for rows in pieces(encoder.plan.grid) for unit in band(t, encoder, rows)]
    return encoded(group, encoder.plan, [*encoder.plan.fronts, *units], objects=matrix_of(t, level))


def band(t: SourceTensor, encoder: Encoder, rows: range) -> list[Bytes]:
    """Units of rows of the grid of tiles."""
    grid = encoder.plan.grid
    r0, r1 = grid.box(rows.start * grid.across).r0, grid.box(rows.stop * grid.across - 1).r1
    words = _words(t, grid, r0, r1) if encoder.words is None else encoder.words[r0:r1]
    return encoder.encode(words, rows)


def coded(words: NDArray[np.uint8], level: Level) -> tuple[Plan, list[Bytes]]:
    """How a matrix (R, C) of integers is stored, and the units of its tiles."""
    encoder = analyse(lambda _, a, b: words[a:b], "U8", words.shape, level)
    return encoder.plan, tiles(encoder, words)


def tiles(encoder: Encoder, words: NDArray[Any]) -> list[Bytes]:
    """Units of all tiles of a matrix (R, C) of words."""
    return encoder.encode(words, range(encoder.plan.grid.down))


def _words(t: SourceTensor, grid: Grid, a: int, b: int) -> NDArray[Any]:
    row = grid.cols * grid.word
    return t.read(a * row, b * row).view(f"<u{grid.word}").reshape(b - a, grid.cols)


def attachment(file: Attachment) -> Encoded:
    """The record of a file that travels along."""
    data = file.read()
    unit = zstd.shorter(data, 19 if len(data) < 1 << 22 else 9)
    method = "raw/1" if unit is data else "zstd/1"
    head = {"digest": zstd.digest(data), "name": file.name, "size": len(data), "stages": [{"id": method}]}
    return Encoded(head, [unit], {"method": method})


def head(group: ties.Group, plan: Plan, behind: Behind | None = None) -> dict[str, Any]:
    """The head of a tensor record, but for its units."""
    t = group.tensor
    out = _head(t.name, t.dtype, t.shape, axis_of(t.shape), plan, _chain(plan, behind))
    if behind:
        out |= {"digest": behind.digest, "x-source": behind.source}
        if behind.alignment:
            out["x-align"] = behind.alignment
        if behind.product is not None:
            out["uses"] = list(behind.uses)
    if group.aliases:
        out["aliases"] = [list(a) for a in group.aliases]
    if group.extra:
        out["extra"] = group.extra
    if t.online:
        out["online"] = t.online.to_head()
    return out


def _head(name: str, dtype: str, shape: tuple[int, ...], axis: int, plan: Plan, chain: Chain) -> dict[str, Any]:
    out = {"name": name, "dtype": dtype, "shape": list(shape), "axis": axis, "digest": plan.digest}
    return out | {"tile": [plan.grid.tr, plan.grid.tc], "stages": chain.to_head()}


def _chain(plan: Plan, behind: Behind | None) -> Chain:
    return Chain(plan.coder, behind.numbers, behind.product) if behind else Chain(plan.coder)


def encoded(
    group: ties.Group,
    plan: Plan,
    units: Sequence[Bytes],
    behind: Behind | None = None,
    objects: tuple[Encoded, ...] = (),
    fidelity: Fidelity | None = None,
) -> Encoded:
    """A tensor, all of whose units are there."""
    row = _row(_chain(plan, behind), group.tensor.dtype, group.tensor.shape, plan, units)
    return Encoded(head(group, plan, behind), units, row | {"aliases": group.aliases}, objects, fidelity)


def _row(chain: Chain, dtype: str, shape: tuple[int, ...], plan: Plan, units: Sequence[Bytes]) -> dict[str, Any]:
    of_kind = parts(plan.grid, chain, [len(u) for u in units], lambda i, size: bytes(units[i][:size]))
    return {"method": chain.method, "dtype": dtype, "shape": shape, "parts": of_kind}


def encoded_object(
    name: str, plan: Plan, units: list[Bytes], numbers: Numbers | None = None, digest: bytes | None = None
) -> Encoded:
    """An object (R, C) of F32; of a quantised one the numbers behind its coder, and the digest of its dense bytes."""
    chain, shape = Chain(plan.coder, numbers), (plan.grid.rows, plan.grid.cols)
    head = _head(name, "F32", shape, 1, plan, chain)
    if digest is not None:
        head["digest"] = digest
    return Encoded(head, units, _row(chain, "F32", shape, plan, units))


def matrix_of(t: SourceTensor, level: Level) -> tuple[Encoded, ...]:
    """The object that the online transform of a tensor names, bit for bit; none where it names none."""
    if t.online is None or not t.online.object:
        return ()
    if t.matrix is None or t.matrix.shape != (t.online.size, t.online.size):
        raise SourceError(f"tensor {t.name!r} comes without the matrix of its online transform")
    matrix = np.ascontiguousarray(t.matrix, "<f4")
    source = SourceTensor(t.online.object, "F32", matrix.shape, matrix.reshape(-1).view(np.uint8))
    encoder = lossless(source, level)
    units = [*encoder.plan.fronts, *tiles(encoder, matrix.view("<u4"))]
    return (encoded_object(source.name, encoder.plan, units),)
