"""Decoding on a GPU, seen from the host: what it is given, when it is waited for, and what decodes where it cannot.

The kernels are in `rac.gpu.decoder`, which is imported where a CUDA device is asked for: `why_not` and `DeviceDecoder`.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import frameworks
from rac.container.access import InFile
from rac.container.feed import Trace
from rac.decode.engine import RING, Cpu, Damaged, Engine, Item, first_units, note
from rac.errors import LimitError, RacError, SourceError, TruncatedError
from rac.registry import RECORD_OBJECT
from rac.tensor import Tensor

_warned = set[str]()


def why_not(device: str) -> str | None:
    """Why `rac.gpu.decoder` cannot decode on a device; None where it can."""
    try:
        why: str | None = importlib.import_module("rac.gpu.decoder").why_not(device)
    except ImportError as e:
        why = f"{e.name or e} is missing; `pip install rac-codec[cuda]`"
    return why


def engine_for(
    device: str, threads: int, ring: int = RING, damaged: Damaged | None = None, trace: Trace | None = None
) -> Engine:
    """What decodes for `device`: its own kernels, or those of the CPU, with one warning where the device has none."""
    cpu = Cpu(threads, ring, damaged, trace=trace)
    kind = str(device).split(":")[0]
    if kind != "cuda":
        if kind != "cpu":
            frameworks.check_device(device)
        return cpu
    why = why_not(device)
    if why is None:
        return Gpu(importlib.import_module("rac.gpu.decoder"), str(device), ring, damaged, trace)
    frameworks.check_device(device)
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"rac: decoding for {device} runs on the CPU: {why}", stacklevel=3)
    cpu.name += f", copied to {device}"
    return cpu


class Gpu:
    """Hands units to a device as they come, and tensors out in the order of the file."""

    def __init__(self, cuda: Any, device: str, ring: int, damaged: Damaged | None, trace: Trace | None) -> None:
        self.name = f"Triton on {device}"
        self.ring, self.trace = ring, trace
        self._cuda, self._device, self._damaged = cuda, device, damaged

    def run(self, items: Iterator[Item | None]) -> Iterator[tuple[Tensor, Any]]:
        """(tensor, torch tensor) of each item, and objects as arrays."""
        batch = _Batch(self._cuda.DeviceDecoder(self._device, self.ring // 2), self._device, self.trace)
        for item in items:
            if item is None or item.late():
                yield from batch.flush()
            if item is None:
                continue
            if item.t.record.type == RECORD_OBJECT:  # small, few, and used as matrices: the CPU decodes them
                yield from Cpu(1, self.ring, self._damaged).run(iter([item]))
                continue
            ready: list[tuple[Tensor, Any]] = []
            with InFile(item.file, repr(item.t.name)):
                try:
                    batch.add(item)
                    # waiting for the device is rare where all is well; an error is to be that of one tensor
                    if self._damaged is not None or batch.size > self.ring // 2:
                        ready = batch.flush()
                except (TruncatedError, SourceError):
                    raise
                except RacError as e:
                    if self._damaged is None:
                        raise
                    batch.drop()
                    note(self._damaged, item.t, e)
            yield from ready
        yield from batch.flush()


class _Batch:
    """Tensors that a device has been given since it was last waited for."""

    def __init__(self, decoder: Any, device: str, trace: Trace | None) -> None:
        self._decoder, self._device, self._trace = decoder, device, trace
        self._start = 0.0
        self.drop()

    def add(self, item: Item) -> None:
        """Give a tensor to the device."""
        t = item.t
        self._start = self._start or time.monotonic()
        try:
            out = self._decoder.add(t, first_units(item), _units(item), item.objects())
        except frameworks.torch_module().OutOfMemoryError as e:
            raise LimitError(frameworks.out_of_memory(self._device, t.nbytes), unit=repr(t.name)) from e
        self._tensors.append((t, out))
        self.size += t.nbytes

    def flush(self) -> list[tuple[Tensor, Any]]:
        """Wait for all of it; what came of it."""
        if self._tensors:
            self._decoder.flush()
            if self._trace:
                self._trace("decode", self._start, time.monotonic(), self.size)
        out = self._tensors
        self.drop()
        return out

    def drop(self) -> None:
        """Forget what is not finished; `size` are the dense bytes of what came since."""
        self._tensors: list[tuple[Tensor, Any]] = []
        self.size, self._start = 0, 0.0


def _units(item: Item) -> Iterator[NDArray[np.uint8]]:
    """The units of the tiles; each is given back when the next is asked for."""
    for i in range(item.t.first, len(item.t.units)):
        view, held = item.take(i)
        try:
            yield np.frombuffer(view, np.uint8)
        finally:
            if held:
                held.give()
