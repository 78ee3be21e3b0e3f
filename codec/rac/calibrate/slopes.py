"""What errors of tables cost beside errors of layers, on text that was not calibrated on: measured, not foretold.

A calibration foretells what an error e of a matrix costs: half of the sum of s_i e_i S e_i over its rows i, in nats a
token. On other text all cost more, and tables far more than layers, since other text reads other rows. Here each table,
and all layers together, get errors of the shape that quantisation leaves, and the divergence from the model without
them is measured. Errors that are fed back, with steps inverse to what they cost, have a covariance proportional to S^-1
in each row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate import builtin
from rac.calibrate.chain import Chain
from rac.calibrate.endings import Ending
from rac.calibrate.folder import Folder
from rac.calibrate.tables import embeddings
from rac.calibrate.text import text_ids
from rac.calibrate.wide import Wide
from rac.errors import SourceError
from rac.linalg.device import is_short
from rac.models.linears import output_embedding
from rac.models.predictions import split

WINDOWS, TOGETHER = 8, 4  # sequences that are measured on at most, and how many at once: errors take long to make
SHORT = 256  # tokens of a sequence below which there are more, as many times as it is shorter
FOREIGN = 4  # of a text one in so many is of the built-in mix: what is measured on the text's own kind costs others
FORETOLD = 0.005  # nats that errors of each table, and of all layers, are foretold to cost of each thing that comes out
DAMP = 0.03  # share of the mean energy that every input is taken to have beyond what was seen
POWER, LEAST = 0.8, 1e-2  # of what rows cost, and what one costs at least, of their mean: as their steps follow it
WIDEST = 2048  # columns whose errors follow each other: of wider matrices these blocks alone
FAR = 256.0  # quotient that a table's cost has at most

Entry = dict[str, Any]


def held_out(
    path: str, text: str | NDArray[np.int64] | None, ids: NDArray[np.int64], causal: bool = True
) -> NDArray[np.int64]:
    """(n, context) ids to measure on: of what follows `ids` in the text that they were taken from, and of the mix.

    At most WINDOWS sequences of the length of those, of short ones more; none where there is no such text, and no
    tokenizer for the mix.
    """
    context = ids.shape[1]
    count = WINDOWS * _times(context)
    found = [np.asarray(text, np.int64)[ids.size :]] if isinstance(text, np.ndarray) else []
    beside: tuple[Sequence[int], Sequence[int]] = (), ()
    with contextlib.suppress(SourceError):
        if isinstance(text, str):
            every = text_ids(path, text, ids.size + count * context)
            beside = every.beside(causal)
            found.append(every.ids[len(ids) * (context - sum(map(len, beside))) :])
        if not isinstance(text, np.ndarray):
            every = text_ids(path, builtin.measured(), count * context)
            beside = every.beside(causal)
            found.append(every.ids)
    cut = [split(some, context, *beside) for some in found]
    most = count - count // FOREIGN if len(cut) > 1 else count
    return np.concatenate([cut[0][:most], *cut[1:]])[:count] if cut else np.zeros((0, context), np.int64)


def _times(context: int) -> int:
    return max(1, SHORT // context)


@dataclass(frozen=True, slots=True, eq=False)
class Errors:
    """Errors of one matrix, the same ones whenever they are asked for."""

    entry: Entry
    folder: Folder
    seed: int
    rows: int
    nats: float  # that they are foretold to cost

    def __call__(self) -> Any:
        """(rows, inputs) float32, or turned where the weight is stored (in, out)."""
        generator = torch.Generator().manual_seed(self.seed)
        second = self.folder.array(self.entry["second"])
        cost, n = np.array(self.folder.array(self.entry["sensitivity"]), np.float64), len(second)
        step = np.maximum(cost, max(LEAST * float(cost.mean()), 1e-30)) ** (-POWER / 2)
        damp = DAMP * max(float(np.diag(second).mean(dtype=np.float64)), 1e-30)
        out, spread = torch.empty(self.rows, n), 0.0
        for a in range(0, n, WIDEST):
            block = np.array(second[a : a + WIDEST, a : a + WIDEST], np.float64)
            block[np.diag_indices_from(block)] += damp
            lower = torch.from_numpy(np.linalg.cholesky(block).astype(np.float32))
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(block)), upper=False)
            spread += len(block) - damp * float(inverse.square().sum())  # trace of the block times the covariance
            out[:, a : a + WIDEST] = torch.randn(self.rows, len(block), generator=generator) @ inverse
        foretold = 0.5 * spread * float(cost @ np.square(step))
        step *= math.sqrt(self.nats / max(foretold, 1e-30))
        out *= torch.from_numpy(step.astype(np.float32))[:, None]
        return out.T if self.entry["transposed"] else out


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A table, and errors of it."""

    weight: Any
    errors: Errors
    read: bool  # whether its rows are looked up
    said: bool  # whether they make logits

    @contextlib.contextmanager
    def holding(self, data: Any) -> Iterator[None]:
        """The table has other numbers meanwhile."""
        before = self.weight.data
        self.weight.data = data
        try:
            yield
        finally:
            self.weight.data = before

    def disturbed(self) -> Any:
        """Its numbers with the errors."""
        return added(self.weight.data, self.errors)


def added(data: Any, errors: Errors | None) -> Any:
    """Numbers with errors, float32; or as they are where there are none."""
    return data if errors is None else data.float() + errors().to(data.device)


