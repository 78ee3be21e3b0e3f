"""Sums over the inputs and the output gradients of linear layers, gathered by hooks.

Where there are gradients, a token counts by the length of its own at the layer's output: errors at tokens on which the
loss does not depend cost nothing (GuidedQuant, arXiv 2505.07004, weighs by the square; the plain length is less at the
mercy of few tokens, docs/experiments.md).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate import experts as calibration_experts
from rac.calibrate.folder import Folder
from rac.calibrate.layers import Low
from rac.calibrate.leading import Leading
from rac.calibrate.outer import Outer, size
from rac.calibrate.place import Place
from rac.models.linears import is_linear, output_embedding

_RECENT = 8
OWN = 1 << 30  # bytes of second moments of the experts of one parameter, up to which each is dense


def linears(model: Any) -> dict[str, Any]:
    """Linear layers by name, transposed ones and modules of fused experts among them, without the output embedding."""
    head = output_embedding(model)
    modules = dict(model.named_modules())
    named = {name: m for name, m in modules.items() if m is not head and not name.endswith("lm_head")}
    return {name: m for name, m in named.items() if is_linear(m) or _pointwise(m)} | calibration_experts.experts(
        modules
    )


def _pointwise(module: Any) -> bool:
    """Whether a convolution sees one position at a time: a linear layer, channels first."""
    return isinstance(module, torch.nn.Conv1d) and module.kernel_size == (1,) and module.groups == 1


@dataclass(slots=True)
class Sums:
    """What a pass has added up, by the names of layers: of one batch, or of many one after the other."""

    second: dict[str, Any] = field(default_factory=dict)
    """Name, or the first with that input, to the sum of x x^T: an array, or Leading of experts that are many."""
    key: dict[str, str] = field(default_factory=dict)
    """Name to the first layer with the same input: query, key and value, for example."""
    squares: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Name to the sum of squared output gradients, (out,)."""
    outer: dict[str, Any] = field(default_factory=dict)
    """Name to the second moment of the gradients at the outputs, where these are few: Outer, once it is taken."""
    rows: dict[str, int] = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)
    alone: set[str] = field(default_factory=set)
    """Layers on which the loss has not depended: their inputs count alike."""
    fused: dict[str, int] = field(default_factory=dict)
    """Parameter of experts to how many there are."""
    turned: dict[str, bool] = field(default_factory=dict)
    """Whether it is stored (experts, in, out)."""

    def add(self, other: Sums) -> None:
        """Add the sums of the batch that follows, which is used up. Their order decides about the last bits."""
        for name in other.alone & self.squares.keys():  # it had gradients before: inputs without one do not count
            other.alone.discard(name)
            del other.second[name], other.rows[name]
        for name in other.squares.keys() & self.alone:
            self.alone.discard(name)
            del self.second[name], self.rows[name]
        for name, part in other.second.items():
            self.second[name] = added(self.second[name], part) if name in self.second else part
        for name, squares in other.squares.items():
            self.squares[name] = self.squares[name] + squares if name in self.squares else squares
        for name, outer in other.outer.items():
            self.outer[name] = self.outer[name].plus(outer) if name in self.outer else outer
        for name, rows in other.rows.items():
            self.rows[name] = self.rows.get(name, 0) + rows
        for name, weight in other.weight.items():
            self.weight[name] = self.weight.get(name, 0.0) + weight
        self.alone |= other.alone
        self.fused |= other.fused
        self.turned |= other.turned
        self.key = {**self.key, **{k: v for k, v in other.key.items() if k not in self.key}}

    def save(self, folder: Folder, tag: str, tokens: int, outputs: bool) -> None:
        """Write means into the folder and name them in its state; with `outputs` there was a backward pass.

        The second moment is a mean over the tokens of the text, sensitivities and weights of tokens are such over the
        rows that the layer saw: products are the same whether it sees each token, few of them, or each several times.
        """
        layers = folder.state.setdefault("layers", {})
        self._save_experts(folder, tag, tokens, outputs)
        for i, first in enumerate(dict.fromkeys(self.key[name] for name in self.second)):
            # layers with one input share the mean of what each has: a larger sample, and one recursion for all
            sharing = [name for name, key in self.key.items() if key == first]
            having = [name for name in sharing if name in self.second]
            total = np.zeros_like(self.second[having[0]])
            for name in having:
                mean = self.rows[name] / max(self.weight[name], 1e-30) if name in self.weight else 1.0
                total += self.second.pop(name) * np.float32(mean / tokens / len(having))
            entry: dict[str, Any] = {"finite": math.isfinite(float(np.abs(total).sum(dtype=np.float64)))}
            entry["second"] = folder.put(f"second-{tag}-{i:03}.npy", total)
            for name in sharing if not outputs else having:
                layers[name] = entry.copy()
        for i, (name, squares) in enumerate(self.squares.items()):
            entry = layers.setdefault(name, {"finite": True})
            entry["finite"] = entry["finite"] and bool(np.isfinite(squares).all())
            entry["sensitivity"] = folder.put(f"sensitivity-{tag}-{i:03}.npy", squares / self.rows[name])
            outer = self.outer.pop(name).mean(self.rows[name]) if name in self.outer else None
            if outer is not None:
                entry["outer"] = folder.put(f"outer-{tag}-{i:03}.npy", outer)

    def _save_experts(self, folder: Folder, tag: str, tokens: int, outputs: bool) -> None:
        """Write the means of experts' matrices, which leave the sums, and of each fused parameter as a whole."""
        for i, (whole, count) in enumerate(self.fused.items()):
            every = [f"{whole}[{e}]" for e in range(count)]
            sums = {name: self.second.pop(name) for name in (whole, *every) if name in self.second}
            squares = {name: self.squares.pop(name) for name in every if name in self.squares}
            weights = {name: self.weight[name] if outputs else float(self.rows[name]) for name in sums}
            rows = [self.rows.get(name, 0) for name in every]
            found, first = calibration_experts.settled(whole, rows, sums, weights, squares), ""
            for j, (name, second, sensitivity) in enumerate(found if sums else ()):
                entry: dict[str, Any] = {"transposed": self.turned[whole]}
                if isinstance(second, Low):
                    entry["low"] = [first if second.shared is not None else None, second.share]
                    second = second.times(1 / tokens, second.read()).read()
                else:
                    second = second / np.float32(tokens)
                entry["finite"] = math.isfinite(float(np.abs(second).sum(dtype=np.float64)))
                folder.state["layers"][name] = entry
                entry["second"] = folder.put(f"second-{tag}-x{i:02}-{j:04}.npy", second)
                first = entry["second"] if j == 0 else first  # that of the parameter as a whole
                if sensitivity is not None:
                    entry["finite"] = entry["finite"] and bool(np.isfinite(sensitivity).all())
                    entry["sensitivity"] = folder.put(f"sensitivity-{tag}-x{i:02}-{j:04}.npy", sensitivity)


