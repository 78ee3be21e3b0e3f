"""Decoding on a GPU, seen from the host: buffers that it can fetch from, what it is given, when it must be waited for.

The kernels are in `rac.decode.cuda`, which is imported where a CUDA device is asked for. It offers

    why_not(device) -> str | None                  why its kernels cannot be used there
    DeviceDecoder(device, ring)                    ring: bytes that it may hold on the device beyond the tensors
        .add(tensor, first, units, objects)        -> torch.Tensor, filled when `flush` has returned
        .flush()                                   the bytes of `units` are not needed any more

`first` and `units` are checked bytes of the units in front of the tiles and of the tiles, `objects` float32 matrices.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from rac.container.access import InFile
from rac.container.feed import Held, Trace
from rac.container.zstd import xxh3
from rac.decode import frameworks as fw
from rac.decode import tensor as tn
from rac.decode.engine import RING, Cpu, Damaged, Engine, Item, first_units
from rac.errors import ChecksumError, LimitError, RacError, SourceError, TruncatedError
from rac.registry import RECORD_OBJECT

_warned = set[str]()


def engine_for(
    device: str, threads: int, ring: int = RING, damaged: Damaged | None = None, trace: Trace | None = None
) -> Engine:  # fmt: skip
    """What decodes for `device`: its own kernels, or those of the CPU, with one warning where the device has none."""
    cpu = Cpu(threads, ring, damaged, trace=trace)
    if str(device).split(":")[0] != "cuda":
        return cpu
    try:
        cuda: Any = importlib.import_module("rac.decode.cuda")
        why = cuda.why_not(device)
    except ImportError as e:
        why = f"{e.name or e} is missing; `pip install rac-codec[cuda]`"
    if why is None:
        return Gpu(cuda, device, ring, damaged, trace)
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"rac: decoding for {device} runs on the CPU: {why}", stacklevel=3)
    cpu.name += f", copied to {device}"
    return cpu


class Gpu:
    """Hands units to a device, and tensors out in the order of the file."""

    reference = False

    def __init__(self, cuda: Any, device: str, ring: int, damaged: Damaged | None, trace: Trace | None) -> None:
        self.name = f"Triton on {device}"
        self.ring, self.trace = ring, trace
        self._cuda, self._device, self._damaged = cuda, device, damaged

    def allocate(self, size: int) -> memoryview:
        """Pinned memory, from which a copy runs beside everything else."""
        torch = fw.torch_module()
        try:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as e:
            raise LimitError(f"{size} bytes of pinned memory cannot be had: {e}") from e
        return memoryview(buffer.numpy())

    def run(self, items: Iterator[Item | None]) -> Iterator[tuple[tn.Tensor, Any]]:
        """(tensor, torch tensor) of each item, and objects as arrays."""
        batch = _Batch(self._cuda.DeviceDecoder(self._device, self.ring // 2), self.trace)
        try:
            for item in items:
                if item is None:
                    batch.flush()
                    yield from batch.finished()
                    continue
                if item.t.record.type == RECORD_OBJECT:  # small, few, and used as matrices: the CPU decodes them
                    yield from Cpu(1, self.ring, self._damaged).run(iter([item]))
                    continue
                with InFile(item.file, repr(item.t.name)):
                    try:
                        self._add(batch, item)
                        # a batch holds its buffers until it is flushed: leave enough of them to read into
                        if self._damaged is not None or batch.size > self.ring // 16:
                            batch.flush()
                    except (TruncatedError, SourceError):
                        raise
                    except RacError as e:
                        if self._damaged is None:
                            raise
                        batch.drop()
                        for name in (item.t.name, *(a for a, _ in item.t.aliases)):
                            self._damaged[name] = e.with_traceback(None)
                yield from batch.finished()
            batch.flush()
            yield from batch.finished()
        finally:
            batch.drop()

    def _add(self, batch: _Batch, item: Item) -> None:
        t = item.t
        first = first_units(item)
        units = []
        for i in range(len(t.units)):
            if i < t.first:
                data: bytes | memoryview = first[i]
            else:
                view, held = item.take(i)
                data = batch.take(view, held, self.ring // 8)
                units.append(np.frombuffer(data, np.uint8))
            if xxh3(data) != t.units[i].check:
                offset = t.record.payload + t.units[i].offset
                raise ChecksumError("checksum does not match", unit=f"{t.name!r} unit {i}", offset=offset)
        batch.add(t, first, units, item.objects(), self._device)


class _Batch:
    """Tensors that a device has been given since it was last waited for."""

    def __init__(self, decoder: Any, trace: Trace | None) -> None:
        self._decoder, self._trace = decoder, trace
        self._held, self._tensors = list[Held](), list[tuple[tn.Tensor, Any]]()
        self._ready = list[tuple[tn.Tensor, Any]]()
        self.size = self._dense = 0
        self._start = 0.0

    def take(self, view: memoryview, held: Held | None, most: int) -> bytes | memoryview:
        """Bytes that stay as they are until `flush`; copied where too many buffers would be held."""
        self.size += len(view)
        if held is None:
            return view
        if self.size <= most:
            self._held.append(held)
            return view
        data = bytes(view)
        held.give()
        return data

    def add(self, t: tn.Tensor, first: list[bytes], units: list[Any], objects: list[Any], device: str) -> None:
        """Give a tensor to the device."""
        torch = fw.torch_module()
        self._start = self._start or time.monotonic()
        try:
            self._tensors.append((t, self._decoder.add(t, first, units, objects)))
        except torch.OutOfMemoryError as e:
            raise LimitError(fw.out_of_memory(device, t.nbytes + t.record.payload_size)) from e
        self._dense += t.nbytes

    def flush(self) -> None:
        """Wait for all of it, and give the buffers back."""
        if self._tensors:
            self._decoder.flush()
            if self._trace:
                self._trace("decode", self._start, time.monotonic(), self._dense)
        self._ready += self._tensors
        self.drop()

    def drop(self) -> None:
        """Forget what is not finished."""
        self._tensors, held, self._held = [], self._held, []
        self.size = self._dense = 0
        self._start = 0.0
        for h in held:
            h.give()

    def finished(self) -> Iterator[tuple[tn.Tensor, Any]]:
        """Hand out what is there."""
        ready, self._ready = self._ready, []
        ready.reverse()
        while ready:
            yield ready.pop()
