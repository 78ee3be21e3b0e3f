"""A torch tensor that reads and decodes no more of a file than is asked of it.

Loaders of other programs take named tensors and cut out what their rank needs with `narrow` or an index, often after
they looked at the shape. A `Slice` of the archive does the reading (docs of `RacFile.get_slice`); this is the tensor
around it. Any other operation decodes the whole tensor first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from rac import frameworks
from rac.decode.slices import Slice


class LazyTensor(torch.Tensor):
    """A tensor of an archive that is open. On the CPU, contiguous, without a gradient."""

    _part: Slice

    @staticmethod
    def __new__(cls, part: Slice) -> LazyTensor:
        """Around what `RacFile.get_slice` gives."""
        out: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, part.get_shape(), dtype=frameworks.torch_dtype(part.get_dtype()), device="cpu", requires_grad=False
        )
        out._part = part
        return out

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:  # type: ignore[override]
        """`length` elements of dimension `dim` from `start`: these are read."""
        if not -self.ndim <= dim < self.ndim:
            raise IndexError(f"dimension {dim} of a tensor that has {self.ndim}")
        start = int(start)
        start += self.shape[dim] if start < 0 else 0
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise RuntimeError(f"{start} to {start + length} of dimension {dim}, which has {self.shape[dim]}")
        key = [slice(None)] * self.ndim
        key[dim % self.ndim] = slice(start, start + length)
        return self._part[tuple(key)]  # type: ignore[no-any-return]

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The part that integers, slices and an ellipsis select: it is read. Other keys index the whole tensor."""
        keys = key if isinstance(key, tuple) else (key,)
        if all(k is Ellipsis or (isinstance(k, int | slice) and not isinstance(k, bool)) for k in keys):
            return self._part[keys]  # type: ignore[no-any-return]
        return self._part[...][key]  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any other operation works on the whole tensor, read anew; shape and data type are known without."""
        args, kwargs = tree_map_only(cls, lambda lazy: lazy._part[...], (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        """Without reading."""
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"
