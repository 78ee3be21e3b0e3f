"""Where a calibration computes: on this machine's processor, or one block at a time on a device of torch.

On the processor the sums are numpy's, as they always were. On a device they are torch's, float32, batch after batch:
other sums, so that another device may make other bytes, and a pack says in its provenance where it was calibrated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_map

from rac.calibrate.experts import experts, fused
from rac.calibrate.wide import NARROW
from rac.models.linears import is_linear

T = TypeVar("T")
FEWEST = 16  # rows and columns from which on what three dimensions hold are matrices


class Place:
    """The processor: nothing is moved, and nothing is read ahead of its use."""

    device = "cpu"
    away = False  # whether it has memory of its own

    def to(self, x: Any) -> Any:
        """What is or holds tensors, where this place computes."""
        return x

    def kept(self, x: Any) -> Any:
        """What is or holds tensors that every batch asks for, masks and positions: they stay where they are brought."""
        return x

    def numbers(self, x: Any) -> NDArray[Any]:
        """A tensor as an array of this machine's memory."""
        return np.asarray(x.detach().numpy())

    def wide(self, p: Any) -> Any:
        """The numbers of a parameter or buffer as they are computed with: float32, here; itself where that is so."""
        return p.data.float() if p.is_floating_point() else p.data

    def stored(self, p: Any) -> Any:
        """The numbers of a matrix here, in the type that it is stored in: `rac.calibrate.wide` widens it in use."""
        return p.data

    def clear(self) -> None:
        """Give memory back that is held for later."""

    def added(self, total: Any, x: Any, length: Any = None) -> Any:
        """A sum of x^T x over rows (rows, n), which `total` is before (None: nothing); rows count by their `length`."""
        rows = x.float().reshape(-1, x.shape[-1]).contiguous().numpy()
        with np.errstate(all="ignore"):  # not finite is told by the result
            if length is not None:
                rows = rows * np.sqrt(length.numpy())[:, None]
            product = rows.T @ rows  # numpy takes the symmetric product, half the work of torch's
            return product if total is None else np.add(total, product, product)

    def array(self, total: Any) -> NDArray[np.float32]:
        """Such a sum as an array."""
        return np.asarray(total)

    def ahead(self, work: Callable[[T], Any], items: Sequence[T]) -> Iterator[Any]:
        """Results of the work on each item."""
        return map(work, items)

    def soon(self, work: Callable[[], Any]) -> Future[Any] | None:
        """The work, begun by a thread beside this one; None: it is done when it is needed, which saves memory."""
        return None

    def close(self) -> None:
        """Let go of what is held."""


class Device(Place):
    """A device of torch, by its name; what comes next is read and brought near by a thread beside the work."""

    away = True

    def __init__(self, device: str) -> None:
        self.device, self._near = device, dict[int, tuple[Any, Any]]()
        self._thread = ThreadPoolExecutor(1)

    def to(self, x: Any) -> Any:
        """What is or holds tensors, on the device. Tensors are brought there once while they live."""
        return tree_map(self._moved, x)

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(self.device, torch.float32 if x.dtype == torch.float64 else x.dtype)  # mps has no float64

    def kept(self, x: Any) -> Any:
        """What is or holds tensors that every batch asks for, brought to the device once."""

        def moved(one: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            if id(one) not in self._near:
                self._near[id(one)] = one, self._moved(one)
            return self._near[id(one)][1]

        return tree_map(moved, x)

    def numbers(self, x: Any) -> NDArray[Any]:
        """A tensor as an array of this machine's memory."""
        return np.asarray(x.detach().cpu().numpy())

    def wide(self, p: Any) -> Any:
        """The numbers of a parameter or buffer on the device, floats in float32."""
        return p.data.to(self.device, torch.float32 if p.is_floating_point() else p.dtype)

    def stored(self, p: Any) -> Any:
        """The numbers of a matrix on the device, in the type that it is stored in."""
        return p.data.to(self.device)

    def clear(self) -> None:
        """Give memory back to the device that torch holds for later."""
        if (of := getattr(torch, self.device.partition(":")[0], None)) and hasattr(of, "empty_cache"):
            of.empty_cache()

    def added(self, total: Any, x: Any, length: Any = None) -> Any:
        """A sum of x^T x over rows (rows, n) on the device."""
        rows = x.detach().float().reshape(-1, x.shape[-1])
        if length is not None:
            rows = rows * length.sqrt()[:, None]
        return rows.mT @ rows if total is None else total.addmm_(rows.mT, rows)

    def array(self, total: Any) -> NDArray[np.float32]:
        """Such a sum as an array of this machine's memory."""
        return self.numbers(total)

    def ahead(self, work: Callable[[T], Any], items: Sequence[T]) -> Iterator[Any]:
        """Results of the work on each item, the next one done by a thread while one is used."""
        coming = [self._thread.submit(work, item) for item in items[:1]]
        for i in range(len(items)):
            found = coming.pop().result()
            if i + 1 < len(items):
                coming.append(self._thread.submit(work, items[i + 1]))
            yield found

    def soon(self, work: Callable[[], Any]) -> Future[Any] | None:
        """The work, begun by the thread."""
        return self._thread.submit(work)

    def close(self) -> None:
        """Let go of what is held."""
        self._near.clear()
        self._thread.shutdown()


def place_of(device: str) -> Place:
    """The place by its name, which `rac.linalg.device.check` has found here."""
    return Place() if device == "cpu" else Device(device)


@dataclass(slots=True)
class Held:
    """Parameters and buffers of modules as a place computes with them, for a while; their own numbers come back."""

    place: Place

    def brought(self, modules: Sequence[Any], but: Container[int] = ()) -> list[tuple[Any, Any]]:
        """Each with its numbers there, `but` some by their ids. The modules stay as they are: it may be done ahead.

        Matrices stay in the type that they are stored in, so that of many experts one is in float32 at a time.
        """
        every = {id(p): p for m in modules for p in (*m.parameters(), *m.buffers()) if id(p) not in but}
        matrices = {id(p) for m in modules for p in _matrices(m)}
        bring = {True: self.place.stored, False: self.place.wide}
        return [(p, bring[at in matrices](p)) for at, p in every.items()]

    @contextlib.contextmanager
    def use(self, brought: Sequence[tuple[Any, Any]]) -> Iterator[None]:
        """The modules compute with what was brought."""
        before = [(p, p.data) for p, _ in brought]
        try:
            for p, data in brought:
                p.data = data
            yield
        finally:
            for p, data in before:
                p.data = data


def _matrices(module: Any) -> Iterator[Any]:
    """Weights of float16 and bfloat16 that nothing is done with but products: of linear layers, and of experts."""
    own = [m.weight for m in module.modules() if is_linear(m)]
    for m in experts(dict(module.named_modules())).values():
        own += [p for p in m.parameters(recurse=False) if fused(p) and min(p.shape[1:]) >= FEWEST]
    return (p for p in own if p.dtype in NARROW)
