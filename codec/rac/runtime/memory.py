"""How much memory a model takes whose records stay in the file, and what is left for keeping some of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rac import frameworks
from rac.errors import LimitError
from rac.machine import room
from rac.runtime.disk import Filed, Store
from rac.runtime.held import Holding, size_of
from rac.runtime.layers import RacLinear

MOST_AHEAD = 64 << 20
"""Bytes that are on their way at most, unless one expert is larger."""
PLACE = 2 << 10
"""Bytes that the row of a tensor in the index takes in memory, about, and what finds it."""


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
    places: int = 0
    """The index of the file, and where in it each layer finds its records."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.dense + self.decoded + self.used + self.ahead + self.kept + self.places

    def __str__(self) -> str:
        """What is for what."""
        parts = {
            "for dense weights": self.dense,
            "for where the others are": self.places,
            "to decode into": self.decoded,
            "for records that are used or come next": self.used + self.ahead,
            "for those that were used": self.kept,
        }
        of = ", ".join(f"{megabytes(n)} {what}" for what, n in parts.items() if n)
        return f"{megabytes(self.total)}, of which {of}"


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
        if isinstance(module, RacLinear) and not module.banded:
            ratio = max(ratio, size / max(1, dense))
        else:
            decoded = max(decoded, dense)
            experts[id(module)] = experts.get(id(module), 0) + size
        most = max(most, size)
    space = sum(w.nbytes for w in spaces.values())
    used = most + int(space * ratio) + store.reader.fronts
    places = PLACE * sum(len(archive.index.entries) for archive in store.reader.file.archives)
    ahead = max([most, *experts.values()])
    return Budget(_dense(model), space + decoded + converted, used, ahead, places=places)


def fit(model: Any, store: Store, memory: int | None) -> Budget:
    """Divide `memory` bytes, a quarter of the machine's by default, among what a model needs; the store keeps to it.

    Where it is less than all of the largest linear layers takes, these multiply by bands of their rows.
    LimitError where it is less than the model needs for its largest layer or expert even so.
    """
    linear = sorted({m for m, _, _ in _places(model) if isinstance(m, RacLinear)}, key=lambda m: -m.dense_bytes)
    given = room() if memory is None else memory
    _band(linear, 0)
    least = needed(model, store)
    for count, layer in enumerate(linear, 1):
        if least.total <= given or layer.transposed or not layer.filed("weight").in_bands():  # type: ignore[union-attr]
            break
        _band(linear, count)
        least = needed(model, store)
    if memory is None:
        given = max(least.total, given)
    if given < least.total:
        what = f"{megabytes(given)} of memory is too little for its weights: they need at least {least}"
        raise LimitError(what, file=store.reader.name)
    free = given - least.total
    more = max(0, min(free // 4, MOST_AHEAD - least.ahead))
    out = replace(least, ahead=least.ahead + more, kept=free - more)
    store.limit(out)
    return out


def _band(linear: list[RacLinear], count: int) -> None:
    """Let the first `count` layers, and no others, multiply by bands; the workspace is as large as the others need."""
    for i, layer in enumerate(linear):
        layer.banded = i < count
    for space in {id(m.workspace): m.workspace for m in linear}.values():
        space.only(max((m.dense_bytes for m in linear[count:] if m.workspace is space), default=0))


def _stores(model: Any) -> list[Store]:
    return list({id(filed.store): filed.store for _, _, filed in _places(model)}.values())


def bound(model: Any) -> None:
    """Keep the growth of the process within the memory that the weights of a model were given (Store.bound)."""
    for store in _stores(model):
        if store.budget is not None:
            store.bound(store.budget.total - store.budget.places)


@contextlib.contextmanager
def closing(model: Any) -> Iterator[None]:
    """Close the files of a model at the end, also where that is an error: no read that is under way is waited for."""
    stores = _stores(model)
    try:
        yield
    finally:
        for store in stores:
            store.close()
