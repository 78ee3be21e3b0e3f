"""Tensors decoded on a CUDA device: checks, job tables and launches.

The host verifies checksums and structure, and expands what is a Zstandard frame; stored bytes and small tables cross to
the device in batches; one launch per kind of tile decodes a batch, straight into the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rac import native
from rac.decoder import Decoder
from rac.errors import ChecksumError, FormatError, LimitError, UnsupportedError
from rac.frameworks import torch_dtype, torch_module
from rac.gpu.layout import Batch, Launch
from rac.gpu.specs import KERNELS, constants, kernel
from rac.gpu.stages import BandLayout, require
from rac.native.prototypes import Array
from rac.tensor import Tensor

RING = 256 << 20
OLDEST = (8, 0)  # compute capability from which on kernels are compiled and tested


def interpreted() -> bool:
    """Whether triton was told to interpret kernels, for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: Any) -> str | None:
    """Why the kernels cannot be used on a device; None where they can."""
    torch = torch_module()
    kind = torch.device(device).type
    if kind != "cuda" and not (kind == "cpu" and interpreted()):
        return f"there are no kernels for {kind}"
    try:
        import triton
    except ImportError:
        return "triton is not installed (pip install rac-codec[cuda])"
    if not hasattr(triton, "constexpr_function"):
        return f"triton {triton.__version__} is older than 3.5"
    if kind == "cpu":
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        return f"compute capability {found[0]}.{found[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    return None


def launch(launches: Iterable[Launch], memories: Mapping[str, Any]) -> None:
    """Launch on the current stream of the device of the memories (`specs.MEMORIES` but for `source`), tensors.

    UnsupportedError where triton cannot compile, load or start a kernel.
    """
    for each in launches:
        call, spec = each.call, KERNELS[each.call.kernel]
        roles = {"out": memories[call.out], "source": memories.get(call.source)}
        jobs = memories["aux"][each.jobs : each.jobs + each.size].view(torch_module().int64)
        args = [{**memories, **roles}[name] for name in spec.memories]
        compiled, settings = kernel(spec.name), spec.settings(dict(call.options))
        try:
            compiled[each.grid](*args, jobs, **constants(spec.name, call.options), **settings)
        except torch_module().OutOfMemoryError:
            raise
        except Exception as e:  # what a compiler, a driver, or a cache of theirs that is damaged ends in is anything
            cache = os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache")
            why = f"triton cannot run the kernel {spec.name!r} ({type(e).__name__}: {e})"
            raise UnsupportedError(f"{why}; where its cache may be damaged, delete {cache}") from e


class _Slot:
    """Memory of one batch: where the host lays it out, and where it is on the device."""

    def __init__(self, torch: Any, cuda: bool, size: int) -> None:
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
        self.aux: Any = None
        self.copied = torch.cuda.Event() if cuda else None
        self.done = torch.cuda.Event() if cuda else None


