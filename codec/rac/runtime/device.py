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
def _decoder(device: str) -> Callable[..., Any] | None:
    """`rac.decode.cuda.decode_tensor`; None where it cannot be used, with one warning that says why."""
    try:
        cuda = importlib.import_module("rac.decode.cuda")
        why = cuda.why_not(device)
    except ImportError as e:
        why = str(e)
    if why is None:
        decode: Callable[..., Any] = cuda.decode_tensor
        return decode
    warnings.warn(f"rac: layers on {device} are decoded on the host and copied: {why}", stacklevel=2)
    return None


def dense(s: rc.Stored, data: Any) -> Any:
    """The weight on the device of `data`, the (n,) uint8 tensor of its record.

    Checksums and tables are the host's work, so the bytes come back to it first.
    """
    t, host = s.tensor, np.ascontiguousarray(data.cpu().numpy())
    if decode := _decoder(str(data.device)):
        units = [rc.unit(host, t, i) for i in range(len(t.units))]
        return decode(t, [u.data for u in units[: t.first]], units[t.first :], data.device, rc.matrices(s, host))
    words = tn.empty(t)
    rc.decode(s, host, words)
    return fw.to_framework(words, t.dtype, t.shape, "pt", str(data.device))
