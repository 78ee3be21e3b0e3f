"""A causal language model with frozen matrices, and what is trained beside them as one vector of numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from rac.models.linears import blocks_linears, is_linear
from rac.models.names import renamed

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 8192  # rows of the output layer that are widened at once
_EACH = 14  # bytes that are kept of each output of a layer
_LEAST = 0.1  # share of the root mean square of a vector that its numbers move by at least, where others move by all


class UnfitError(Exception):
    """Nothing of the model can be trained; says why."""


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """(x W^T) * gain + bias, W frozen: nothing but the product itself is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, gain: Any, bias: Any) -> Any:
        y = x.to(w.dtype) @ w.t()
        ctx.save_for_backward(y if gain is not None else None, w, gain)
        out = y.float()
        if gain is not None:
            out = out * gain
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        y, w, gain = ctx.saved_tensors
        of_gain = of_bias = None
        flat = tuple(range(grad.dim() - 1))
        if ctx.needs_input_grad[3]:
            of_bias = grad.sum(flat)
        if gain is not None:
            if ctx.needs_input_grad[2]:
                of_gain = (grad * y).sum(flat)
            grad = grad * gain
        return (grad.to(w.dtype) @ w).float() if ctx.needs_input_grad[0] else None, None, of_gain, of_bias


class _Logits(torch.autograd.Function):  # type: ignore[misc]
    """x W^T of a frozen output layer: in the type of W in a step, in float32 where something is judged or taught.

    Logits are large: of 15 BF16 keeps what is 0.02 from it, which is nothing to the noise of a step.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any) -> Any:
        ctx.save_for_backward(w)
        if ctx.needs_input_grad[0]:
            return (x.to(w.dtype) @ w.t()).float()
        out = x.new_empty(*x.shape[:-1], len(w))
        for a in range(0, len(w), _ROWS):
            out[..., a : a + _ROWS] = x @ w[a : a + _ROWS].float().t()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (w,) = ctx.saved_tensors
        return (grad.to(w.dtype) @ w).float(), None


class _Attention(TorchFunctionMode):  # type: ignore[misc]
    """Attention of float32 in another type."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = func is torch.nn.functional.scaled_dot_product_attention and len(args) == 3
        if not plain or kwargs.get("attn_mask") is not None or args[0].dtype != torch.float32:
            return func(*args, **kwargs)
        return func(*(x.to(self._dtype) for x in args), **kwargs).float()


