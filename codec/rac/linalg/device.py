"""Cholesky factors and feedback on a device of torch: the products that a pack spends its time on beside the search.

Factors are found in float64, on the processor where the device has none. The order of additions is the device's own, so
that the bits are not those of `rac.linalg.triangular`, which a pack on the processor uses: another device may make
other bytes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import LimitError, MissingDependencyError
from rac.linalg.triangular import Triangular, diagonal, triangular

F32 = np.float32
_SHORT = ("out of memory", "not enough memory", "can't allocate memory")
_ONE = threading.Lock()  # one factor at a time: side by side they would take the device's memory as often


def check(device: str) -> None:
    """MissingDependencyError unless torch is installed and sees such a device here."""
    if device == "cpu":
        return
    try:
        import torch
    except ImportError as e:
        raise MissingDependencyError(f"device {device} needs torch: pip install rac-codec[calibrate]") from e
    seen = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device not in seen or not seen[device]():
        raise MissingDependencyError(
            f"torch {torch.__version__} sees no device {device!r} here; leave it out, or name cpu"
        )


def name_of(device: str) -> str:
    """What is called by a name here: "cuda" stands for the kind of GPU, where torch sees one."""
    if device != "cuda":
        return device
    with contextlib.suppress(ImportError, RuntimeError, AssertionError):
        import torch

        return f"{device} ({torch.cuda.get_device_name()})"
    return device


def is_short(error: BaseException) -> bool:
    """Whether an error says that memory was too small: torch raises another one for each device."""
    return isinstance(error, MemoryError) or any(what in str(error).lower() for what in _SHORT)


@contextlib.contextmanager
def enough(device: str, what: str) -> Iterator[None]:
    """LimitError where the memory of a device is too small for `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_short(e):
            raise
        said = str(e).strip().partition("\n")[0]
        raise LimitError(f"{device} has too little memory for {what}: fewer --jobs, or --device cpu ({said})") from None


def triangular_on(second: NDArray[np.floating], damp: float, device: str) -> Triangular:
    """The recursion of `rac.linalg.triangular.triangular`, found on a device, whose feedback runs there too.

    It takes 16 n^2 bytes of the device and its solver's own for n inputs; LimitError where these are not there.
    """
    import torch

    if device == "mps":  # it has no float64, and float32 no room for inputs that go with others
        return replace(triangular(second, damp), device=device)
    found = diagonal(second)
    order = np.argsort(found, kind="stable")
    with _ONE, enough(device, f"the factor of {len(order)} inputs, {16 * len(order) ** 2 / 1e9:.1f} GB"):
        at = torch.from_numpy(order).to(device)
        s = torch.from_numpy(np.array(second, F32)).to(device)[at][:, at].to(torch.float64)
        lower = factor_of(s, damp * max(float(found.sum()) / len(found), 1e-30))
        del s
        weight = lower.diagonal().cpu().numpy().copy()
        feed = feeds_of(lower).cpu().numpy()
    return Triangular(order, weight, feed.T, device)


def factor_of(s: Any, more: float) -> Any:
    """The lower triangular factor of a tensor (n, n) with so much added to its diagonal, which changes it."""
    import torch

    s.diagonal().add_(more)
    lower, bad = torch.linalg.cholesky_ex(s)
    if s.device.type != "meta" and int(bad):
        raise np.linalg.LinAlgError("matrix is not positive definite")
    return lower


def feeds_of(lower: Any) -> Any:
    """(n, n) float32, below the diagonal: L over its diagonal, column by column. L is used up."""
    return lower.div_(lower.diagonal().clone()).tril_(-1).float()


class Errors:
    """Errors of finished columns on a device, and what they add to the targets of those before them."""

    def __init__(self, feed: NDArray[np.float32], rows: int, device: str) -> None:
        """`feed` (n, n) as Triangular has it."""
        import torch

        self._torch, self._device = torch, device
        with enough(device, f"errors of {rows} x {len(feed)}, {4 * (rows + len(feed)) * len(feed) / 1e9:.1f} GB"):
            self.feed = torch.from_numpy(np.require(feed.T, requirements=("C", "W"))).to(device)
            self.errors = torch.zeros(len(feed), rows, device=device)

    def fed(self, a: int, b: int) -> NDArray[np.float32]:
        """(b - a, rows): what the errors of all columns from b on add to the targets of columns a to b."""
        return np.asarray(self.product(a, b).cpu().numpy())

    def product(self, a: int, b: int) -> Any:
        """(b - a, rows) on the device: what `fed` brings back."""
        return self.feed[b:, a:b].mT @ self.errors[b:]

    def put(self, a: int, b: int, errors: NDArray[np.float32]) -> None:
        """Keep the errors (b - a, rows) of columns a to b."""
        self.errors[a:b] = self._torch.from_numpy(np.ascontiguousarray(errors)).to(self._device)
