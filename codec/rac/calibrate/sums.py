"""Sums over the products of a module's run: second moments of inputs, squares of the gradients at outputs.

Where there are gradients, an input counts by the length of its own at the output, as in `rac.calibrate.moments`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate import moments
from rac.calibrate.experts import settled
from rac.calibrate.layers import Kron, Layer, Low
from rac.calibrate.leading import Leading
from rac.calibrate.moments import added
from rac.calibrate.products import ROWS, Product
from rac.calibrate.sketch import sketch
from rac.calibrate.text import SEED

At = tuple[str, int | None]
"""A parameter and the part of it."""
Moment = NDArray[np.float32] | Kron
WIDE = 2304  # inputs of a kernel beyond which its second moment is held as a product: of channels, of places
_RECENT = 8


@dataclass
class Sum:
    """What was seen of a weight, or of a part of it."""

    turned: bool
    block: tuple[int, int]
    kernel: int = 1  # places of a convolution's kernel
    second: dict[bool, tuple[Any, ...]] = field(default_factory=dict)  # by whether inputs have weights of their own
    weight: dict[bool, float] = field(default_factory=dict)
    count: int = 0
    squares: NDArray[np.float64] | None = None
    graded: int = 0
    copied: bool = False  # whether its input is overwritten before the gradient comes
    less: bool = False  # whether leading directions are all that is kept: of experts that are many

    def add(self, x: Any, weighted: bool, weight: float) -> None:
        """Add inputs (n, in), which are multiplied by the roots of their weights; `weight` is the sum of these."""
        x = x.float()
        if self.kernel > 1 and x.shape[1] > WIDE:
            x = x.reshape(len(x), -1, self.kernel)
            found: tuple[Any, ...] = (_gram(x.movedim(2, 1).flatten(0, 1)), _gram(x.flatten(0, 1)))
        elif self.less:
            found = (Leading.of(x),)
        else:
            found = (_gram(x),)
        before = self.second.get(weighted)
        self.second[weighted] = found if before is None else tuple(map(added, before, found))
        self.weight[weighted] = self.weight.get(weighted, 0.0) + weight

    @property
    def weighted(self) -> bool:
        """Whether inputs have weights of their own."""
        return self.weight.get(True, 0.0) != 0

    def mean(self) -> tuple[NDArray[np.float32], ...]:
        """The mean second moment, or those of channels and of places."""
        weight = np.float32(self.weight[self.weighted])
        return tuple(a / weight for a in self.second[self.weighted])

    @property
    def sensitivity(self) -> NDArray[np.float64] | None:
        """(out,) mean of the squared gradients; None where none came."""
        return None if self.squares is None else self.squares / self.graded


def _gram(x: Any) -> NDArray[np.float32]:
    if x.device.type != "cpu":
        return (x.T @ x).cpu().numpy()  # type: ignore[no-any-return]
    rows = np.ascontiguousarray(x.numpy())
    with np.errstate(all="ignore"):  # not finite is told by the result
        product: NDArray[np.float32] = rows.T @ rows  # numpy takes the symmetric product, half the work of torch's
    return product


def _version(x: Any) -> int:
    return 0 if x.is_inference() else int(x._version)


class Sums:
    """Gathers products; those of the batch that runs wait for their gradients."""

    def __init__(self, backward: bool) -> None:
        self.backward = backward
        self._of: dict[At, Sum] = {}
        self._key: dict[At, At] = {}  # to the first with the same inputs: query, key and value, for example
        self._waiting: dict[int, tuple[Product, Sum, Any, Any]] = {}
        self._recent: list[tuple[Any, int, tuple[Any, ...], At]] = []
        self._generator = torch.Generator().manual_seed(SEED)

    @property
    def names(self) -> set[str]:
        """Parameters that were reached."""
        return {name for (name, _), total in self._of.items() if total.count}

    def __call__(self, products: list[Product], out: Any) -> Any:
        """Gather products that have made `out`, which is handed on as what this returns."""
        graph = self.backward and torch.is_grad_enabled()
        if graph and not out.requires_grad:
            out = out.detach().requires_grad_(True).clone()  # the graph begins here: weights and inputs have none
        for one in products:
            total = self._sum(one)
            if total.turned != one.turned:  # used turned too: the first way counts
                continue
            total.count += one.count
            rows = None
            if one.count > ROWS:
                rows = torch.randperm(one.count, generator=self._generator)[:ROWS]
            if not graph:
                self._plain(one, total, rows)
                continue
            held = one.inputs(rows).detach().clone() if total.copied else _version(one.given)
            self._waiting[number := len(self._waiting)] = (one, total, rows, held)
            out.register_hook(functools.partial(self._gradient, number))
        return out

    def _sum(self, one: Product) -> Sum:
        at, x = (one.name, one.part), one.given
        kernel = math.prod(one.key[0]) if one.key and isinstance(one.key[0], tuple) else 1
        total = self._of.setdefault(at, Sum(one.turned, one.block, kernel))
        same = (k for y, version, key, k in self._recent if y is x and version == _version(x) and key == one.key)
        first = next(same, at)
        self._recent = [*self._recent[1 - _RECENT :], (x, _version(x), one.key, first)]
        self._key.setdefault(at, first)
        return total

    def _into(self, one: Product, total: Sum) -> list[Sum]:
        """The sums that take the second moment: that of all experts too where dense ones of each would be too many."""
        if one.many * 4 * one.width**2 <= moments.OWN:
            return [total]
        total.less = True
        return [total, self._of.setdefault((one.name, -1), Sum(one.turned, one.block))]

    def _plain(self, one: Product, total: Sum, rows: Any) -> None:
        if self._key[one.name, one.part] == (one.name, one.part):  # others share what the first has
            x = one.inputs(rows).detach()
            for into in self._into(one, total):
                into.add(x, False, len(x))

    def _gradient(self, number: int, gradient: Any) -> None:
        one, total, rows, held = self._waiting[number]
        g = one.outputs(gradient.detach()).float()
        square = g.square()
        squares = square.sum(0).cpu().double().numpy()  # not every device has float64
        total.squares = squares if total.squares is None else total.squares + squares
        total.graded += len(g)
        if isinstance(held, int) and held != _version(one.given):  # overwritten: from the next batch on a copy is kept
            total.copied = True
            del self._waiting[number]
            return
        x = one.inputs(rows).detach() if isinstance(held, int) else held
        if len(g) == one.count:
            groups = len(x) // (one.count if rows is None else len(rows))
            length = square.reshape(len(g), groups, -1).sum(-1).sqrt()
            length = (length if rows is None else length[rows.to(length.device)]).reshape(-1)
        else:  # a transposed convolution: all inputs alike
            length = square.sum().sqrt().expand(len(x))
        if (weight := float(length.cpu().sum(dtype=torch.float64))) != 0:
            del self._waiting[number]
            for into in self._into(one, total):
                into.add(x.float() * length.sqrt()[:, None], True, weight)

    def end(self) -> None:
        """A batch is done: what got no gradient counts as it is."""
        for one, total, rows, held in self._waiting.values():
            if not isinstance(held, int) or held == _version(one.given):
                self._plain(one, total, rows)
        self._waiting.clear()
        self._recent.clear()

    def layers(self, parameters: Mapping[str, Any], batches: int) -> dict[str, Layer]:
        """What was found, by the names of the parameters.

        A second moment is a mean over the inputs times how many there are in a batch: what an error costs in a batch.
        """
        second = self._seconds(batches)
        out: dict[str, Layer] = {}
        for name in sorted(self.names):
            p = parameters[name]
            parts = {part: total for (n, part), total in self._of.items() if n == name}
            rows = sketch(p.detach().float().cpu().numpy())
            if None in parts:
                if (name, None) in second:
                    found = _layer(parts[None], second[name, None])
                    out[name] = Layer(found.moment, found.sensitivity, found.transposed, found.finite, sketch=rows)
            elif p.dim() == 3:
                out[name] = self._experts(name, len(p), batches, rows)
            elif all((name, part) in second for part in parts):
                out[name] = _blocks({n: _layer(t, second[name, n]) for n, t in parts.items() if n is not None}, p, rows)
        return out

    def _seconds(self, batches: int) -> dict[At, Moment]:
        """Second moments; layers of one input have one, the mean of theirs."""
        sharing: dict[At, list[At]] = {}
        for at, first in self._key.items():
            sharing.setdefault(first, []).append(at)
        out: dict[At, Moment] = {}
        for first, every in sharing.items():
            having = [self._of[at].mean() for at in every if self._of[at].second and not self._of[at].less]
            if not having:
                continue
            count = np.float32(self._of[first].count / batches / len(having))
            channels = functools.reduce(np.add, (one[0] for one in having)) * count
            made: Moment = channels
            if len(having[0]) > 1:
                places = functools.reduce(np.add, (one[1] for one in having))
                made = Kron(channels, places / np.float32(max(float(np.trace(places)), 1e-30)))
            out |= dict.fromkeys(every, made)
        return out

    def _experts(self, name: str, count: int, batches: int, rows: NDArray[np.float32]) -> Layer:
        """A parameter (experts, ., .), each expert of which has its own second moment, drawn to that of all."""
        parts = {e: self._of[name, e] for e in range(count) if (name, e) in self._of}
        sums, weights = {}, {}
        for e in parts:
            first, key = self._key[name, e], f"{name}[{e}]"
            for source, at in ((self._of[first], key), (self._of.get((first[0], -1)), name)):
                if source is not None and source.second:
                    weights[at] = float(source.weight[source.weighted])
                    sums[at] = source.second[source.weighted][0]
        squares = {f"{name}[{e}]": t.squares for e, t in parts.items() if t.squares is not None}
        seen = [parts[e].count if e in parts else 0 for e in range(count)]
        turned = next(iter(parts.values())).turned
        each: list[Layer] = []
        for _, second, sensitivity in settled(name, seen, sums, weights, squares):
            if isinstance(second, Low):
                moment: Any = second.times(1 / batches, each[0].second)
            else:
                moment = (second / np.float32(batches)).astype(np.float32)
            each.append(Layer(moment, sensitivity, turned, _finite(moment, sensitivity)))
        whole, *each = each
        return Layer(whole.moment, whole.sensitivity, turned, all(e.finite for e in each), each, rows)


def _finite(second: Moment | Low, sensitivity: NDArray[np.float64] | None) -> bool:
    if isinstance(second, Kron):
        parts: tuple[NDArray[np.float32], ...] = second.channels, second.places
    else:
        parts = (second.read() if isinstance(second, Low) else second,)
    known = sensitivity is None or bool(np.isfinite(sensitivity).all())
    return known and all(math.isfinite(float(np.abs(part).sum(dtype=np.float64))) for part in parts)


def _layer(total: Sum, second: Moment) -> Layer:
    sensitivity = total.sensitivity
    if sensitivity is not None and len(sensitivity) < total.block[1 if total.turned else 0]:
        sensitivity = None  # of groups of outputs
    return Layer(second, sensitivity, total.turned, _finite(second, sensitivity))


def _blocks(parts: Mapping[int, Layer], p: Any, rows: NDArray[np.float32]) -> Layer:
    """A matrix whose rows are multiplied part by part, as blocks of equal height; parts begin at the keys."""
    heights = {at: len(one.sensitivity) if one.sensitivity is not None else 0 for at, one in parts.items()}
    starts = sorted(parts)
    ends = [at + heights[at] or b for at, b in zip(starts, [*starts[1:], len(p)], strict=True)]
    step = math.gcd(len(p), *starts, *ends)
    each: list[Layer] = []
    for a in range(0, len(p), step):
        at = max((s for s in starts if s <= a), default=starts[0])
        one, b = parts[at], a - at
        known = one.sensitivity is not None and b + step <= len(one.sensitivity)
        each.append(Layer(one.moment, one.sensitivity[b : b + step] if known else None, False, one.finite))  # type: ignore[index]
    return Layer(each[0].moment, None, False, all(e.finite for e in each), each if len(each) > 1 else (), rows)
