"""Records whose bytes are in the memory of another device than the host."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rac.decode import frameworks as fw
from rac.decode import tensor as tn
from rac.runtime import record as rc


def check(name: str) -> None:
    """ValueError where torch has no such device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r}: {str(e).splitlines()[0]}") from None


@functools.cache
def _cuda() -> Callable[..., Any] | None:
    """`rac.decode.cuda.decode_record`, or None, with one warning that says why."""
    try:
        decode: Callable[..., Any] = importlib.import_module("rac.decode.cuda").decode_record
        return decode
    except (ImportError, AttributeError) as e:
        warnings.warn(f"rac: layers on CUDA are decoded on the host and copied: {e}", stacklevel=2)
        return None


def dense(s: rc.Stored, data: Any) -> Any:
    """The weight on the device of `data`, the (n,) uint8 tensor of its record."""
    if data.device.type == "cuda" and (decode := _cuda()) is not None:
        return decode(s.tensor, data)
    words = tn.empty(s.tensor)
    rc.decode(s, np.ascontiguousarray(data.cpu().numpy()), words)
    return fw.to_framework(words, s.tensor.dtype, s.tensor.shape, "pt", str(data.device))
