"""Decoding ahead on a device: while a layer multiplies on its stream, a stream beside it decodes the next one.

Two buffers of the size of a layer take turns. Events say when one is filled and when its product is done, so the host
never waits, and however far it is ahead of the device there are two dense weights and no more (what the allocator's
`record_stream` alone would not give: memory that the host has asked for again is not free yet).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rac.runtime.layers import Compressed as Layer

MOST = 256 << 20
"""Dense bytes of the largest layer that has a buffer; larger ones are decoded when they run."""


@dataclass
class _Place:
    buffer: torch.Tensor
    filled: Any
    """Event: the weight is there."""
    free: Any
    """Event: its product is done."""
    layer: weakref.ref[Any] | None = None
    version: tuple[int, int] | None = None
    weight: torch.Tensor | None = None

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
            assert mine.weight is not None  # noqa: S101
            yield mine.weight
        finally:
            mine.free.record(stream)

    def _begin(self, layer: Layer, place: _Place) -> None:
        """Decode a layer beside the one that runs now."""
        version = layer.resident() if layer.weight.device == self.device else None
        if version is None or layer.dense_bytes > self._size or place.holds(layer):
            return
        with self.api.stream(self._side):
            self._fill(place, layer, version, self._side)
        self.keep(layer.weight, self._side)

    def _make(self, size: int, stream: Any) -> None:
        """Buffers of this size at least."""
        if self._size >= size:
            return
        self._side = self._side or self.api.Stream(self.device)
        self._places, self._size = [], size
        for _ in range(2):
            buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            place = _Place(buffer, self.api.Event(), self.api.Event())
            place.free.record(stream)  # what the memory was before is still in use on this stream
            self._places.append(place)

    def _fill(self, place: _Place, layer: Layer, version: tuple[int, int], stream: Any) -> None:
        """Decode on the stream, which is the current one, behind all that was done with the place."""
        place.layer = None
        stream.wait_event(place.filled)  # a guess that was wrong
        stream.wait_event(place.free)
        self.keep(place.buffer, stream)
        place.weight = layer.decode_into(place.buffer)
        place.filled.record(stream)
        place.layer, place.version = weakref.ref(layer), version
