"""A model that computes in float32 while its weights stay as they are stored: each is widened where it is used.

Numbers between layers that the model would round to the type of its weights stay what they are.

What autograd keeps of a widened weight is the weight itself: the memory of a pass is that of its activations, whatever
the model holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NARROW = (torch.float16, torch.bfloat16)
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__", "bilinear"}
_PRODUCTS |= {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"}
_AS_IS = {"__get__", "__set__", "__setitem__", "to", "type", "type_as", "float", "half", "bfloat16", "double"}
_LONG, _LOOPS = 32, 8  # steps of the shortest loop, and tensors that one goes over, at most
_CASTS = {"to", "type", "type_as", "half", "bfloat16"}


class Steps:
    """Indices of a loop over a long dimension, cut at once: backward from each alone fills a gradient of all of them.

    Time is linear in the steps then, not quadratic (the scan of Mamba); the numbers are the same.
    """

    def __init__(self) -> None:
        self._cut: dict[tuple[int, int], tuple[Any, int, Any]] = {}  # of a tensor: itself, its version, its pieces

    def get(self, x: Any, index: Any) -> Any:
        """`x[index]`."""
        at = _step(index) if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled() else None
        if at is None or x.dim() <= at[0] or x.shape[at[0]] < _LONG or not 0 <= at[1] < x.shape[at[0]]:
            return x[index]
        key, n = (id(x), at[0]), x.shape[at[0]]
        held, version, pieces = self._cut.pop(key, (None, 0, None))
        if held is not x or version != x._version:
            while len(self._cut) > _LOOPS:
                self._cut.pop(next(iter(self._cut)))
            self._cut[key] = x, x._version, None  # one index is no loop yet
            return x[index]
        pieces = x.unbind(at[0]) if pieces is None else pieces
        if at[1] < n - 1:
            self._cut[key] = x, version, pieces
        return pieces[at[1]]


def _step(index: Any) -> tuple[int, int] | None:
    """(dimension, position) of an index that takes one position of one dimension, and all of the others."""
    every = index if isinstance(index, tuple) else (index,)
    found = [(d, i) for d, i in enumerate(every) if type(i) is int]
    whole = all(type(i) is int or i == slice(None) for i in every if isinstance(i, int | slice))
    known = all(isinstance(i, int | slice) for i in every)
    return found[0] if known and whole and len(found) == 1 else None


class Wide(TorchFunctionMode):  # type: ignore[misc]
    """While it is open, products are in float32, and operations on numbers of two types; nothing is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self._stored: dict[int, Any] = {}  # of the operation that runs: where a widened weight is, to the weight
        self._steps = Steps()
        self.saved: int | None = None
        """Bytes of what autograd would have kept, weights left out, where this is a number: then it keeps nothing."""
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> Any:
        self._saving.__enter__()
        return super().__enter__()

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)
        self._saving.__exit__(*why)

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "__getitem__":
            return self._steps.get(*args)
        if name in _AS_IS:
            out = func(*args, **kwargs)
            rounded = name in _CASTS and getattr(out, "dtype", None) in NARROW and args[0].dtype == torch.float32
            return args[0] if rounded else out
        if name == "embedding":  # the rows, not the table
            return _as(func(*args, **kwargs), torch.float32)
        types = {t.dtype for t in _floats((args, *kwargs.values()))}
        if not types.intersection(NARROW) or not (len(types) > 1 or name in _PRODUCTS):
            return func(*args, **kwargs)
        if name.endswith("_") and not name.startswith("__"):  # in place: what is written to keeps its type
            rest = tree_map(lambda x: _as(x, args[0].dtype), (args[1:], kwargs))
            return func(args[0], *rest[0], **rest[1])
        try:
            args, kwargs = tree_map(self._widen, (args, kwargs))
            out = func(*args, **kwargs)
        finally:
            self._stored.clear()
        return out

    def _widen(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype not in NARROW:
            return x
        found = x.float()
        if isinstance(x._base if x._is_view() else x, torch.nn.Parameter):
            self._stored[found.data_ptr()] = x.detach()
        return found

    def _pack(self, x: Any) -> Any:
        stored = self._stored.get(x.data_ptr()) if self._stored and x.dtype == torch.float32 else None
        mine = stored is not None and stored.numel() == x.numel()
        if self.saved is not None:
            weight = mine or isinstance(x._base if x._is_view() else x, torch.nn.Parameter)
            self.saved += 0 if weight else x.numel() * x.element_size()
            return None
        if not mine:
            return x
        return stored, x.shape, x.stride()

    def _unpack(self, kept: Any) -> Any:
        if isinstance(kept, torch.Tensor):
            return kept
        stored, shape, stride = kept
        return stored.float().as_strided(shape, stride)


def _floats(values: Any) -> Any:
    """The floating-point tensors of arguments, those in lists among them."""
    for x in values:
        if isinstance(x, torch.Tensor):
            if x.is_floating_point():
                yield x
        elif isinstance(x, list | tuple):
            yield from _floats(x)


def _as(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
