"""Sums over the inputs and the output gradients of linear layers, gathered by hooks."""

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
    """Hooks on linear layers, for as long as it is open (a context manager)."""

    def __init__(self, modules: Mapping[str, Any], *, inputs: bool, outputs: bool) -> None:
        self.second: dict[str, NDArray[np.float32]] = {}
        """Name of the first layer with that input to the sum of x x^T, (in, in)."""
        self.key: dict[str, str] = {}
        """Name to the name under which its second moment is."""
        self.squares: dict[str, NDArray[np.float64]] = {}
        """Name to the sum of squared output gradients, (out,)."""
        self._rows: dict[str, int] = {}
        self._recent: list[tuple[Any, int, str]] = []
        self._inputs, self._outputs = inputs, outputs
        self._hooks = [m.register_forward_hook(self._hook(name)) for name, m in modules.items()]

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._recent.clear()

    def _hook(self, name: str) -> Any:
        def hook(_: Any, args: Any, out: Any) -> None:
            if self._inputs:
                self._input(name, args[0])
            if self._outputs and out.requires_grad:
                out.register_hook(lambda g: self._gradient(name, g))

        return hook

    def _input(self, name: str, x: Any) -> None:
        state = (x, x._version)
        key = next((k for y, version, k in self._recent if y is x and version == state[1]), name)
        if self.key.setdefault(name, key) != name:  # query, key and value: the first of them has counted it
            return
        self._recent = [*self._recent[1 - _RECENT :], (*state, name)]
        rows = x.detach().float().reshape(-1, x.shape[-1]).contiguous().numpy()
        with np.errstate(all="ignore"):  # not finite is told by the result
            product = rows.T @ rows  # numpy takes the symmetric product, half the work of torch's
            if name in self.second:
                self.second[name] += product
            else:
                self.second[name] = product

    def _gradient(self, name: str, gradient: Any) -> None:
        g = gradient.detach().float().reshape(-1, gradient.shape[-1])
        self._rows[name] = self._rows.get(name, 0) + g.shape[0]
        squares = g.square().sum(0).double().numpy()
        self.squares[name] = self.squares[name] + squares if name in self.squares else squares

    def save(self, folder: Folder, tag: str, tokens: int) -> None:
        """Write means into the folder and name them in its state.

        The second moment is a mean over the tokens of the text, the sensitivity one over the rows that the layer saw:
        their product is then the same whether a layer sees each token, few of them, or each several times.
        """
        layers = folder.state.setdefault("layers", {})
        written: dict[str, str] = {}
        for i, (name, total) in enumerate(self.second.items()):
            total /= np.float32(tokens)
            finite = math.isfinite(float(np.abs(total).sum(dtype=np.float64)))
            written[name] = folder.put(f"second-{tag}-{i:03}.npy", total)
            for sharing in (n for n, key in self.key.items() if key == name):
                layers[sharing] = {"second": written[name], "finite": finite}
        for i, (name, squares) in enumerate(self.squares.items()):
            entry = layers.setdefault(name, {"finite": True})
            entry["finite"] = entry["finite"] and bool(np.isfinite(squares).all())
            entry["sensitivity"] = folder.put(f"sensitivity-{tag}-{i:03}.npy", squares / self._rows[name])
