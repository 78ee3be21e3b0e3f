"""A tensor to the units, head and index row of its record; `budget` and `pack` both need to know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import tensor as tn
from rac.container import zstd
from rac.encode import ties
from rac.encode.code.plan import Level, Plan, analyse, axis_of
from rac.encode.code.tile import TileEncoder
from rac.encode.encoded import Bytes, Encoded
from rac.encode.sources import Attachment, SourceTensor
from rac.errors import SourceError
from rac.stages.groups import Groups
from rac.stages.lanes import layout as ll
from rac.stages.trellis import Trellis


@dataclass(frozen=True, slots=True)
class Behind:
    """What stands behind the coder in the record of a quantised tensor."""

    lossy: Trellis | Groups
    digest: bytes
    """Of what a decoder restores."""
    source: bytes
    """Of what was packed."""
    after: str = ""
    """`id` of a stage behind the trellis: "lowrank/1" or "basis/1"."""
    uses: tuple[str, ...] = ()
    """Names of the objects that it computes with; their records come first."""
    alignment: str = ""
    """A note for people: decoding needs to know nothing of it."""


def lossless(t: SourceTensor, level: Level) -> TileEncoder:
    """Analyse a tensor."""
    return TileEncoder(analyse(lambda grid, a, b: _words(t, grid, a, b), t.dtype, t.shape, level))


def band(t: SourceTensor, encoder: TileEncoder, a: int) -> list[Bytes]:
    """Units of row `a` of the grid of tiles."""
    grid = encoder.plan.grid
    r0, r1, _, _ = grid.box(a * grid.across)
    words = encoder.plan.words
    words = _words(t, grid, r0, r1) if words is None else words[r0:r1]
    return [
        encoder.encode(words[:, (b := grid.box(i))[2] : b[3]], i) for i in range(a * grid.across, (a + 1) * grid.across)
    ]


def _words(t: SourceTensor, grid: ll.Grid, a: int, b: int) -> NDArray[Any]:
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
        "stages": [plan.stage],
        "tile": [plan.grid.tr, plan.grid.tc],
    }
    if behind:
        out["stages"].append(behind.lossy.to_head())
        out |= {"digest": behind.digest, "x-source": behind.source}
        if behind.alignment:
            out["x-align"] = behind.alignment
        if behind.after:
            out["stages"].append({"id": behind.after})
            out["uses"] = list(behind.uses)
    if group.aliases:
        out["aliases"] = [list(a) for a in group.aliases]
    if group.extra:
        out["extra"] = group.extra
    if t.online:
        out["online"] = t.online.to_head()
    return out


def fields(group: ties.Group, plan: Plan, units: Sequence[Bytes], behind: Behind | None = None) -> dict[str, Any]:
    """What the index row of a tensor adds to its record."""
    method = (behind.after or behind.lossy.id) if behind else plan.method
    t = group.tensor
    return _row(method, t.dtype, t.shape, plan, units, behind is not None) | {"aliases": group.aliases}


def _row(
    method: str, dtype: str, shape: tuple[int, ...], plan: Plan, units: Sequence[Bytes], lossy: bool
) -> dict[str, Any]:
    sizes = [len(u) for u in units]
    parts = tn.parts(plan.grid, plan.lanes, lossy, sizes, lambda i, size: bytes(units[i][:size]))
    return {"method": method, "dtype": dtype, "shape": shape, "parts": parts}


def object_head(name: str, plan: Plan, trellis: Trellis | None = None, digest: bytes | None = None) -> dict[str, Any]:
    """The head of an object record, but for its units.

    Args:
        name: Of the object; no other object of the file has it.
        plan: How the coder stores the matrix (R, C): its F32 words, or the words of one byte of a quantised one.
        trellis: Of a quantised matrix.
        digest: Of the dense F32 bytes of a quantised matrix; that of another one is the plan's.
    """
    grid = plan.grid
    return {
        "axis": 1,
        "digest": plan.digest if digest is None else digest,
        "dtype": "F32",
        "name": name,
        "shape": [grid.rows, grid.cols],
        "stages": [plan.stage, trellis.to_head()] if trellis else [plan.stage],
        "tile": [grid.tr, grid.tc],
    }


def object_fields(plan: Plan, units: Sequence[Bytes], trellis: Trellis | None = None) -> dict[str, Any]:
    """What the index row of an object adds to its record."""
    method = "trellis/1" if trellis else plan.method
    return _row(method, "F32", (plan.grid.rows, plan.grid.cols), plan, units, trellis is not None)


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
    units: list[Bytes] = [plan.shared] if plan.lanes else []
    for row in range(plan.grid.down):
        units += band(source, encoder, row)
    return (Encoded(object_head(source.name, plan), units, object_fields(plan, units)),)
