"""What a text says of a model's tables: embeddings, whose rows are looked up, and output layers, with a row a token.

The error e of a row that is looked up costs, each time it is read, (e g)^2, g the gradient of the loss there: what is
gathered is how often each row is read, its mean squared gradient, and the second moment E[g g^T] of all. A row of an
output layer makes a logit, whose Fisher information is p (1 - p), exact where that of other layers comes from labels
that are drawn: gathered are its mean by row, and the second moment of the final hidden states, each of which counts by
the sum of p (1 - p). Both costs are twice the nats that a token loses, and those of a tied table are added.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate.folder import Folder
from rac.calibrate.moments import Collector
from rac.calibrate.place import Place
from rac.linalg import exact
from rac.linalg.triangular import triangular
from rac.models.linears import input_embedding, is_linear, output_embedding

READ, FELT, SAID = ":read", ":felt", ":said"
"""Behind a module's name: how often its rows are read, what the loss depends on there, what they say."""
EVIDENCE = 1000
"""Tokens that count as read as the model predicts them, beside those of the text: no row is read never."""
SEEN = 50
"""Times that a row is read for its own gradients to count as much as those of all rows."""

_CLOSE = 2e-2  # rows that were multiplied in bfloat16 are what they are to that

Entry = dict[str, Any]
Numbers = NDArray[np.float64]


def embeddings(model: Any) -> dict[str, Any]:
    """Modules whose rows are looked up, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}


def output_layer(model: Any) -> dict[str, Any]:
    """The output layer by its name, where there is one that is linear."""
    head = output_embedding(model)
    return {name: m for name, m in model.named_modules() if m is head and is_linear(m)}


class Tables:
    """Hooks on a model's tables while it is open: what they say goes into the sums of a collector."""

    def __init__(
        self, into: Collector, looked_up: Mapping[str, Any], output: Mapping[str, Any], place: Place | None = None
    ) -> None:
        self._into, self._place = into, place or Place()
        self._factor: dict[str, float] = {}
        self._given: list[Any] = []  # what the output layer was given in the run that is open
        self._waiting: tuple[Any, Any] | None = None
        self._open = contextlib.ExitStack()
        for name, m in looked_up.items():
            self._open.enter_context(m.register_forward_hook(functools.partial(self._read, name)))
        for name, m in output.items():
            self._open.enter_context(m.register_forward_hook(functools.partial(self._ran, name)))

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._given.clear()

    def _read(self, name: str, module: Any, args: Any, out: Any) -> None:
        """Rows were looked up; `out` is what came of it, times a factor with some."""
        given = args[0] if args else None  # tables of positions may be given a shape
        if not isinstance(given, torch.Tensor) or given.is_floating_point() or not isinstance(out, torch.Tensor):
            return
        ids = given.reshape(-1).cpu()
        if name not in self._factor:
            self._factor[name] = _factor(module.weight, ids, out)
        if not self._factor[name]:
            return
        self._add(name + READ, np.bincount(ids.numpy(), minlength=len(module.weight)).astype(np.float64), len(ids))
        if out.requires_grad:
            out.register_hook(functools.partial(self._felt, name, ids, len(module.weight)))

    def _felt(self, name: str, ids: Any, rows: int, gradient: Any) -> None:
        """The loss depends on rows that were looked up."""
        g = gradient.detach().float().reshape(len(ids), -1) * self._factor[name]
        squares = self._place.numbers(g.square().sum(1)).astype(np.float64)
        self._add(name + FELT, np.bincount(ids.numpy(), squares, rows).astype(np.float64), len(ids), g)

    def _ran(self, name: str, module: Any, args: Any, out: Any) -> None:
        """The output layer has made `out`; it is told later what became of it."""
        self._given = [args[0].detach().reshape(-1, args[0].shape[-1])]
        if out.requires_grad:
            out.register_hook(functools.partial(self._said, name))

    def said(self, chances: Any) -> None:
        """The probabilities (n, tokens) that the output layer's logits were turned to, before a backward pass."""
        information = chances * (1 - chances)
        self._waiting = information.sum(0), information.sum(1)

    def _said(self, name: str, gradient: Any) -> None:
        """The gradient of the output layer's own output: logits may be that times a factor, which it tells."""
        waiting, given, self._waiting, self._given = self._waiting, self._given, None, []
        if waiting is None or not given or len(given[0]) != len(waiting[1]) or gradient.shape[-1] != len(waiting[0]):
            return
        information, each = waiting
        # the mean square of a gradient to labels that are drawn is this information, but for the factor
        factor = float(gradient.detach().float().square().sum()) / max(float(information.sum()), 1e-30)
        squares = self._place.numbers(information).astype(np.float64) * factor
        self._add(name + SAID, squares, len(each), given[0].float(), each)

    def _add(self, name: str, squares: Numbers, rows: int, x: Any = None, length: Any = None) -> None:
        sums = self._into.sums
        sums.squares[name] = sums.squares[name] + squares if name in sums.squares else squares
        sums.rows[name] = sums.rows.get(name, 0) + rows
        if x is not None:
            sums.key[name] = name
            sums.second[name] = self._place.added(sums.second.get(name), x, length)
        if length is not None:
            sums.weight[name] = sums.weight.get(name, 0.0) + float(self._place.numbers(length).sum(dtype=np.float64))