def added(a: Any, b: Any) -> Any:
    """The sum of two second moments, the second of which is used up."""
    if isinstance(a, Leading):
        return a.plus(b)
    with np.errstate(all="ignore"):  # not finite is told by the result
        return np.add(a, b, b)


class Collector:
    """Hooks on linear layers while it is open; with `outputs` a backward pass brings the inputs too.

    With `outer` the second moments of the gradients at outputs are kept beside, where these are few.
    """

    def __init__(
        self, modules: Mapping[str, Any], *, outputs: bool, outer: bool = False, place: Place | None = None
    ) -> None:
        self.sums, self._place = Sums(), place or Place()
        self._recent: list[tuple[Any, int, str]] = []
        self._outputs, self._outer = outputs, outer
        self._waiting: dict[str, list[Any]] = {}  # layers to inputs, where no gradient has come yet
        self._experts = calibration_experts.experts(modules)
        self._open = contextlib.ExitStack()
        for name, m in modules.items():
            if name not in self._experts:
                hook = functools.partial(self._ran, name, ())
                self._open.enter_context(m.register_forward_hook(hook))

    def __enter__(self) -> Collector:
        self._open.enter_context(calibration_experts.watch(self._experts, self._expert))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self.settle()
        self._recent.clear()

    @property
    def second(self) -> dict[str, NDArray[np.float32]]:
        """Sums of x x^T of this batch by name."""
        return self.sums.second

    @property
    def key(self) -> dict[str, str]:
        """Name to the first layer with the same input."""
        return self.sums.key

    def take(self) -> Sums:
        """What was added up since the last call."""
        self.settle()
        self._recent.clear()
        out, self.sums = self.sums, Sums()
        out.second = {
            name: Leading.from_array(total.array) if isinstance(total, Leading) else self._place.array(total)
            for name, total in out.second.items()
        }
        out.outer = {name: Outer.of(self._place.array(total)) for name, total in out.outer.items()}
        return out

    def settle(self) -> None:
        """To be called after each backward pass: layers that it did not come to count all their inputs alike."""
        for name, inputs in self._waiting.items():
            self.sums.alone.add(name)
            for x in inputs:
                self._forward(name, (), x)
        self._waiting.clear()

    def _expert(self, whole: str, number: int, count: int, turned: bool, x: Any, out: Any) -> None:
        self.sums.fused[whole], self.sums.turned[whole] = count, turned
        name = f"{whole}[{number}]"
        self._ran(name, () if count * 4 * x.shape[-1] ** 2 <= OWN else (whole,), None, (x,), out)

    def _ran(self, name: str, too: tuple[str, ...], module: Any, args: Any, out: Any) -> None:
        """Layer `name` has made `out` of its first argument, whose moments are added to those of others `too`."""
        given = args[0]
        if isinstance(out, tuple):  # a linear layer that does more than its product: a router
            return
        first = module is not None and _pointwise(module)  # channels come first
        x = given.detach().mT if first else given.detach()
        same = (k for y, version, k in self._recent if y is given and version == given._version)
        key = next(same, name)  # the layer that had this very input first
        self._recent = [*self._recent[1 - _RECENT :], (given, given._version, key)]
        self.sums.key.setdefault(name, key)
        if not self._outputs:
            if self.sums.key[name] == name:
                self._forward(name, too, x)
            return
        if module is not None and name not in self.sums.squares:
            self._waiting.setdefault(name, []).append(x)
        if out.requires_grad:
            linear = isinstance(module, torch.nn.Linear)
            outs = len(module.weight) if linear or first else out.shape[-1]
            out.register_hook(lambda g: self._gradient(name, too, x, g.mT if first else g, outs))
            if self._outer and linear and outs == out.shape[-1] and size(outs, x.shape[-1]):
                out.register_hook(functools.partial(self._felt, name))

    def _forward(self, name: str, too: tuple[str, ...], x: Any) -> None:
        for n in (name, *too):
            self.sums.rows[n] = self.sums.rows.get(n, 0) + x.numel() // x.shape[-1]
        self._moments(name, too, x, None)

    def _moments(self, name: str, too: tuple[str, ...], x: Any, length: Any) -> None:
        """Add the second moment of inputs, rows counting by their length; where others get it too, its own is less."""
        second = self.sums.second
        for n in too or (name,):
            second[n] = self._place.added(second.get(n), x, length)
        if too:
            rows = x.float().reshape(-1, x.shape[-1])
            part = Leading.of(rows if length is None else rows * length.sqrt()[:, None])
            second[name] = second[name].plus(part) if name in second else part

    def _gradient(self, name: str, too: tuple[str, ...], x: Any, gradient: Any, outs: int) -> None:
        """What the loss depends on in the output of a layer, whose weight has `outs` rows: of groups, all of them."""
        self._waiting.pop(name, None)
        if name in self.sums.alone:  # in an earlier pass no gradient came
            self.sums.alone.discard(name)
            del self.sums.second[name], self.sums.rows[name]
        g = gradient.detach().float().reshape(-1, gradient.shape[-1])
        self.sums.rows[name] = self.sums.rows.get(name, 0) + g.shape[0]
        square = g.square()
        each = square if outs == square.shape[1] else square.reshape(-1, outs)
        squares = self._place.numbers(each.sum(0)).astype(np.float64)
        self.sums.squares[name] = self.sums.squares.get(name, 0.0) + squares
        length = square.sum(1).sqrt()
        weight = float(self._place.numbers(length).sum(dtype=np.float64))
        for n in (name, *too):
            self.sums.weight[n] = self.sums.weight.get(n, 0.0) + weight
        self._moments(name, too, x, length)

    def _felt(self, name: str, gradient: Any) -> None:
        """Add the second moment of gradients at the output of a layer."""
        self.sums.outer[name] = self._place.added(self.sums.outer.get(name), gradient.detach())

    def of_experts(self, whole: str) -> list[NDArray[np.float32]]:
        """Second moments (in, in), in any unit, of the inputs of each expert of a parameter, without gradients.

        That of an expert that saw few tokens goes towards that of all (`rac.calibrate.experts.settled`).
        """
        every = [f"{whole}[{e}]" for e in range(self.sums.fused[whole])]
        sums = {name: self.sums.second[name] for name in (whole, *every) if name in self.sums.second}
        rows = [self.sums.rows.get(name, 0) for name in every]
        weights = {name: float(self.sums.rows[name]) for name in sums}
        found = {name: second for name, second, _ in calibration_experts.settled(whole, rows, sums, weights, {})}
        return [s() if callable(s := found[name]) else s for name in every]
