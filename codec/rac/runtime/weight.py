"""The weight of a module that holds a record instead: a tensor of its shape and data type, decoded when needed.

Whoever reads it gets the numbers of the dense model. Shape, data type and device are known without decoding; rows of an
embedding and the experts of a fused parameter are decoded alone; everything else decodes all of it. Who writes to it
makes the module dense first (rac.runtime.replace), so that nothing is written to a copy that goes away.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.utils import _pytree as pytree


class Source(Protocol):
    """A parameter of a module, held as a record."""

    @property
    def record(self) -> torch.Tensor:
        """(bytes,) uint8."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Data type of the weight that is read."""

    def dense(self) -> torch.Tensor:
        """All of it, in memory of its own, in the data type of the file."""

    def rows(self, found: torch.Tensor) -> torch.Tensor:
        """The parts along the first dimension with these indices, ascending and without repetition."""

    def write(self) -> torch.nn.Parameter:
        """Make the module dense; the parameter that it has from then on."""


def _getter(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


_NUMBERS = {_getter(name) for name in ("T", "mT", "H", "mH", "real", "imag")}
"""Attributes that are numbers; of all others the record need not be decoded."""
_ABOUT = {
    getattr(torch.Tensor, name)
    for name in (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_floating_point"),
        *("is_complex", "__len__", "__hash__", "is_contiguous", "get_device", "storage_offset", "is_inference"),
    )
} | {torch.is_floating_point, torch.is_complex, torch.numel}
_SAME = {torch.Tensor.detach, torch.detach, _getter("data")}
_TURNS = {torch.Tensor.transpose, torch.transpose, torch.Tensor.swapaxes, torch.Tensor.swapdims}
_GROUPED = {f for f in (getattr(functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f}


class Weight(torch.Tensor):
    """What `module.weight` is of a module that holds the record of its weight. Frozen: it has no gradient."""

    source: Source
    turned: bool
    """Whether the last two of three dimensions are swapped."""
    _is_param = True  # isinstance(weight, nn.Parameter), as of the dense module
    _is_hf_initialized = True  # never filled with random numbers
    _found: torch.Tensor | None
    _now: torch.nn.Parameter | None
    """The weight of the module once that is dense."""

    @staticmethod
    def __new__(cls, source: Source, turned: bool = False) -> Weight:
        """`turned` needs three dimensions."""
        shape = source.shape
        size = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        how = {"dtype": source.compute_dtype, "device": source.record.device, "requires_grad": False}
        made: Weight = torch.Tensor._make_wrapper_subclass(cls, size, **how)  # type: ignore[attr-defined]
        made.source, made.turned, made._found, made._now = source, turned, None, None
        return made

    def decoded(self) -> torch.Tensor:
        """All numbers, a plain tensor; kept as long as this one. RacError where the record is damaged or not there."""
        if self._found is None:
            found = self.source.dense().to(self.source.compute_dtype)
            self._found = found.transpose(-2, -1) if self.turned else found
        return self._found

    def become(self, weight: torch.nn.Parameter) -> None:
        """Stand for the parameter that the module has from now on."""
        self._now = weight
        self._found = weight.transpose(-2, -1) if self.turned else weight

    def some(self, index: torch.Tensor) -> torch.Tensor:
        """The parts along the first dimension with these indices, of any shape, repeated as they are there."""
        if self._found is not None:
            return self._found[index]
        count = self.source.shape[0]
        found, inverse = torch.unique(index, return_inverse=True)
        if len(found) and not (int(found[0]) >= 0 and int(found[-1]) < count):
            raise IndexError(f"index out of range: {int(found[0])} to {int(found[-1])} of {count}")
        out = self.source.rows(found).to(self.source.compute_dtype)
        if index.dim() != 1 or not torch.equal(found, index):  # else they are as they were asked for
            out = out[inverse]
        return out.transpose(-2, -1) if self.turned else out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Decode as much as `func` needs."""
        kwargs = kwargs or {}
        if not args and "tensor" in kwargs:  # of torch.nn.init
            args, kwargs = (kwargs["tensor"],), {name: v for name, v in kwargs.items() if name != "tensor"}
        first = args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            about = getattr(func, "__name__", "") == "__get__" and func not in _NUMBERS and func not in _SAME
            if isinstance(first, Weight):
                if about or func in _ABOUT:
                    return func(*args, **kwargs)
                if func in _SAME or (func is torch.Tensor.requires_grad_ and not _writes(func, args)):
                    return first
                if _writes(func, args):
                    return func(_written(first), *args[1:], **kwargs)
                if (found := _part(func, first, args, kwargs)) is not None:
                    return found
            elif func is functional.embedding and len(args) > 1 and isinstance(args[1], Weight):
                return args[1].some(first)  # padding and sparseness are about gradients, which it has none of
            elif func in _GROUPED and (found := _grouped(func, args, kwargs)) is not None:
                return found
            if isinstance(kwargs.get("out"), Weight):
                kwargs = kwargs | {"out": _written(kwargs["out"])}
            args, kwargs = pytree.tree_map_only(Weight, Weight.decoded, (args, kwargs))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As `__torch_function__`, for what calls torch from elsewhere; nothing is written from there."""
        if func._schema.is_mutable and isinstance(args[0], Weight):
            raise RuntimeError(f"{func} cannot write to a weight that is held as a record")
        args, kwargs = pytree.tree_map_only(Weight, Weight.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)


def _writes(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    if name == "requires_grad_":
        return len(args) < 2 or bool(args[1])
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or name in ("__setitem__", "__set__") or (name.startswith("__i") and name[3:-2] in _INPLACE)


_INPLACE = ["add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor"]


def _written(weight: Weight) -> torch.Tensor:
    """The parameter of the module, dense from now on."""
    found = weight._now if weight._now is not None else weight.source.write()
    return found.transpose(-2, -1) if weight.turned else found


def _part(func: Any, weight: Weight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What takes a part of it, or turns it, without decoding all; None: this is something else."""
    dims = weight.dim()
    if func is torch.Tensor.__getitem__:
        key = args[1]
        if isinstance(key, int) and not isinstance(key, bool):
            key = torch.tensor(key)
        if isinstance(key, torch.Tensor) and not isinstance(key, Weight) and key.dtype in (torch.int64, torch.int32):
            return weight.some(torch.where(key < 0, key + weight.shape[0], key))
    if func in _TURNS and dims == 3 and not kwargs and {d % dims for d in args[1:]} == {1, 2}:
        return Weight(weight.source, not weight.turned)
    return None


def _one_by_one(x: torch.Tensor) -> bool:
    """Whether experts are decoded one after the other, so that one is in memory; else all at once, for one launch."""
    return x.device.type == "cpu"


def _grouped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product of rows, sorted by expert, with the experts that have any, one after the other; None: another call."""
    given = {name for name, value in kwargs.items() if value is not None}
    if len(args) != 2 or given != {"offs"} or not isinstance(args[1], Weight) or args[0].dim() != 2:
        return None
    (x, weight), offsets = args, kwargs["offs"]
    ends = offsets.tolist()
    spans = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
    if _one_by_one(x):
        out = [func(x[a:b], weight.some(torch.tensor([e])), offs=offsets.new_tensor([b - a])) for e, a, b in spans]
    else:
        found = weight.some(torch.tensor([e for e, _, _ in spans], dtype=torch.int64))
        out = [func(x, found, offs=offsets.new_tensor([b for _, _, b in spans]))] if spans else []
        return out[0] if out else x.new_zeros(x.shape[0], weight.shape[-1])
    left = x.shape[0] - (ends[-1] if ends else 0)  # of no expert: the kernels leave these rows as they are
    return torch.cat([*out, x.new_zeros(left, weight.shape[-1])])
