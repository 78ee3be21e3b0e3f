"""Recovery in a pack: what training has found, put into tensors that are encoded already (docs/lossy.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.builtin import AUTO, learned
from rac.calibrate.folder import fed_model
from rac.calibrate.given import Given
from rac.calibrate.layers import Layers
from rac.calibrate.text import Note
from rac.container import zstd
from rac.encode import record, ties
from rac.encode.allocate.budget import read_text
from rac.encode.code.plan import Level
from rac.encode.encoded import Encoded, Kept, decoded, head_of
from rac.encode.options import Calibration
from rac.encode.sources import SourceTensor
from rac.encode.sources.tables import is_table
from rac.encode.ties import Group
from rac.stages import trellis
from rac.stages.base import Chain
from rac.stages.words import DTYPES, from_words, to_words
from rac.tensor import parts

if TYPE_CHECKING:
    from rac.recover.lessons import Text

BITS = 4  # bits of the file that are kept for the gain of a row; where gains take more they get coarser
EACH = 24  # bytes beside that, of a list of gains


@dataclass(frozen=True, slots=True)
class Tuning:
    """A recovery that a pack asks for."""

    steps: int
    calibration: Calibration
    found: Sequence[Layers]  # what its calibrations have found, in the order of its texts
    path: str | Given
    note: Note

    def __call__(
        self, groups: Sequence[Group], kept: Kept, vectors: Mapping[str, SourceTensor]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """Put gains into the `kept` tensors; the words of each of the `vectors` that changed, and what to state of it.

        Where nothing can be trained, or training finds nothing better, nothing is changed, and that is said.
        """
        from rac.recover.lessons import TooLittleError, lessons
        from rac.recover.model import UnfitError
        from rac.recover.recovery import Job, recover
        from rac.recover.run import Plan

        mine = [name for name in kept.names if kept.get(name).fidelity is not None]
        tables = {g.tensor.name for g in groups if is_table(g.tensor)}
        gained = {name for name in mine if name not in tables and _gains(kept.get(name))}
        try:
            learned = lessons(self.path, self._texts(), self.steps, self._general())
            plan = Plan(
                self.steps,
                reserve([kept.get(n).head["shape"] for n in gained]),
                {n: t.dtype for n, t in vectors.items()},
            )
            matrices = {name: _Decoded(kept, name) for name in mine}
            names = [name for g in groups for name in (g.tensor.name, *(a for a, _ in g.aliases))]
            job = Job(self.path, names, matrices, gained, learned, plan, self.calibration.device)
            given = self.path.about if isinstance(self.path, Given) else None
            own = repr([fed_model(zstd.Digest(), Path(self.path)).value().hex(), given])
            quantised = repr([(name, kept.get(name).head["digest"].hex()) for name in sorted(mine)])
            found = recover(job, own, quantised, self.calibration.cache, self.note)
        except (TooLittleError, UnfitError) as e:
            self.note(f"recovery is left out: {e}", 0, 0)
            return {}, {"left out": str(e)}
        fell = f"{found.before:.4f} to {found.after:.4f} nats on text that was held out"
        if found.why:
            self.note(f"recovery: {found.why}", 0, 0)
        if not found.steps:
            self.note("recovery: nothing better was found, the file is as it is without", 0, 0)
            return {}, {"left out": found.why or "nothing better was found", "kl": f"{found.before:.5f}"}
        self.note(f"recovery: {fell}", 0, 0)
        for name, gains in found.gains.items():
            kept.put(name, with_gains(kept.get(name), gains))
        words = {name: to_words(x, vectors[name].dtype) for name, x in found.vectors.items()}
        return words, {"steps": str(found.steps), "kl": f"{found.before:.5f} to {found.after:.5f}"}

    def _texts(self) -> list[Text]:
        from rac.recover.lessons import Text

        texts = []
        for name, layers in zip(self.calibration.texts, self.found, strict=False):
            if layers.ids is not None:
                whole = None if name == "self" else learned() if name == AUTO else read_text(name)
                texts.append(Text(np.array(layers.ids()), whole))
        return texts

    def _general(self) -> str | None:
        """The built-in mix, where people have named texts of their own: what is learned of these alone costs others."""
        return learned() if {"self", AUTO}.isdisjoint(self.calibration.texts) else None


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A tensor as a decoder restores it, float32 (R, C)."""

    kept: Kept
    name: str

    def __call__(self) -> NDArray[np.float32]:
        e = self.kept.get(self.name)
        return from_words(decoded(e), e.head["dtype"])


def reserve(shapes: Sequence[Sequence[int]]) -> int:
    """Bytes of the file that gains of matrices of these shapes may take."""
    return sum(shape[0] * BITS // 8 + EACH for shape in shapes)


def room_for(groups: Sequence[Group], names: Any) -> int:
    """Bytes that a search leaves for the gains of the tensors that it quantises, but for embeddings."""
    return reserve([g.tensor.shape for g in groups if g.tensor.name in names and not is_table(g.tensor)])


def _gains(e: Encoded) -> bool:
    """Whether the rows of a quantised tensor may get gains: of a matrix that is all that trellis/1 makes."""
    t = head_of(e)
    return isinstance(t.chain.numbers, trellis.Trellis) and t.chain.product is None and len(t.shape) == 2


def with_gains(e: Encoded, gains: NDArray[np.int8]) -> Encoded:
    """A quantised tensor whose rows are 1 + gains / 256 times as large, outliers too; its SNR is NaN."""
    t = head_of(e)
    numbers, units, at = t.chain.numbers, list(e.units), t.first - 1
    assert isinstance(numbers, trellis.Trellis)  # noqa: S101 - `_gains` has seen it
    p, units[at] = trellis.with_gains(numbers, bytes(units[at]), gains, t.dtype)
    chain = Chain(t.chain.coder, p)
    of_kind = parts(t.grid, chain, [len(u) for u in units], lambda i, size: bytes(units[i][:size]))
    fidelity = e.fidelity and replace(e.fidelity, snr=math.nan)
    new = replace(
        e, head=e.head | {"stages": chain.to_head()}, units=units, row=e.row | {"parts": of_kind}, fidelity=fidelity
    )
    digest = zstd.digest(decoded(new).reshape(-1).view(np.uint8).data)
    return replace(new, head=new.head | {"digest": digest})


def trainable(tensors: Sequence[SourceTensor]) -> dict[str, SourceTensor]:
    """The vectors of floats among tensors: gains of norms and biases."""
    return {t.name: t for t in tensors if t.dtype in DTYPES and len(t.shape) == 1 and t.nbytes}


def changed(group: Group, original: SourceTensor, level: Level) -> Encoded:
    """A lossless tensor that is no longer the `original`: its record has the digest of that, as quantised ones have."""
    e = record.whole(group, level)
    return replace(e, head=e.head | {"x-source": ties.digest(original)})
