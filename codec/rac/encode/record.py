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
from rac.encode.code.table import analyse
from rac.encode.encoded import Bytes, Encoded
from rac.encode.sources import Attachment, SourceTensor
from rac.errors import SourceError
from rac.grid import Grid, boxes
from rac.stages.base import Chain, Numbers, Product
from rac.tensor import parts


@dataclass(frozen=True, slots=True)
class Behind:
    """What stands behind the coder in the record of a quantised tensor."""

    numbers: Numbers
    digest: bytes
    """XXH3-128 of the dense bytes that a decoder restores."""
    source: bytes
    """XXH3-128 of the bytes that were packed."""
    product: Product | None = None
    uses: tuple[str, ...] = ()
    """Names of the objects that the product computes with; their records come first."""
    alignment: str = ""
    """A note for people: decoding needs to know nothing of it."""


def lossless(t: SourceTensor, level: Level) -> Encoder:
    """What encodes a tensor losslessly."""
    return analyse(lambda grid, a, b: _words(t, grid, a, b), t.dtype, t.shape, level)


def band(t: SourceTensor, encoder: Encoder, a: int) -> list[Bytes]:
    """Units of row `a` of the grid of tiles."""
    grid = encoder.plan.grid
    r0, r1, _, _ = grid.box(a * grid.across)
    words = encoder.words
    words = _words(t, grid, r0, r1) if words is None else words[r0:r1]
    return [
        encoder.encode(words[:, (b := grid.box(i))[2] : b[3]], i) for i in range(a * grid.across, (a + 1) * grid.across)
    ]


def coded(words: NDArray[np.uint8], level: Level) -> tuple[Plan, list[Bytes]]:
    """How a matrix (R, C) of integers is stored, and the units of its tiles."""
    encoder = analyse(lambda _, a, b: words[a:b], "U8", words.shape, level)
    return encoder.plan, tiles(encoder, words)


def tiles(encoder: Encoder, words: NDArray[Any]) -> list[Bytes]:
    """Units of all tiles of a matrix (R, C) of words."""
    return [encoder.encode(words[b.r0 : b.r1, b.c0 : b.c1], i) for i, b in enumerate(boxes(encoder.plan.grid))]


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
    out: dict[str, Any] = {
        "axis": axis_of(t.shape),
        "digest": plan.digest,
        "dtype": t.dtype,
        "name": t.name,
        "shape": list(t.shape),
        "stages": _chain(plan, behind).to_head(),
        "tile": [plan.grid.tr, plan.grid.tc],
    }
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


def _chain(plan: Plan, behind: Behind | None) -> Chain:
    return Chain(plan.coder, behind.numbers, behind.product) if behind else Chain(plan.coder)


def fields(group: ties.Group, plan: Plan, units: Sequence[Bytes], behind: Behind | None = None) -> dict[str, Any]:
    """What the index row of a tensor adds to its record."""
    t = group.tensor
    return _row(_chain(plan, behind), t.dtype, t.shape, plan, units) | {"aliases": group.aliases}


def _row(chain: Chain, dtype: str, shape: tuple[int, ...], plan: Plan, units: Sequence[Bytes]) -> dict[str, Any]:
    of_kind = parts(plan.grid, chain, [len(u) for u in units], lambda i, size: bytes(units[i][:size]))
    return {"method": chain.method, "dtype": dtype, "shape": shape, "parts": of_kind}


def object_head(name: str, plan: Plan, numbers: Numbers | None = None, digest: bytes | None = None) -> dict[str, Any]:
    """The head of an object record, but for its units.

    Args:
        name: Name of the object; no other object of the file has it.
        plan: How the coder stores the matrix (R, C): its F32 words, or the words of one byte of a quantised one.
        numbers: The stage behind the coder of a quantised matrix.
        digest: Digest of the dense F32 bytes of a quantised matrix; None: the plan's.
    """
    grid = plan.grid
    return {
        "axis": 1,
        "digest": plan.digest if digest is None else digest,
        "dtype": "F32",
        "name": name,
        "shape": [grid.rows, grid.cols],
        "stages": Chain(plan.coder, numbers).to_head(),
        "tile": [grid.tr, grid.tc],
    }


def object_fields(plan: Plan, units: Sequence[Bytes], numbers: Numbers | None = None) -> dict[str, Any]:
    """What the index row of an object adds to its record."""
    return _row(Chain(plan.coder, numbers), "F32", (plan.grid.rows, plan.grid.cols), plan, units)


def matrix_of(t: SourceTensor, level: Level) -> tuple[Encoded, ...]:
    """The object that the online transform of a tensor names, bit for bit; none where it names none."""
    if t.online is None or not t.online.object:
        return ()
    if t.matrix is None or t.matrix.shape != (t.online.size, t.online.size):
        raise SourceError(f"tensor {t.name!r} comes without the matrix of its online transform")
    data = np.ascontiguousarray(t.matrix, "<f4").reshape(-1).view(np.uint8)
    source = SourceTensor(t.online.object, "F32", t.matrix.shape, data)
    encoder = lossless(source, level)
    plan = encoder.plan
    units = [*plan.fronts, *tiles(encoder, np.ascontiguousarray(t.matrix, "<f4").view("<u4"))]
    return (Encoded(object_head(source.name, plan), units, object_fields(plan, units)),)
