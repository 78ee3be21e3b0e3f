"""Sums over the inputs and the output gradients of linear layers, gathered by hooks.

Where there are gradients, a token counts by the length of its own at the layer's output: errors at tokens on which the
loss does not depend cost nothing (GuidedQuant, arXiv 2505.07004, weighs by the square; the plain length is less at the
mercy of few tokens, docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.encode.calibration_cache import Folder

_RECENT = 8


def linears(model: Any) -> dict[str, Any]:
    """Module names to linear layers, GPT-2's transposed ones among them, without the output embedding."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and not name.endswith("lm_head")
    }


class Collector:
    """Hooks on linear layers, for as long as it is open (a context manager).

    With `outputs` it needs a backward pass, and the inputs are taken from there.
    """

    def __init__(self, modules: Mapping[str, Any], *, outputs: bool) -> None:
        self.second: dict[str, NDArray[np.float32]] = {}
        """Name to the sum of x x^T, (in, in): weighted for every layer, or plain for the first one with that input."""
        self.key: dict[str, str] = {}
        """Name to that of the first layer with the same input: query, key and value, for example."""
        self.squares: dict[str, NDArray[np.float64]] = {}
        """Name to the sum of squared output gradients, (out,)."""
        self._rows: dict[str, int] = {}
        self._weight: dict[str, float] = {}
        self._recent: list[tuple[Any, int, str]] = []
        self._outputs = outputs
        self._hooks = [m.register_forward_hook(self._hook(name)) for name, m in modules.items()]

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._recent.clear()

    def _hook(self, name: str) -> Any:
        def hook(_: Any, args: Any, out: Any) -> None:
            x = args[0].detach()
            self.key.setdefault(name, self._first(name, args[0]))
            if self._outputs and out.requires_grad:
                out.register_hook(lambda g: self._gradient(name, x, g))
            elif not self._outputs and self.key[name] == name:
                self._add(name, x.float().reshape(-1, x.shape[-1]).contiguous().numpy())

        return hook

    def _first(self, name: str, x: Any) -> str:
        """The layer that had this very input first."""
        key = next((k for y, version, k in self._recent if y is x and version == x._version), name)
        self._recent = [*self._recent[1 - _RECENT :], (x, x._version, key)]
        return key

    def _add(self, name: str, rows: NDArray[np.float32]) -> None:
        with np.errstate(all="ignore"):  # not finite is told by the result
            product = rows.T @ rows  # numpy takes the symmetric product, half the work of torch's
            if name in self.second:
                self.second[name] += product
            else:
                self.second[name] = product

    def _gradient(self, name: str, x: Any, gradient: Any) -> None:
        g = gradient.detach().float().reshape(-1, gradient.shape[-1])
        self._rows[name] = self._rows.get(name, 0) + g.shape[0]
        square = g.square()
        squares = square.sum(0).double().numpy()
        self.squares[name] = self.squares[name] + squares if name in self.squares else squares
        length = square.sum(1).sqrt().numpy()
        with np.errstate(all="ignore"):  # not finite is told by the result
            rows = x.float().reshape(-1, x.shape[-1]).numpy() * np.sqrt(length)[:, None]
        self._weight[name] = self._weight.get(name, 0.0) + float(length.sum(dtype=np.float64))
        self._add(name, rows)

    def save(self, folder: Folder, tag: str, tokens: int) -> None:
        """Write means into the folder and name them in its state.

        The second moment is a mean over the tokens of the text, the sensitivity one over the rows that the layer saw:
        their product is then the same whether a layer sees each token, few of them, or each several times. Weights of
        tokens have a mean of 1 over the rows that the layer saw.
        """
        layers = folder.state.setdefault("layers", {})
        for i, first in enumerate(dict.fromkeys(self.key[name] for name in self.second)):
            # layers with one input share the mean of what each has: a larger sample, and one recursion for all
            sharing = [name for name, key in self.key.items() if key == first]
            having = [name for name in sharing if name in self.second]
            total = np.zeros_like(self.second[having[0]])
            for name in having:
                mean = self._rows[name] / max(self._weight[name], 1e-30) if self._outputs else 1.0
                total += self.second.pop(name) * np.float32(mean / tokens / len(having))
            finite = math.isfinite(float(np.abs(total).sum(dtype=np.float64)))
            written = folder.put(f"second-{tag}-{i:03}.npy", total)
            for name in sharing if not self._outputs else having:
                layers[name] = {"second": written, "finite": finite}
        for i, (name, squares) in enumerate(self.squares.items()):
            entry = layers.setdefault(name, {"finite": True})
            entry["finite"] = entry["finite"] and bool(np.isfinite(squares).all())
            entry["sensitivity"] = folder.put(f"sensitivity-{tag}-{i:03}.npy", squares / self._rows[name])
