"""Maps of a layer's input: applied as it runs, absorbed by its weight, folded into it (format_spec/stages/online.md).

A layer that computes W x is the same as one that computes W' (T x) with W' = W T^-1. Weights (out, n) and inputs
(..., n) both have their columns last, so that all of this works along the last axis, of numpy arrays or torch tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.linalg import hadamard
from rac.records import Online


class Transform:
    """T = I_a (x) M (x) I_inner of an input of `width`, signs in front of hadamard/1; `matrix` is the M of matrix/1."""

    def __init__(self, online: Online, width: int, matrix: NDArray[Any] | None = None) -> None:
        if online.inner < 1 or online.size < 1 or width % (online.size * online.inner):
            raise ValueError(f"{online.size} x {online.inner} does not divide a width of {width}")
        if (None if matrix is None else matrix.shape) != ((online.size, online.size) if online.by_object else None):
            raise ValueError(f"{online.id} of order {online.size} has no such matrix")
        self.online, self.width, self.matrix = online, width, matrix
        self._kept: dict[Any, tuple[list[Any], Any]] = {}  # factors and signs, by what they are multiplied with

    def apply(self, x: Any) -> Any:
        """T x of each vector along the last axis: (..., n), data type and device kept."""
        return self._multiply(x, False)

    def fold(self, w: Any) -> Any:
        """W' T of a weight (..., n): what a layer without the map has in its place."""
        return self._multiply(w, True)

    def absorb(self, w: Any) -> Any:
        """W T^-1 of a weight (..., n): what stands behind the map. LinAlgError where M has no inverse."""
        if self.matrix is None:
            return self._multiply(w, False)
        wide = self._wide(w)
        inverse = hadamard.like(np.linalg.inv(self.matrix.astype(np.float64)).T, wide)
        return hadamard.cast(hadamard.kronecker(wide, [inverse], self.online.inner), w.dtype)

    def _wide(self, x: Any) -> Any:
        if x.shape[-1] != self.width:
            raise ValueError(f"an input of {x.shape[-1]}, the transform is one of {self.width}")
        return hadamard.widen(x)

    def _multiply(self, x: Any, transposed: bool) -> Any:
        y = self._wide(x)
        by, signs = self._of(y)
        if signs is not None and not transposed:
            y = y * signs
        y = hadamard.kronecker(y, by, self.online.inner, transposed)
        return hadamard.cast(y * signs if signs is not None and transposed else y, x.dtype)

    def _of(self, y: Any) -> tuple[list[Any], Any]:
        """Factors and signs (None: all are 1) of the library, data type and device of `y`."""
        o, key = self.online, (type(y) is np.ndarray, y.dtype, str(getattr(y, "device", "")))
        if key not in self._kept:
            by = hadamard.factors(o.size) if self.matrix is None else (self.matrix,)
            signs = None if o.seed is None else hadamard.like(hadamard.signs(o.seed, self.width), y)
            self._kept[key] = [hadamard.like(f, y) for f in by], signs
        return self._kept[key]

    def describe(self) -> str:
        """For people."""
        signs = "" if self.online.seed is None else f", signs of seed {self.online.seed}"
        return describe(self.online, self.width) + signs


def describe(online: Online, width: int) -> str:
    """What a map of `width` inputs is, for people; its seed is left out."""
    blocks = width // (online.size * online.inner)
    where = f", {blocks} blocks" * (blocks > 1) + f", every {online.inner}th element" * (online.inner > 1)
    if online.by_object:
        return f"matrix {online.object!r} of order {online.size}{where}"
    return hadamard.order(online.size).describe() + where


class _Before:
    """A forward pre-hook of a linear layer of torch: T x in the place of x."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self.transform.apply(args[0]), *args[1:]), kwargs
        return args, kwargs | {"input": self.transform.apply(kwargs["input"])}


def hook(layer: Any, transform: Transform) -> None:
    """Let a layer of torch apply a map to its input; its weight is left alone."""
    layer.register_forward_pre_hook(_Before(transform), with_kwargs=True)


def hooked(layer: Any) -> Transform | None:
    """The map that `hook` gave a layer."""
    found = [h.transform for h in layer._forward_pre_hooks.values() if isinstance(h, _Before)]
    return found[0] if found else None


def unhook(layer: Any) -> None:
    """Take it away."""
    for key, held in list(layer._forward_pre_hooks.items()):
        if isinstance(held, _Before):
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)
