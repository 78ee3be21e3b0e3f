"""Dense words to numpy arrays or torch tensors. torch is imported only when it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import LimitError, MissingDependencyError
from rac.tensor import Tensor

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "C64": "<c8",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
    "F4": "u1",
}
_ML = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
FRAMEWORKS = ("np", "pt")


def check(framework: str, device: str = "cpu") -> None:
    """ValueError for an unknown framework, MissingDependencyError where torch is needed and not there."""
    if framework not in FRAMEWORKS:
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


def torch_dtype(dtype: str) -> Any:
    """Return the torch dtype of a RAC dtype; F4 comes as packed bytes, two values each."""
    return getattr(torch_module(), TORCH[dtype])


def numpy_dtype(dtype: str) -> Any:
    """Return the numpy dtype of a RAC dtype; F4 comes as packed bytes, two values each."""
    if dtype in _ML:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _ML[dtype]))
    return np.dtype(_NUMPY[dtype])


def to_framework(matrix: NDArray[Any], dtype: str, shape: tuple[int, ...], framework: str, device: str = "cpu") -> Any:
    """Words (any shape, contiguous) as an array or tensor of `shape`; shares their memory on the CPU.

    F4 tensors have half the last dimension: an element is a byte of two values, as in torch.
    """
    if dtype == "F4":
        shape = (*shape[:-1], shape[-1] // 2)
    if framework == "np":
        return matrix.reshape(-1).view(numpy_dtype(dtype)).reshape(shape)
    torch = torch_module()
    flat = torch.from_numpy(matrix.reshape(-1).view(np.uint8))
    out = flat.view(torch_dtype(dtype)).reshape(shape)
    return out if str(device) == "cpu" else on_device(out, device)


def on_device(tensor: Any, device: str) -> Any:
    """A torch tensor, copied to a device; LimitError that says how much was needed where it does not fit."""
    torch = torch_module()
    try:
        return tensor.to(device)
    except torch.OutOfMemoryError as e:
        raise LimitError(out_of_memory(device, tensor.nbytes)) from e


def out_of_memory(device: str, needed: int) -> str:
    """What there is to say where `needed` bytes did not fit."""
    try:
        free, total = torch_module().cuda.mem_get_info(device)
        there = f"{free} of {total} are free"
    except (RuntimeError, AssertionError, ValueError):  # no such device, or it does not say
        there = "there are fewer"
    return f"{device} is out of memory: {needed} bytes are needed, {there}"


def put(t: Tensor, value: Any, framework: str, device: str, out: dict[str, Any]) -> None:
    """What an engine yields (words, or a torch tensor) into `out`, under all names; tied names share it."""
    if isinstance(value, np.ndarray):
        out[t.name] = to_framework(value, t.dtype, t.shape, framework, device)
    else:
        out[t.name] = value
    for alias, tied in t.aliases:
        if tied:
            out[alias] = out[t.name]
        elif isinstance(value, np.ndarray):
            out[alias] = to_framework(value.copy(), t.dtype, t.shape, framework, device)
        else:
            out[alias] = value.clone()
