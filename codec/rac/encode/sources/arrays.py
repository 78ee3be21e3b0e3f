"""Arrays in memory as a source."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.encode.sources.model import Source, SourceTensor
from rac.errors import SourceError
from rac.registry import DTYPES

BY_NATIVE = {d.native: name for name, d in DTYPES.items()}  # numpy, ml_dtypes and torch agree on these names


def _dtype(kind: str) -> str:
    if kind not in BY_NATIVE:
        raise ValueError(f"unsupported dtype {kind}")
    return BY_NATIVE[kind]


def _array(value: Any) -> tuple[str, tuple[int, ...], tuple[Any, ...] | None, NDArray[np.uint8]]:
    """(dtype, shape, identity of the memory, bytes) of a numpy array or torch tensor."""
    torch: Any = sys.modules.get("torch")  # while nobody has imported it, nothing is a torch tensor
    identity: tuple[Any, ...] | None = None
    if torch is not None and isinstance(value, torch.Tensor):
        order, shape, dtype = "=", tuple(value.shape), _dtype(str(value.dtype).removeprefix("torch."))
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel() == 1:  # may still have the stride of what it was cut out of
            flat = flat.as_strided((1,), (1,))
        raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
        identity = (dtype, shape, value.stride(), str(value.device), value.data_ptr(), value.is_conj(), value.is_neg())
    else:
        array = np.asarray(value)
        order, shape, dtype = array.dtype.byteorder, array.shape, _dtype(array.dtype.name)
        if isinstance(value, np.ndarray):  # of anything else this may be a temporary copy
            identity = (dtype, shape, array.strides, order, array.__array_interface__["data"][0])
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if order == ">" or (order == "=" and sys.byteorder == "big"):
        raw = raw.view(f"u{DTYPES[dtype].word}").byteswap().view(np.uint8)
    if dtype == "F4":
        shape = (*shape[:-1], 2 * shape[-1])
    return dtype, shape, identity if raw.size else None, raw


def from_arrays(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Source:
    """Arrays or torch tensors as a source, copied where not contiguous or not little-endian; or SourceError."""
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise SourceError(f"metadata maps text to text, not {key!r} to {text!r}")
    items = list(tensors.items())  # all alive at once, so that equal addresses are one memory
    arrays = []
    for name, value in items:
        try:
            name.encode()  # fails for half a surrogate pair
            arrays.append((name, *_array(value)))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as e:
            raise SourceError(f"tensor {name!r} cannot be packed: {e}") from e
    uses = Counter(identity for *_, identity, _ in arrays if identity)
    ids: dict[Any, int] = {identity: i for i, identity in enumerate(i for i, n in uses.items() if n > 1)}
    found = tuple(SourceTensor(n, dtype, shape, raw, tie=ids.get(i)) for n, dtype, shape, i, raw in arrays)
    return Source("memory", found, (), dict(metadata or {}))
