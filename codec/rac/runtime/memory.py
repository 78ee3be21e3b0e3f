"""How much memory a model takes whose records stay in the file, and what is left for keeping some of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rac import frameworks
from rac.errors import LimitError
from rac.machine import room
from rac.runtime.disk import Filed, Store
from rac.runtime.held import Holding, size_of
from rac.runtime.layers import RacLinear

MOST_AHEAD = 64 << 20
"""Bytes that are on their way at most, unless one expert is larger."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the weights of a model take, in bytes; keys and values of the tokens, and torch itself, come on top."""

    dense: int
    """Weights that are dense."""
    decoded: int
    """Room to decode into: the workspace, and the largest expert or rows of an embedding."""
    used: int
    """Records that are decoded now, and the fronts of those that are read in parts."""
    ahead: int
    """Records that are on their way."""
    kept: int = 0
    """Records that stay once they were read."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.dense + self.decoded + self.used + self.ahead + self.kept

    def __str__(self) -> str:
        """What is for what."""
        of = (
            f"{megabytes(self.total)}, of which {megabytes(self.dense)} for dense weights, {megabytes(self.decoded)} to"
        )
        used = f"{megabytes(self.used + self.ahead)} for records that are used or come next"
        kept = f", {megabytes(self.kept)} for those that were used" if self.kept else ""
        return f"{of} decode into, {used}{kept}"


def megabytes(n: int) -> str:
    """A number of bytes, for people."""
    return f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n / 1e3:,.1f} kB"


def _places(model: Any) -> Iterator[tuple[Any, Any, Filed]]:
    """Modules, what a weight of them is decoded from, and its records."""
    for module in (m for m in model.modules() if isinstance(m, Holding)):
        for name in module._names:
            if (filed := module.filed(name)) is not None:
                yield module, module.source(name), filed


def _dense(model: Any) -> int:
    """Bytes of the weights that are dense, in the host's memory."""
    records = {id(m.record_of(n)) for m in model.modules() if isinstance(m, Holding) for n in m._names}
    every = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for key, t in every.items() if key not in records and t.device.type == "cpu")


def needed(model: Any, store: Store) -> Budget:
    """What a model needs at least, whose layers hold the tickets of their records."""
    spaces = {id(source.workspace): source.workspace for _, source, _ in _places(model)}
    most = decoded = converted = 0
    ratio = 0.0
    experts: dict[int, int] = {}
    for module, source, filed in _places(model):
        size, share = filed.most(source.shape[0])
        numbers = math.ceil(share * math.prod(source.shape))
        dense = size_of((numbers,), filed.head.dtype)
        if frameworks.torch_dtype(filed.head.dtype) != source.compute_dtype:
            converted = max(converted, numbers * source.compute_dtype.itemsize)
        if isinstance(module, RacLinear):
            ratio = max(ratio, size / max(1, dense))
        else:
            decoded = max(decoded, dense)
            experts[id(module)] = experts.get(id(module), 0) + size
        most = max(most, size)
    space = sum(w.nbytes for w in spaces.values())
    used = most + int(space * ratio) + store.reader.fronts
    return Budget(_dense(model), space + decoded + converted, used, max([most, *experts.values()]))


def fit(model: Any, store: Store, memory: int | None) -> Budget:
    """Divide `memory` bytes, a quarter of the machine's by default, among what a model needs; the store keeps to it.

    LimitError where it is less than the model needs for its largest layer or expert.
    """
    least = needed(model, store)
    given = max(least.total, room()) if memory is None else memory
    if given < least.total:
        what = f"{megabytes(given)} of memory is too little for its weights: they need at least {least}"
        raise LimitError(what, file=store.reader.name)
    free = given - least.total
    more = max(0, min(free // 4, MOST_AHEAD - least.ahead))
    out = Budget(least.dense, least.decoded, least.used, least.ahead + more, free - more)
    store.limit(out)
    return out