class DeviceDecoder:
    """Decodes tensors onto a CUDA device, batch by batch, on the current stream.

    While the device decodes one batch, the next is laid out in pinned memory and copied on a stream of its own. The
    host waits for the device only where both halves of the ring are taken.

    Args:
        device: A CUDA device; "cpu" for tests, where TRITON_INTERPRET=1 is set.
        ring: Bytes of host and device memory, besides the tensors, in all. A tile that is larger than its share, and
            the rows of tiles of lowrank/1 and basis/1, take what they need.

    Raises:
        UnsupportedError: `why_not` says why.
    """

    def __init__(self, device: Any, ring: int = RING) -> None:
        if reason := why_not(device):
            raise UnsupportedError(f"cannot decode on {device}: {reason}")
        self._torch = torch = torch_module()
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._stage, self._room = max(1 << 16, ring * 3 // 16), max(1 << 16, ring // 4)
        self._slots: list[_Slot] = []
        self._turn = 0
        self._work: Any = None
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._origin = torch.empty(64, dtype=torch.uint8, device=self.device)  # where the offsets of tensors count from
        self._batch: Batch | None = None
        self._alive: list[Any] = []
        self._states: list[tuple[Any, list[tuple[Decoder, int]]]] = []

    def add(
        self,
        t: Tensor,
        first: Sequence[bytes | memoryview],
        units: Iterable[Any],
        objects: Sequence[Any] = (),
        checked: bool = False,
    ) -> Any:
        """Take in a whole tensor, and return it; its content is there once the current stream has come so far.

        Args:
            t: The tensor's record, parsed: the shape and data type of what is returned (F4: pairs).
            first: The units in front of the tiles.
            units: The tiles in order, bytes or uint8 arrays; used before the call returns.
            objects: The matrices that the tensor uses, float32: arrays, or torch tensors on the device.
            checked: Whether the checksums of the tiles were compared before.

        FormatError or ChecksumError where a unit breaks the format, and what only decoding shows out of `flush`;
        LimitError where the device lacks the memory, UnsupportedError where it has no kernel for a stage.
        """
        require(t.chain)
        dec = Decoder(t, first)
        out = self._empty(t)
        base = out.data_ptr() - self._origin.data_ptr() if out.numel() else 0
        matrices = [self._torch.as_tensor(o).to(self.device).contiguous() for o in objects[: len(t.uses)]]
        try:
            self._tiles(dec, iter(units), matrices, base, checked)
        finally:
            self._alive += [out, *matrices]
        return out

    def _tiles(self, dec: Decoder, units: Iterator[Any], matrices: list[Any], base: int, checked: bool) -> None:
        """All tiles of a tensor that lies `base` bytes from the origin."""
        t = dec.tensor
        where = [(m.data_ptr() - self._origin.data_ptr(), m.stride(0)) for m in matrices]
        for band in t.bands():
            whole = t.chain.product is not None  # its numbers are for one batch
            if whole:
                sizes = sum(t.units[t.first + i].size for i in band.tiles)
                self._make_room(sizes, 4 * (band.box.r1 - band.box.r0) * t.grid.cols)
            layout = BandLayout(self._current(), dec, band, base)
            for i in band.tiles:
                unit = self._unit(dec, i, next(units, None), checked)
                if not whole:
                    self._make_room(len(unit), 0)
                layout.tile(self._current(), i, unit)
            layout.finish(self._current(), where)
        next(units, None)  # gives back what the last one lay in

    @staticmethod
    def _unit(dec: Decoder, i: int, data: Any, checked: bool) -> Array:
        """The unit of tile `i`, (bytes,) uint8, checked, without Zstandard frames."""
        t = dec.tensor
        if data is None:
            raise FormatError(f"{i} of {t.tiles} tiles", unit=repr(t.name))
        unit = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
        with dec.at(i + t.first):
            if len(unit) != t.units[i + t.first].size:
                raise FormatError("unit does not have the size that the record states")
            if not checked:
                dec.check(i + t.first, unit.data)
            return dec.coder.plain(unit, t.grid.box(i))

    def flush(self) -> None:
        """Decode what is waiting, wait for the device; FormatError or ChecksumError of the first tile that is wrong."""
        self.launch()
        states, self._states = self._states, []
        for status, of in states:
            wrong = status.cpu().numpy()
            for k in np.flatnonzero(wrong)[:1].tolist():
                dec, i = of[k]
                with dec.at(i + dec.tensor.first):
                    code = int(wrong[k])
                    raise (ChecksumError if code == 4 else FormatError)(native.TILE_ERRORS[code])

    def launch(self) -> None:
        """Start decoding what is waiting, without waiting for it."""
        if self._batch is None:
            return
        torch, batch, slot = self._torch, self._batch, self._slots[self._turn]
        self._batch, self._turn = None, 1 - self._turn
        launches = batch.seal()
        status = torch.zeros(max(1, len(batch.status)), dtype=torch.int32, device=self.device)
        host = slot.host[: batch.aux] if batch.aux <= len(slot.host) else torch.from_numpy(batch.buffer[: batch.aux])
        if self._work is None or len(self._work) < batch.work:
            self._work = torch.empty(max(batch.work, self._room), dtype=torch.uint8, device=self.device)
        if self._copies is None or slot.copied is None or slot.done is None:
            slot.aux = host.clone()
            self._run(launches, slot, status)
        else:
            with torch.cuda.device(self.device):
                stream = torch.cuda.current_stream()
                self._copies.wait_event(slot.done)
                with torch.cuda.stream(self._copies):
                    if slot.aux is None or len(slot.aux) < batch.aux:
                        slot.aux = torch.empty(max(batch.aux, self._stage), dtype=torch.uint8, device=self.device)
                    slot.aux.record_stream(stream)
                    slot.aux[: batch.aux].copy_(host, non_blocking=True)
                    slot.copied.record()
                stream.wait_event(slot.copied)
                self._run(launches, slot, status)
                slot.done.record()
        if batch.status:
            self._states.append((status, batch.status))
        self._alive = []

    def _run(self, launches: list[Launch], slot: _Slot, status: Any) -> None:
        memories = {"units": slot.aux, "aux": slot.aux, "work": self._work, "status": status}
        launch(launches, memories | {"out": self._origin, "objects": self._origin})

    def _make_room(self, aux: int, work: int) -> None:
        """Launch what is waiting where the next tile, or row of tiles, would not fit any more."""
        if self._batch is not None and (
            self._batch.aux + aux > self._stage * 7 // 8 or self._batch.work + work > self._room * 7 // 8
        ):
            self.launch()

    def _current(self) -> Batch:
        if self._batch is None:
            if self._turn == len(self._slots):
                self._slots.append(_Slot(self._torch, self.device.type == "cuda", self._stage))
            slot = self._slots[self._turn]
            if slot.copied is not None:
                slot.copied.synchronize()
            self._batch = Batch(slot.host.numpy())
        return self._batch

    def _empty(self, t: Tensor) -> Any:
        shape = (*t.shape[:-1], t.shape[-1] // 2) if t.dtype == "F4" else t.shape
        try:
            return self._torch.empty(shape, dtype=torch_dtype(t.dtype), device=self.device)
        except self._torch.OutOfMemoryError as e:
            raise LimitError(f"{self.device} lacks the memory for {t.nbytes} bytes", unit=repr(t.name)) from e
