"""`torch.ops.rac.decode`: a packed tensor to the dense one, as an operator that torch.compile and CUDA graphs know.

    packed = op.Packed(t, first, units)     # once
    torch.ops.rac.decode(packed.data.to(device), packed.handle)

The bytes are those of the record's tiles, or the whole record as it lies in a file, the same on every device. What else
a device needs is made once for it, and kept with the handle. On the CPU the C kernel decodes, on a CUDA device the
kernels beside `rac.gpu.decoder`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rac import frameworks
from rac.cpu.work import Place, Work, target
from rac.decoder import Decoder
from rac.errors import ChecksumError, UnsupportedError
from rac.gpu import decoder
from rac.gpu.layout import Batch, Launch
from rac.gpu.stages import BandLayout, require
from rac.grid import up16
from rac.native.prototypes import Array
from rac.tensor import Tensor

SLACK = 128  # bytes behind a tile that a kernel may read: a word for each lane of a warp


@dataclass(frozen=True)
class _OnDevice:
    """What a device needs besides the bytes of the tiles."""

    aux: torch.Tensor
    last: torch.Tensor  # the last tile once more, where less than SLACK is behind it
    objects: torch.Tensor
    status: torch.Tensor
    launches: list[Launch]
    work: int


class Packed:
    """A tensor that stays compressed; its `handle` is good as long as this object lives.

    `data` (bytes,) uint8 are its tiles, checked, planes that were Zstandard frames expanded; move them to where they
    are to be decoded, and hand them to the operator with the handle.

    Args:
        t: The record, parsed.
        first: The units in front of the tiles.
        units: The tiles in order.
        objects: The matrices that the tensor uses, float32.
        at: Where each tile begins in bytes that the caller has, multiples of 16. These bytes are then what the operator
            is to be given, and `data` is empty. Only of tiles without Zstandard frames (`frames`).

    Raises:
        ChecksumError, FormatError: A unit breaks the format.
    """

    def __init__(
        self,
        t: Tensor,
        first: Sequence[bytes],
        units: Sequence[Any],
        objects: Sequence[Array] = (),
        at: Sequence[int] | None = None,
    ) -> None:
        self.tensor, self.objects = t, [np.ascontiguousarray(o, np.float32) for o in objects]
        self.decoder = Decoder(t, first, objects=self.objects)
        self.at: list[tuple[int, int]] = []
        pieces, end = [], 0
        for i, data in enumerate(units):
            unit = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
            self.decoder.check(i + t.first, unit.data)
            if at is not None:
                self.at.append((at[i], at[i] + len(unit)))
                continue
            with self.decoder.at(i + t.first):
                unit = self.decoder.coder.plain(unit, t.grid.box(i))
            self.at.append((end, end + len(unit)))
            pieces += [unit, np.zeros(-len(unit) % 16, np.uint8)]
            end += up16(len(unit))
        if at is not None and (frames(t) or any(a % 16 for a in at)):
            raise ValueError("tiles that are read in their place have no frames and begin at multiples of 16")
        self.data = torch.from_numpy(np.concatenate([*pieces, np.zeros(SLACK, np.uint8)]))
        self.shape = (*t.shape[:-1], t.shape[-1] // 2) if t.dtype == "F4" else t.shape
        self.dtype = frameworks.torch_dtype(t.dtype)
        self.in_place = at is not None
        self._on: dict[tuple[torch.device, int], _OnDevice] = {}
        self.handle = next(_handles)
        _packed[self.handle] = self

    def on(self, data: torch.Tensor) -> _OnDevice:
        """Tables and jobs on the device of `data`, made where they are not there yet."""
        key = data.device, data.data_ptr() if self.in_place else 0
        if key not in self._on:
            self._on[key] = self._prepare(data)
        return self._on[key]

    def _prepare(self, data: torch.Tensor) -> _OnDevice:
        if reason := decoder.why_not(data.device):
            raise UnsupportedError(f"cannot decode on {data.device}: {reason}", unit=repr(self.tensor.name))
        require(self.tensor.chain)
        batch, host = Batch(), data.cpu().numpy()
        late, last = self._late(data)
        starts = itertools.accumulate((o.nbytes for o in self.objects), initial=0)
        places = [(start, o.shape[1]) for start, o in zip(starts, self.objects, strict=False)]
        objects = np.concatenate([o.reshape(-1) for o in self.objects] or [np.zeros(1, np.float32)])
        for band in self.tensor.bands():
            layout = BandLayout(batch, self.decoder, band, 0)
            for i in band.tiles:
                a, b = self.at[i]
                layout.tile(batch, i, host[a:b], last.data_ptr() - data.data_ptr() if i == late else a)
            layout.finish(batch, places)
        launches = batch.seal()
        return _OnDevice(
            torch.from_numpy(batch.buffer[: batch.aux].copy()).to(data.device),
            last,
            torch.from_numpy(objects).view(torch.uint8).to(data.device),
            torch.zeros(max(1, len(batch.status)), dtype=torch.int32, device=data.device),
            launches,
            batch.work,
        )

    def _late(self, data: torch.Tensor) -> tuple[int, torch.Tensor]:
        """(The last tile, its bytes once more) where less than SLACK is behind it; else -1 and nothing."""
        late = max(range(len(self.at)), key=lambda i: self.at[i][1], default=-1)
        a, b = self.at[late] if self.at else (0, 0)
        if b + SLACK <= len(data):
            return -1, torch.zeros(0, dtype=torch.uint8, device=data.device)
        last = torch.zeros(b - a + SLACK, dtype=torch.uint8, device=data.device)
        last[: b - a] = data[a:b]
        return late, last

    def check(self) -> None:
        """Wait for the devices, and raise what decoding has found; only damage that checksums do not show is left."""
        for device in self._on.values():
            for k in np.flatnonzero(device.status.cpu().numpy()).tolist():
                with self.decoder.at(k + self.tensor.first):
                    raise ChecksumError("the tile does not decode")


def frames(t: Tensor) -> bool:
    """Whether parts of the tiles are Zstandard frames, which no kernel expands."""
    return t.chain.coder.framed


_packed: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


def _of(handle: int) -> Packed:
    if handle not in _packed:
        raise ValueError(f"no packed tensor has the handle {handle}")
    return _packed[handle]


@torch.library.custom_op("rac::decode", mutates_args=(), device_types=("cpu", "cuda"))  # type: ignore[untyped-decorator]
def decode(packed: torch.Tensor, handle: int) -> torch.Tensor:
    """The dense tensor of `Packed.data` and `Packed.handle`, on the device of the data."""
    p = _of(handle)
    out = torch.empty(p.shape, dtype=p.dtype, device=packed.device)
    into(packed, handle, out)
    return out


def into(packed: torch.Tensor, handle: int, out: torch.Tensor) -> None:
    """Decode into `out`, contiguous, of the shape and data type of the tensor, on the device of the data."""
    cuda = packed.device.type == "cuda"
    with torch.cuda.device(packed.device) if cuda else nullcontext():
        (_kernels if cuda or decoder.interpreted() else _host)(_of(handle), packed, out)


def _host(p: Packed, packed: torch.Tensor, out: torch.Tensor) -> None:
    t, data = p.tensor, packed.numpy()
    words = out.reshape(-1).view(torch.uint8).numpy().view(f"<u{t.word}").reshape(t.grid.rows, t.grid.cols)
    work = Work()
    for band in t.bands():
        to = target(t, band, Place(words))
        for i in band.tiles:
            a, b = p.at[i]
            work.add(p.decoder, range(i, i + 1), data[a:b], to, plain=True)
        if t.chain.product is not None:
            work.join(p.decoder, to.words, words[band.box.r0 : band.box.r1], band.box)
    work.run()


@decode.register_fake  # type: ignore[untyped-decorator]
def _(packed: torch.Tensor, handle: int) -> torch.Tensor:
    p = _of(handle)
    return packed.new_empty(p.shape, dtype=p.dtype)


def _kernels(p: Packed, packed: torch.Tensor, out: torch.Tensor) -> None:
    on = p.on(packed)
    work = torch.empty(on.work, dtype=torch.uint8, device=packed.device)
    if out.numel():
        memories = {"units": packed, "aux": on.aux, "work": work, "status": on.status, "objects": on.objects}
        decoder.launch(on.launches, memories | {"out": out.reshape(-1).view(torch.uint8)})