def _factor(weight: Any, ids: Any, out: Any) -> float:
    """What rows of a weight were multiplied by to make `out`; 0: it was not made so."""
    with torch.no_grad():
        if not len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
            return 0.0
        made, rows = out.detach().float().reshape(-1), weight[ids.to(weight.device)].float().reshape(-1)
        if made.shape != rows.shape or not float(rows.norm()):
            return 0.0
        factor = float(made.norm() / rows.norm())
        return factor if float((made - factor * rows).norm()) <= _CLOSE * float(made.norm()) else 0.0


def taken(layers: dict[str, Entry]) -> dict[str, Entry]:
    """The entries of tables, by the names of modules, which leave those of layers."""
    return {name: layers.pop(name) for name in list(layers) if name.endswith((READ, FELT, SAID))}


def entries(model: Any, found: Mapping[str, Entry], folder: Folder, tokens: int) -> dict[str, Entry]:
    """An entry for each table, by the names of its parameters: what `taken` found, of one currency."""
    modules, out = dict(model.named_modules()), dict[str, Entry]()
    names = dict.fromkeys(name.rpartition(":")[0] for name in found)
    words = input_embedding(model)
    for i, tied in enumerate(_tied(modules, names)):
        roles = {kind: found[name + kind] for kind in (READ, FELT, SAID) for name in tied if name + kind in found}
        said = roles.get(SAID) or next((e for name, e in found.items() if name.endswith(SAID)), None)
        table = _Table(folder, roles, tokens, None if said is None else np.array(folder.array(said["sensitivity"])))
        weight = modules[tied[0]].weight
        second, sensitivity = table.cost(tuple(weight.shape), any(modules[name] is words for name in tied))
        finite = bool(np.isfinite(second).all() and np.isfinite(sensitivity).all())
        entry: Entry = {"finite": finite, "transposed": False}
        entry["second"] = folder.put(f"second-table-{i:03}.npy", second)
        entry["sensitivity"] = folder.put(f"sensitivity-table-{i:03}.npy", sensitivity)
        # a file may have the name of a module that was never called: T5's `shared`
        everywhere = model.named_modules(remove_duplicate=False)
        out |= {f"{name}.weight": entry for name, m in everywhere if getattr(m, "weight", None) is weight}
    return out


def _tied(modules: Mapping[str, Any], names: Sequence[str] | Mapping[str, None]) -> Iterator[list[str]]:
    """Names of modules, those together that have one weight."""
    sharing: dict[int, list[str]] = {}
    for name in names:
        sharing.setdefault(id(modules[name].weight), []).append(name)
    yield from sharing.values()


class _Table:
    """What is known of one table."""

    def __init__(self, folder: Folder, roles: Mapping[str, Entry], tokens: int, predicted: Numbers | None) -> None:
        self._folder, self._roles, self._tokens, self._predicted = folder, roles, tokens, predicted

    def _of(self, kind: str, what: str) -> NDArray[Any]:
        return np.array(self._folder.array(self._roles[kind][what]), np.float64)

    def cost(self, shape: tuple[int, ...], words: bool) -> tuple[NDArray[np.float32], Numbers]:
        """(n, n) and (rows,): what errors of a table cost, in their columns and rows; `words`: a row is a token."""
        rows, width = shape
        parts: list[tuple[Numbers, Numbers]] = []
        if READ in self._roles:
            parts.append(self._looked_up(rows, width, words))
        if SAID in self._roles:
            second = self._of(SAID, "second")
            parts.append((second, self._of(SAID, "sensitivity")))
        if not all(np.isfinite(a).all() and np.isfinite(b).all() for a, b in parts):
            return parts[0][0].astype(np.float32), parts[0][1] * np.nan
        # rows are as fine as the geometric mean of what their columns cost asks for
        own = [each * _middle(second) for second, each in parts]
        total = np.maximum(np.sum(own, 0), 1e-30)
        second = np.sum([float((each / total).mean()) * second for second, each in parts], 0)
        return second.astype(np.float32), total

    def _looked_up(self, rows: int, width: int, words: bool) -> tuple[Numbers, Numbers]:
        """(n, n) and (rows,) of the role of a table whose rows are read."""
        often, tokens = self._of(READ, "sensitivity"), self._tokens  # share of the reads
        count = often * tokens
        if words:
            likely = _likely(count, self._predicted)
            often = (count + EVIDENCE * likely) / (tokens + EVIDENCE)
        else:  # positions: all that a text may come to count alike
            often = np.full(rows, 1 / max(1, int(np.count_nonzero(count))))
        if FELT not in self._roles:
            return np.eye(width), often
        second, felt = self._of(FELT, "second"), self._of(FELT, "sensitivity") * tokens
        usual = float(felt.sum()) / max(1.0, float(count.sum()))
        each = (felt + SEEN * usual) / (count + SEEN) if words else np.full(rows, usual)
        return second / max(float(np.trace(second)), 1e-30), often * each


def _likely(count: Numbers, predicted: Numbers | None) -> Numbers:
    """How likely each token is, as the model predicts them; else tokens that were not seen as those seen once."""
    if predicted is not None and len(predicted) == len(count) and predicted.sum() > 0:
        return np.asarray(predicted / predicted.sum())
    once, never = int(np.count_nonzero(count == 1)), int(np.count_nonzero(count == 0))
    out = np.where(count == 0, max(once, 1) / max(1, never), np.maximum(count, 1))
    return np.asarray(out / out.sum())


def _middle(second: Numbers) -> float:
    """The geometric mean of what the columns of a second moment cost one after the other."""
    return float(exact.exp2(2 * exact.middle(triangular(second.astype(np.float32), 0.03).by_column)))