def _attention(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Attention in a type while gradients are asked for: in a step, not where something is judged or taught."""
    plain = dtype == torch.float32 or not torch.is_grad_enabled()
    return contextlib.nullcontext() if plain else _Attention(dtype)


@dataclass(frozen=True, slots=True)
class Part:
    """A place in the vector of what is trained."""

    name: str  # of the tensor, as the files have it
    gains: bool  # one for each row of that matrix; else the numbers of that vector
    at: slice


def fast(device: str) -> Any:
    """The data type that matrices are multiplied in: bfloat16 where processors have it, float32 elsewhere."""
    if device != "cpu":
        return torch.bfloat16
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if known is not None and known() else torch.float32


class Trained:
    """A model of transformers, prepared: matrices frozen, vectors in float32, the rest as one vector `theta`."""

    def __init__(self, model: Any, names: Iterable[str], device: str = "cpu", dtype: Any = None) -> None:
        """`names` are the tensors of the files; products are in `dtype`, None: what is fast."""
        self.model, self.device = model.eval().requires_grad_(False), device
        self.dtype = fast(device) if dtype is None else dtype
        self.parts: list[Part] = []
        self.theta, self.scale = torch.ones(0), torch.ones(0)
        known = renamed(model, names)
        self._keys = {name: key for name, (key, whole) in known.items() if whole}
        self._inside = set(blocks_linears(model).values())
        every = model.named_modules()
        self._owner = {f"{name}.{leaf}": (m, leaf) for name, m in every for leaf in m._parameters}
        self._gains: dict[int, Any] = {}
        self._prepare()
        model.to(device)

    def _prepare(self) -> None:
        """Let linear layers multiply in their data type, and everything else be in float32."""
        head = self.model.get_output_embeddings()
        for module in self.model.modules():
            if module is head and isinstance(head, torch.nn.Linear):
                module.forward = lambda x: _Logits.apply(x, head.weight) + (0 if head.bias is None else head.bias)
            elif is_linear(module):
                module.forward = self._linear(module)
            elif isinstance(module, torch.nn.Embedding):
                module.register_forward_hook(lambda _, __, out: out.float())
            for key, p in module._parameters.items():
                if p is not None and p.is_floating_point():
                    matrix = key == "weight" and (is_linear(module) or isinstance(module, torch.nn.Embedding))
                    p.data = p.data.to(self.dtype if matrix else torch.float32)

    def _linear(self, module: Any) -> Callable[[Any], Any]:
        turned = type(module).__name__ == "Conv1D"  # stored (in, out): a row is an input

        def forward(x: Any) -> Any:
            gain = self._gains.get(id(module))
            if not turned:
                return _Product.apply(x, module.weight, gain, module.bias)
            return _Product.apply(x if gain is None else x * gain, module.weight.t(), None, module.bias)

        return forward

    def put(self, name: str, w: NDArray[np.float32]) -> None:
        """Take other numbers for a matrix of the files; UnfitError where the model has it not as it is."""
        if name not in self._keys:
            raise UnfitError(f"{name} is no parameter of the model as it is stored")
        p = self.model.get_parameter(self._keys[name])
        p.data = torch.from_numpy(np.ascontiguousarray(w)).reshape(p.shape).to(self.device, p.dtype)

    def train(self, matrices: Iterable[str], vectors: Iterable[str]) -> None:
        """Train a gain for each row of linear layers inside the blocks, and vectors, by their names in the files."""
        gains = [(name, self._at(name)) for name in matrices]
        found = [(name, at) for name, at in gains if at and at[0] in self._inside]
        found += [(name, at) for name in vectors if (at := self._at(name)) and self._moves(*at)]
        if not found:
            raise UnfitError("none of its layers can be trained")
        every = [self._begin(module, leaf) for _, (module, leaf) in found]
        ends = np.cumsum([0, *(len(value) for value, _ in every)]).tolist()
        self.theta, self.scale = (torch.cat([pair[k] for pair in every]) for k in (0, 1))
        self.parts = [
            Part(name, at[0] in self._inside and at[1] == "weight", slice(*ends[i : i + 2]))
            for i, (name, at) in enumerate(found)
        ]
        self._leaves = [torch.nn.Parameter(self.theta[part.at]) for part in self.parts]  # share the memory of theta
        for part, leaf, (_, (module, key)) in zip(self.parts, self._leaves, found, strict=True):
            if part.gains:
                self._gains[id(module)] = leaf
            else:
                module.register_parameter(key, leaf)

    def _at(self, name: str) -> tuple[Any, str] | None:
        """The module and the name there of a tensor of the files."""
        return self._owner.get(self._keys.get(name, ""))

    @staticmethod
    def _moves(module: Any, leaf: str) -> bool:
        """Whether a parameter is a vector, and not all 0."""
        value = module._parameters[leaf]
        return value is not None and value.dim() == 1 and bool(value.any())

    def _begin(self, module: Any, leaf: str) -> tuple[Any, Any]:
        """What is trained of a layer or a vector, and how far each number moves where a gain moves by 1."""
        value = module._parameters[leaf].data
        if value.dim() > 1:
            return torch.ones(len(value), device=self.device), torch.ones(len(value), device=self.device)
        rms = math.sqrt(float((value.cpu().double() ** 2).mean()))
        return value.clone(), torch.full_like(value, rms) if leaf == "bias" else value.abs().clamp(min=_LEAST * rms)

    def logits(self, ids: Any) -> Any:
        """(n, context, vocabulary) float32 of token ids (n, context)."""
        with _attention(self.dtype):
            return self.model(input_ids=ids.to(self.device), use_cache=False).logits.float()

    def gradient(self) -> Any:
        """The gradient of all that is trained, as one vector; it is then forgotten."""
        out = torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in self._leaves])
        for p in self._leaves:
            p.grad = None
        return out

    def use(self, theta: Any) -> None:
        """Compute with these numbers."""
        with torch.no_grad():
            self.theta.copy_(theta)

    def rounded(self, theta: Any, types: Mapping[str, str], gain: Callable[[Any], Any]) -> Any:
        """The numbers as a file holds them: vectors in the data types `types`, gains as the function rounds them."""
        out = theta.clone()
        for part in self.parts:
            x = out[part.at]
            out[part.at] = gain(x) if part.gains else x.to(TYPES[types[part.name]]).float()
        return out

    def need(self, tokens: int, blocks: int = 1) -> int:
        """Bytes that a step on so many tokens takes beside the weights, about: all products of one of the blocks."""
        outs = sum(m.weight.numel() // m.weight.shape[-1] for m in self._inside)
        head = self.model.get_output_embeddings()
        return int(tokens * (_EACH * outs // blocks + 12 * (0 if head is None else len(head.weight))))

    def checkpoint(self, tokens: int) -> int:
        """Keep what goes into a block only, and run each block once more on the way back; bytes of a step, about."""
        from torch.utils.checkpoint import checkpoint

        lists = [m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList)]
        blocks: Any = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=())
        for block in blocks:
            block.forward = _again(checkpoint, block.forward, self.dtype)
        return self.need(tokens, max(1, len(blocks)))


def _again(checkpoint: Callable[..., Any], forward: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    def alike(*args: Any, **kwargs: Any) -> Any:  # modes of torch do not reach into the way back
        with _attention(dtype):
            return forward(*args, **kwargs)

    return lambda *args, **kwargs: checkpoint(alike, *args, use_reentrant=False, **kwargs)