@dataclass(frozen=True, slots=True, eq=False)
class Slopes:
    """A model as a chain of blocks, and errors of its weights."""

    chain: Chain
    ending: Ending
    ids: NDArray[np.int64]  # (n, context) to measure on
    layers: Mapping[int, Errors]  # by the id of the parameter
    tables: Sequence[Table]

    @classmethod
    def of(cls, chain: Chain, end: Ending, names: Mapping[str, str], folder: Folder, ids: NDArray[np.int64]) -> Slopes:
        """Choose errors by what a calibration's `folder` says of the tensors `names`, parameters of the model.

        Experts, whose matrices are a part of a parameter or a parameter of three dimensions, are left as they are.
        """
        parameters = dict(chain.model.named_parameters(remove_duplicate=False))
        read, head = {id(m.weight) for m in embeddings(chain.model).values()}, output_embedding(chain.model)
        said = {id(head.weight)} if head is not None else set()
        known: dict[int, tuple[Entry, Any]] = {}
        for name, key in names.items():
            entry, p = folder.state["layers"].get(name, {}), parameters.get(key)
            if p is not None and p.dim() == 2 and {"sensitivity", "second"} <= entry.keys() and entry["finite"]:
                known.setdefault(id(p), (entry, p))
        total = sum(p.numel() for at, (_, p) in known.items() if at not in read | said)
        nats = FORETOLD * end.outputs(ids.shape[1]) / ids.shape[1]
        layers, found = dict[int, Errors](), list[Table]()
        for seed, (at, (entry, p)) in enumerate(known.items()):
            rows = p.shape[1] if entry["transposed"] else p.shape[0]
            if at in read | said:
                errors = Errors(entry, folder, seed, rows, nats)
                found.append(Table(p, errors, at in read, at in said))
            else:
                layers[at] = Errors(entry, folder, seed, rows, nats * p.numel() / total)
        return cls(chain, end, ids, layers, found)

    @property
    def able(self) -> bool:
        """Whether there is something to measure, and text to measure it on."""
        return bool(self.tables and self.layers and len(self.ids))

    @property
    def parts(self) -> int:
        """How often `part` is to be asked."""
        return -(-len(self.ids) // self._together)

    @property
    def _together(self) -> int:
        return TOGETHER * _times(self.ids.shape[1])

    def part(self, number: int) -> list[list[float]]:
        """For each of some sequences the nats, summed, that errors of all layers cost, then those of each table.

        None where there is too little memory for a block and its errors.
        """
        try:
            return self._part(number)
        except (RuntimeError, MemoryError) as e:
            if not is_short(e):
                raise
            return []

    def _part(self, number: int) -> list[list[float]]:
        chain = self.chain
        every = torch.from_numpy(self.ids[number * self._together : (number + 1) * self._together]).split(1)
        with Wide(), torch.no_grad():
            plain = [chain.place.to(chain.start(ids)) for ids in every]
            layers, moved = plain, [self._start(every, table) if table.read else plain for table in self.tables]
            for i in range(len(chain.blocks)):
                brought = chain.brought(i)
                with chain.use(brought):
                    then = self._run(i, plain)
                    moved = [then if hidden is plain else self._run(i, hidden) for hidden in moved]
                    plain = then
                with chain.use([(p, added(data, self.layers.get(id(p)))) for p, data in brought]):
                    layers = self._run(i, layers)
            with chain.head():
                held = [table.disturbed() if table.said else table.weight.data for table in self.tables]
                each = zip(every, plain, layers, zip(*moved, strict=True), strict=True)
                return [self._costs(ids, own, [other, *those], held) for ids, own, other, those in each]

    def _start(self, every: Sequence[Any], table: Table) -> list[Any]:
        with table.holding(table.disturbed()):
            return [self.chain.place.to(self.chain.start(ids)) for ids in every]

    def _run(self, i: int, hidden: Sequence[Any]) -> list[Any]:
        return [self.chain.run(i, one) for one in hidden]

    def _costs(self, ids: Any, plain: Any, others: Sequence[Any], held: Sequence[Any]) -> list[float]:
        """Divergences, nats summed, of what errors of layers, and of tables `held` instead, make of a sequence."""
        total = [0.0] * len(others)
        step = self.ending.at_once or ids.shape[1]
        for a in range(0, ids.shape[1], step):
            at, some = slice(a, a + step), self.chain.place.to(ids[:, a : a + step])
            ours = self._made(some, plain[:, at])
            total[0] += self.ending.apart(ours, self._made(some, others[0][:, at]))
            for k, (table, data) in enumerate(zip(self.tables, held, strict=True), 1):
                with table.holding(data):
                    total[k] += self.ending.apart(ours, self._made(some, others[k][:, at]))
        return total

    def _made(self, ids: Any, hidden: Any) -> Any:
        return self.ending.made(self.chain.end(ids, hidden))

    def put(self, each: Sequence[Sequence[float]]) -> None:
        """Note with each table what its errors cost beside those of the layers, from all that `part` has given."""
        for k, table in enumerate(self.tables, 1):
            found = [row[k] / row[0] for row in each if row[0] > 0 and row[k] > 0]
            if found:
                middle = math.exp(math.fsum(map(math.log, found)) / len(found))
                table.errors.entry["slope"] = min(FAR, max(1 / FAR, middle))
