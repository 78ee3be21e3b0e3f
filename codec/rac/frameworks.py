"""Dense words to numpy arrays or torch tensors. torch is imported only when it is asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import LimitError, MissingDependencyError
from rac.records import Stated
from rac.registry import DTYPES


def check(framework: str, device: str = "cpu") -> None:
    """ValueError for an unknown framework, MissingDependencyError where torch is needed and not there."""
    if framework not in ("np", "pt"):
        raise ValueError(f"framework must be 'np' or 'pt', not {framework!r}")
    if framework == "np" and str(device) != "cpu":
        raise ValueError("numpy arrays live on the CPU; use framework='pt' for another device")
    if framework == "pt":
        torch_module()


def default(framework: str | None, device: str) -> str:
    """The framework that is meant where none is named: torch where tensors go to another device than the CPU."""
    return framework or ("np" if str(device) == "cpu" else "pt")


def torch_module() -> Any:
    """The torch package."""
    try:
        import torch
    except ImportError as e:
        raise MissingDependencyError("framework='pt' needs `pip install rac-codec[torch]`") from e
    return torch


def check_device(device: str) -> None:
    """ValueError where torch has no such device here."""
    try:
        torch_module().empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {str(device)!r}: {str(e).splitlines()[0]}") from None


def device_name(device: Any) -> str:
    """What torch calls a device that is given by name, by number or as `torch.device`; ValueError for anything else."""
    try:
        return str(torch_module().device(device))
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"device {device!r}: {str(e).splitlines()[0]}") from None


def torch_dtype(dtype: str) -> Any:
    """Return the torch dtype of a RAC dtype; F4 comes as packed bytes, two values each."""
    return getattr(torch_module(), DTYPES[dtype].native)


@functools.cache
def numpy_dtype(dtype: str) -> Any:
    """Return the numpy dtype of a RAC dtype; F4 comes as packed bytes, two values each."""
    name = "uint8" if dtype == "F4" else DTYPES[dtype].native
    if hasattr(np, name):
        return np.dtype(name).newbyteorder("<")
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def to_framework(matrix: NDArray[Any], dtype: str, shape: tuple[int, ...], framework: str, device: str = "cpu") -> Any:
    """Words (any shape, contiguous) as array or tensor of `shape`, on the CPU in their memory; F4 as packed bytes."""
    if dtype == "F4":
        shape = (*shape[:-1], shape[-1] // 2)
    if framework == "np":
        return matrix.reshape(-1).view(numpy_dtype(dtype)).reshape(shape)
    torch = torch_module()
    flat = torch.from_numpy(matrix.reshape(-1).view(np.uint8))
    out = flat.view(torch_dtype(dtype)).reshape(shape)
    try:
        return out if str(device) == "cpu" else out.to(device)
    except torch.OutOfMemoryError as e:
        raise LimitError(out_of_memory(device, out.nbytes)) from e


def out_of_memory(device: str, needed: int) -> str:
    """What there is to say where `needed` bytes did not fit."""
    try:
        free, total = torch_module().cuda.mem_get_info(device)
        there = f"{free} of {total} are free"
    except (RuntimeError, AssertionError, ValueError):  # no such device, or it does not say
        there = "there are fewer"
    return f"{device} is out of memory: {needed} bytes are needed, {there}"


def put(t: Stated, value: Any, framework: str, device: str, out: dict[str, Any]) -> None:
    """What an engine yields (words, or a torch tensor) into `out`, under all names; tied names share it."""

    def made(words: Any) -> Any:
        is_array = isinstance(words, np.ndarray)
        return to_framework(words, t.dtype, t.shape, framework, device) if is_array else words

    out[t.name] = made(value)
    for alias, tied in t.aliases:
        if tied:
            out[alias] = out[t.name]
        else:
            out[alias] = made(value.copy() if isinstance(value, np.ndarray) else value.clone())


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor, made when it is read, as a slice of a safetensors file is: `part[...]`, `part[0]`, `part[2, 5]`."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], NDArray[np.uint8]]  # its bytes [start, stop)

    def get_dtype(self) -> str:
        """Data type, as safetensors names them."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.shape)

    def __getitem__(self, key: Any) -> Any:
        """A torch tensor; of one or more leading integers only these rows are made."""
        size = math.prod(self.shape) * DTYPES[self.dtype].bits // 8
        at = key if isinstance(key, tuple) else (key,)
        if self.shape and len(at) < len(self.shape) and all(type(i) is int for i in at):
            inner = self.shape[len(at) :]
            width = size // math.prod(self.shape[: len(at)])
            start = int(np.ravel_multi_index(at, self.shape[: len(at)])) * width
            return to_framework(np.ascontiguousarray(self.read(start, start + width)), self.dtype, inner, "pt")
        return to_framework(np.ascontiguousarray(self.read(0, size)), self.dtype, self.shape, "pt")[key]
