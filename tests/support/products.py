"""Archives with objects and tensors of three stages, made of what `pack` is made of, and what they decode to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rac.encode.code.tile import TileEncoder

from rac.container import zstd
from rac.container.index import content_digest
from rac.container.writer import Writer
from rac.encode import record as rec
from rac.encode.code.plan import LEVELS, Level, analyse
from rac.encode.sources import SourceTensor
from rac.encode.ties import Group
from rac.registry import RECORD_OBJECT, RECORD_TENSOR
from rac.stages import basis, lowrank
from rac.stages import trellis as tr

Array = NDArray[Any]
HEADER: dict[str, Any] = {"features": []}


@dataclass(frozen=True)
class Coded:
    """A matrix of F32 as records hold it."""

    encoder: TileEncoder
    units: list[rec.Bytes]
    trellis: tr.Trellis | None
    values: NDArray[np.float32]


def exact(values: NDArray[np.float32]) -> Coded:
    """Behind a coder alone."""
    t = SourceTensor("", "F32", values.shape, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
    encoder = rec.lossless(t, LEVELS["default"])
    units: list[rec.Bytes] = [encoder.plan.shared] if encoder.plan.lanes else []
    for row in range(encoder.plan.grid.down):
        units += rec.band(t, encoder, row)
    return Coded(encoder, units, None, values)


def quantised(
    words: NDArray[np.uint8], seed: int, outliers: int = 0, states: int = 16, level: Level = LEVELS["default"]
) -> Coded:
    """Behind a coder and trellis/1: random scales, and outliers of random bits at random places."""
    rng = np.random.default_rng(seed)
    r, c = words.shape
    plan = replace(analyse(lambda _, a, b: words[a:b], "U8", words.shape, level), words=words)
    rows, cols = (rng.integers(-9, 10, n).astype(np.int8) for n in (r, c))
    flat = np.sort(rng.choice(r * c, min(outliers, r * c), replace=False))
    places = np.stack([flat // c, flat % c], axis=1)
    wild = np.frombuffer(rng.bytes(4 * len(flat)), np.uint32)
    sizes, unit = tr.build_unit(np.array([3, -4, 5], np.int8), rows, cols, places, wild)
    p = tr.Trellis(states, 128, 127, 0x3C800000, sizes)
    encoder = TileEncoder(plan)
    units: list[rec.Bytes] = [*([plan.shared] if plan.lanes else []), unit]
    for row in range(plan.grid.down):
        units += rec.band(SourceTensor("", "U8", words.shape, words.reshape(-1)), encoder, row)
    values, tables = np.empty((r, c), np.uint32), tr.parse_unit(unit, p, "F32", r, c)
    for i in range(plan.grid.down * plan.grid.across):
        a, b, x, y = box = plan.grid.box(i)
        tr.decode(np.ascontiguousarray(words[a:b, x:y]), p, tables, box, values[a:b, x:y], "F32", True)
    return Coded(encoder, units, p, values.view(np.float32))


def joined(v: NDArray[np.float32], dtype: str, objects: Sequence[NDArray[np.float32]]) -> Array:
    """Words of the data type, by numpy."""
    if not objects:
        return tr.to_words(v, dtype)
    out = lowrank.join(v.copy(), *objects, reference=True) if len(objects) == 2 else basis.join(v, objects[0], True)
    return tr.to_words(out, dtype)


class Maker:
    """Writes an archive; `dense` has the words of its tensors."""

    def __init__(self, path: Path, header: dict[str, Any] | None = None) -> None:
        self._writer = Writer(path, force=True)
        self._writer.start(header or HEADER)
        self._objects: dict[str, NDArray[np.float32]] = {}
        self._content: list[list[Any]] = []
        self.groups: list[Group] = []
        self.dense: dict[str, Array] = {}

    def object(self, name: str, m: Coded) -> None:
        """Add an object."""
        self._objects[name] = m.values
        digest = zstd.digest(m.values.tobytes()) if m.trellis else None
        head = rec.object_head(name, m.encoder.plan, m.trellis, digest)
        self._writer.add(RECORD_OBJECT, 0, head, m.units, **rec.object_fields(m.encoder.plan, m.units, m.trellis))

    def tensor(self, name: str, dtype: str, m: Coded, uses: Sequence[str], source: bytes = bytes(16)) -> None:
        """Add a tensor that uses two objects (lowrank/1), one (basis/1) or none."""
        assert m.trellis is not None
        words = joined(m.values, dtype, [self._objects[n] for n in uses])
        digest = zstd.digest(words.tobytes())
        after = ("", "basis/1", "lowrank/1")[len(uses)]
        behind = rec.Behind(m.trellis, digest, source, after, tuple(uses))
        group = Group(SourceTensor(name, dtype, words.shape, words.view(np.uint8).reshape(-1)), (), {})
        plan = m.encoder.plan
        head = rec.head(group, plan, behind)
        self._writer.add(RECORD_TENSOR, 0, head, m.units, **rec.fields(group, plan, m.units, behind))
        self._content.append([name, dtype, list(words.shape), digest])
        self.groups.append(group)
        self.dense[name] = words

    def finish(self) -> None:
        """Write the index."""
        self._writer.finish(content_digest(self._content))

    def stop(self) -> None:
        """Leave the part behind."""
        self._writer.flush()
        self._writer.close()


def words(seed: int, rows: int, cols: int) -> NDArray[np.uint8]:
    """Words around 128."""
    rng = np.random.default_rng(seed)
    out: NDArray[np.uint8] = np.clip(np.rint(128 + 2.5 * rng.standard_normal((rows, cols))), 0, 255).astype(np.uint8)
    return out


def normal(seed: int, rows: int, cols: int) -> NDArray[np.float32]:
    """Numbers of about 1 / sqrt(rows)."""
    out = np.random.default_rng(seed).standard_normal((rows, cols)) / math.sqrt(rows)
    return out.astype(np.float32)
