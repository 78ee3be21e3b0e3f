"""Records whose bytes are in the memory of another device than the host, decoded there.

While a layer multiplies on its stream, a stream beside it decodes the next one. Two buffers of the size of a layer take
turns. Events say when one is filled and when its product is done, so the host never waits, and however far it is ahead
of the device there are two dense weights and no more (what the allocator's `record_stream` alone would not give: memory
that the host has asked for again is not free yet).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rac import frameworks
from rac.decode.gpu import why_not
from rac.runtime import made, record

if TYPE_CHECKING:
    from rac.runtime.layers import Compressed as Layer

MOST = 256 << 20
"""Dense bytes of the largest layer that has a buffer; larger ones are decoded when they run."""


@functools.cache
def _why_not(device: str) -> str | None:
    """Why the kernels cannot be used on a device, said in one warning; None where they can."""
    why = why_not(device)
    if why is not None:
        warnings.warn(f"rac: layers on {device} are decoded on the host and copied: {why}", stacklevel=2)
    return why


@functools.cache
def _warn_made() -> None:
    what = "weights that are made of codes and scales are made on the host and copied, whenever their layers run"
    warnings.warn(f"rac: {what}", stacklevel=4)


def version(data: torch.Tensor) -> tuple[int, int]:
    """Changes when the bytes of a tensor do."""
    return data.data_ptr(), data._version


def decoded(s: made.Weight, data: record.Bytes, device: str = "cpu", pool: Executor | None = None) -> torch.Tensor:
    """The weight, decoded on the host in memory of its own, and then on a device."""
    words = s.room()
    s.decode(data, words, pool=pool)
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

    def dense(self, weight: torch.Tensor, stored: Callable[[], tuple[made.Weight, record.Bytes]]) -> torch.Tensor:
        """The weight, on the device of its record (n,) uint8, which `stored` fetches to the host, its head checked.

        RacError where the record is damaged. What only decoding shows is looked for the first time.
        """
        if _why_not(str(weight.device)) is not None:
            return decoded(*stored(), str(weight.device))
        key = version(weight)
        new = key != self._key
        if new:
            self._key = None
            s, host = stored()
            if isinstance(s, made.Made):
                _warn_made()
                return decoded(s, host, str(weight.device))
            self._pack(weight, s, host)
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


@dataclass
class _Place:
    buffer: torch.Tensor
    filled: Any
    """Event: the weight is there."""
    free: Any
    """Event: its product is done."""
    layer: weakref.ref[Any] | None = None
    version: tuple[int, int] | None = None
    weight: Any = None

    def holds(self, layer: Layer) -> bool:
        return self.layer is not None and self.layer() is layer and self.version == layer.resident()


class Ahead:
    """The buffers of one device. One layer at a time runs: the caller sees to that.

    `api` has its streams and events; `keep` sees to it that memory which a stream uses too is not given to others
    before the stream is done. Tests put others in their place.
    """

    def __init__(
        self,
        device: torch.device,
        api: Any = torch.cuda,
        keep: Callable[[torch.Tensor, Any], None] = torch.Tensor.record_stream,
    ) -> None:
        self.device, self.api, self.keep = device, api, keep
        self._size = 0
        self._places: list[_Place] = []
        """The one that was used last comes last."""
        self._side: Any = None

    @contextlib.contextmanager
    def weight(self, layer: Layer, then: Layer | None, size: int) -> Iterator[torch.Tensor]:
        """The weight of a layer on this device, valid inside for what is launched on the current stream.

        `then` is what is likely to run after it, `size` the dense bytes of the largest layer that is at most `MOST`.
        """
        version = layer.resident()
        if version is None or layer.dense_bytes > size or self.api.is_current_stream_capturing():
            yield layer.dense()
            return
        stream = self.api.current_stream(self.device)
        self._make(size, stream)
        mine = next((p for p in self._places if p.holds(layer)), None)
        if mine is None:
            mine = self._places[0]
            self._fill(mine, layer, version, stream)
        self._places.sort(key=lambda p: p is mine)
        if then is not None and then is not layer:
            self._begin(then, self._places[0])
        stream.wait_event(mine.filled)
        stream.wait_event(mine.free)  # of a product on another stream: `free` will speak for both
        self.keep(mine.buffer, stream)
        try:
            yield mine.weight
        finally:
            mine.free.record(stream)

    def _begin(self, layer: Layer, place: _Place) -> None:
        """Decode a layer beside the one that runs now."""
        version = layer.resident() if layer.record.device == self.device else None
        if version is None or layer.dense_bytes > self._size or place.holds(layer):
            return
        with self.api.stream(self._side):
            self._fill(place, layer, version, self._side)
        self.keep(layer.record, self._side)

    def _make(self, size: int, stream: Any) -> None:
        """Buffers of this size at least."""
        if self._size >= size:
            return
        self._side = self._side or self.api.Stream(self.device)
        buffers = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        self._places, self._size = [_Place(b, self.api.Event(), self.api.Event()) for b in buffers], size
        for place in self._places:
            place.free.record(stream)  # what the memory was before is still in use on this stream

    def _fill(self, place: _Place, layer: Layer, version: tuple[int, int], stream: Any) -> None:
        """Decode on the stream, which is the current one, behind all that was done with the place."""
        place.layer = None
        stream.wait_event(place.filled)  # a guess that was wrong
        stream.wait_event(place.free)
        self.keep(place.buffer, stream)
        place.weight = layer.decode_into(place.buffer)
        place.filled.record(stream)
        place.layer, place.version = weakref.ref(layer), version
