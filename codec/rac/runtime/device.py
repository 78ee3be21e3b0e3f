"""Records whose bytes are in the memory of another device than the host."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import torch

from rac import frameworks
from rac.decode.gpu import why_not
from rac.runtime import record
from rac.tensor import empty


@functools.cache
def _why_not(device: str) -> str | None:
    """Why the kernels cannot be used on a device, said in one warning; None where they can."""
    why = why_not(device)
    if why is not None:
        warnings.warn(f"rac: layers on {device} are decoded on the host and copied: {why}", stacklevel=2)
    return why


def version(data: torch.Tensor) -> tuple[int, int]:
    """Changes when the bytes of a tensor do."""
    return data.data_ptr(), data._version


def decoded(s: record.Stored, data: record.Bytes, device: str = "cpu", pool: Executor | None = None) -> torch.Tensor:
    """The weight, decoded on the host in memory of its own, and then on a device."""
    words = empty(s.tensor)
    record.decode(s, data, words, pool=pool)
    out: torch.Tensor = frameworks.to_framework(words, s.tensor.dtype, s.tensor.shape, "pt", device)
    return out


class Resident:
    """What kernels need to decode one record where it is: made once for the bytes that are there.

    The host checks the record, lays out tables and jobs, and copies these to the device; after that decoding is
    launches on the current stream, and nothing on the host.
    """

    def __init__(self) -> None:
        self._key: tuple[int, int] | None = None
        self._packed: Any = None
        self._data: torch.Tensor | None = None

    def dense(self, weight: torch.Tensor, stored: Callable[[], tuple[record.Stored, record.Bytes]]) -> torch.Tensor:
        """The weight, on the device of its record (n,) uint8, which `stored` fetches to the host, its head checked.

        RacError where the record is damaged. What only decoding shows is looked for the first time.
        """
        if _why_not(str(weight.device)) is not None:
            return decoded(*stored(), str(weight.device))
        key = version(weight)
        new = key != self._key
        if new:
            self._key = None
            self._pack(weight, *stored())
        out: torch.Tensor = torch.ops.rac.decode(weight if self._data is None else self._data, self._packed.handle)
        if new:
            self._packed.check()
            self._key = key
        return out

    def ready(self, weight: torch.Tensor) -> tuple[int, int] | None:
        """Changes when the record does; None before `dense` has decoded it by kernels."""
        return self._key if self._key == version(weight) else None

    def into(self, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """The weight in the first bytes of a buffer of the same device, by launches alone; only where it is `ready`."""
        from rac.gpu import op

        p = self._packed
        out = buffer[: p.tensor.nbytes].view(p.dtype).view(p.shape)
        op.into(weight if self._data is None else self._data, p.handle, out)
        return out

    def _pack(self, weight: torch.Tensor, s: record.Stored, host: record.Bytes) -> None:
        from rac.gpu import op

        t = s.tensor
        units = [record.unit(host, t, i) for i in range(len(t.units))]
        first = [bytes(u) for u in units[: t.first]]
        at = [t.record.payload + u.offset for u in t.units[t.first :]]
        in_place = not op.frames(t) and not any(a % 16 for a in at)
        self._packed = op.Packed(t, first, units[t.first :], record.matrices(s, host), at if in_place else None)
        self._data = None if in_place else self._packed.data.to(weight.device)
