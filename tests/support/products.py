"""Archives with objects and tensors of three stages, made of what `pack` is made of, and what they decode to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.container import zstd
from rac.container.index import content_digest
from rac.container.writer import Writer
from rac.encode import record as rec
from rac.encode.code.plan import LEVELS, Bytes, Level, Plan
from rac.encode.sources import SourceTensor
from rac.encode.ties import Group
from rac.grid import Box, boxes
from rac.registry import RECORD_OBJECT, RECORD_TENSOR
from rac.stages import trellis as tr
from rac.stages.base import Context
from rac.stages.products import Basis, LowRank
from rac.stages.words import to_words

Array = NDArray[Any]
HEADER: dict[str, Any] = {"features": []}


@dataclass(frozen=True)
class Coded:
    """A matrix of F32 as records hold it."""

    plan: Plan
    units: list[Bytes]
    trellis: tr.Trellis | None
    values: NDArray[np.float32]


def exact(values: NDArray[np.float32]) -> Coded:
    """Behind a coder alone."""
    t = SourceTensor("", "F32", values.shape, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
    encoder = rec.lossless(t, LEVELS["default"])
    words = np.ascontiguousarray(values).view("<u4")
    return Coded(encoder.plan, [*encoder.plan.fronts, *rec.tiles(encoder, words)], None, values)


def quantised(
    words: NDArray[np.uint8], seed: int, outliers: int = 0, states: int = 16, level: Level = LEVELS["default"]
) -> Coded:
    """Behind a coder and trellis/1: random scales, and outliers of random bits at random places."""
    rng = np.random.default_rng(seed)
    r, c = words.shape
    plan, tiles = rec.coded(words, level)
    rows, cols = (rng.integers(-9, 10, n).astype(np.int8) for n in (r, c))
    flat = np.sort(rng.choice(r * c, min(outliers, r * c), replace=False))
    places = np.stack([flat // c, flat % c], axis=1)
    wild = np.frombuffer(rng.bytes(4 * len(flat)), np.uint32)
    sizes, unit = tr.build_unit(np.array([3, -4, 5], np.int8), rows, cols, places, wild)
    p = tr.Trellis(states, 128, 127, 0x3C800000, sizes)
    values, numbers = np.empty((r, c), np.uint32), p.open(unit, Context("F32", r, c, 1))
    for box in boxes(plan.grid):
        a, b, x, y = box
        with native.using(None):
            numbers.decode(np.ascontiguousarray(words[a:b, x:y]), box, values[a:b, x:y])
    return Coded(plan, [*plan.fronts, unit, *tiles], p, values.view(np.float32))


def joined(v: NDArray[np.float32], dtype: str, objects: Sequence[NDArray[np.float32]]) -> Array:
    """Words of the data type, by numpy."""
    if not objects:
        return to_words(v, dtype)
    product = LowRank() if len(objects) == 2 else Basis()
    with native.using(None):
        return to_words(product.join(v.copy(), objects, Box(0, len(v), 0, v.shape[1])), dtype)


class Maker:
    """Writes an archive; `dense` has the words of its tensors."""

    def __init__(self, path: Path, header: dict[str, Any] | None = None) -> None:
        self._writer = Writer(path, force=True)
        self._writer.start(header or HEADER)
        self._objects: dict[str, NDArray[np.float32]] = {}
        self._content: list[list[Any]] = []
        self.groups: list[Group] = []
        self.dense: dict[str, Array] = {}

    def close(self) -> None:
        """Close what is open still, of an archive that was not finished."""
        self._writer.close()

    def object(self, name: str, m: Coded) -> None:
        """Add an object."""
        self._objects[name] = m.values
        digest = zstd.digest(m.values.tobytes()) if m.trellis else None
        e = rec.encoded_object(name, m.plan, m.units, m.trellis, digest)
        self._writer.add(RECORD_OBJECT, 0, e.head, e.units, **e.row)

    def tensor(self, name: str, dtype: str, m: Coded, uses: Sequence[str], source: bytes = bytes(16)) -> None:
        """Add a tensor that uses two objects (lowrank/1), one (basis/1) or none."""
        assert m.trellis is not None
        words = joined(m.values, dtype, [self._objects[n] for n in uses])
        digest = zstd.digest(words.tobytes())
        product = (None, Basis(), LowRank())[len(uses)]
        behind = rec.Behind(m.trellis, digest, source, product, tuple(uses))
        group = Group(SourceTensor(name, dtype, words.shape, words.view(np.uint8).reshape(-1)), (), {})
        e = rec.encoded(group, m.plan, m.units, behind)
        self._writer.add(RECORD_TENSOR, 0, e.head, e.units, **e.row)
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
