"""Quantised activations and caches, simulated: what rotations are learned for, and what they are judged by.

A rotated model computes W R^T Q(R x), Q the quantiser. Here R^T Q(R x) is put in the place of x, and W stays what it
is: the numbers are those of the model whose weights are W R^T, gradients reach R by way of the activations, and no
step has to rotate every weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rac.errors import TransformError
from rac.linalg.transform import Transform, hooked
from rac.methods.transforms import hadamard, rotated_keys
from rac.methods.transforms.fuse import fused
from rac.methods.transforms.rules import Parts
from rac.models.activations import per_group

PLAIN = 16
"""Bits from which nothing is quantised."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What is quantised, and how."""

    activations: int = 4
    """Bits of the inputs of the linear layers, but not of the output layer: one scale for each token, asymmetric."""
    cache: int = 4
    """Bits of keys and values: one scale for each token and head, asymmetric."""

    def __post_init__(self) -> None:
        if not (1 <= self.activations <= PLAIN and 1 <= self.cache <= PLAIN):
            raise ValueError(f"bits must be 1 to {PLAIN}")


def quantised(x: Any, bits: int) -> Any:
    """Vectors x (..., n) rounded to 2**bits evenly spaced values from the least to the largest of the last axis.

    The gradient is that of the identity (straight-through estimator, arXiv 1308.3432).
    """
    return x if bits >= PLAIN else x + (per_group(x.detach(), bits) - x).detach()


@contextlib.contextmanager
def simulated(
    p: Parts, how: Simulated, r1: Any = None, r2: Any = None, *, r3: bool = True, r4: int | None = None
) -> Iterator[None]:
    """Quantise activations and cache inside the `with` block, in rotated coordinates.

    Where layers have online maps, what is quantised is what comes out of them: a model that has been transformed needs
    no `r1`, `r2` and `r4`.

    Args:
        p: A model; its weights are left alone.
        how: What is quantised.
        r1: (width, width) of the residual stream, a torch tensor of any float type; None: not rotated.
        r2: (layers, head_dim, head_dim) of the values; None: not rotated.
        r3: Keys are rotated by a Hadamard matrix.
        r4: Inputs of the second half of the MLP are rotated, in layer i by the Hadamard matrix of seed r4 + i; None:
            they are not.

    Raises:
        TransformError: There is an `r1` and the norms are not fused, an `r2` or `r4` and layers have online maps, or
            the attention cannot be replaced.
    """
    if r1 is not None and not fused(p):
        raise TransformError("the gains of the norms are not fused; call fuse_norms first")
    for layer in p.layers:
        if (r2 is not None and hooked(layer.attention_out)) or (r4 is not None and hooked(layer.mlp_out)):
            raise TransformError(f"{layer.name} has an online transform; rotate before it is there")
    like = p.layers[0].mlp_out.weight
    r1 = None if r1 is None else r1.to(like)
    r2 = None if r2 is None else r2.to(like)
    norm = _Behind(r1, how.activations)
    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(p.layers):
            r = None if r2 is None else r2[i]
            down = _Inner(None if r4 is None else hadamard(p.inner, r4 + i), how.activations)
            heads = _Heads(r, p.head_dim, how.activations)
            values = _Values(r, p.head_dim, how.cache, layer.value.start)
            for handle in (
                layer.attention_norm.register_forward_hook(norm),
                layer.mlp_norm.register_forward_hook(norm),
                layer.value.layer.register_forward_hook(values),
                layer.attention_out.register_forward_pre_hook(heads),
                layer.mlp_out.register_forward_pre_hook(down),
            ):
                stack.callback(handle.remove)
        if how.cache < PLAIN:
            turn = None if r3 else hadamard(p.head_dim, None)
            stack.enter_context(rotated_keys(p, None, _Keys(turn, how.cache)))
        yield


class _Behind:
    """Hook behind a norm: quantises what attention or MLP reads, in the coordinates of `r`."""

    def __init__(self, r: Any, bits: int) -> None:
        self.r, self.bits = r, bits

    def __call__(self, module: Any, args: Any, out: Any) -> Any:
        return turned(out, self.r, self.bits)


class _Values:
    """Hook of the layer that gives the values: quantises what goes into the cache, in the coordinates of `r`."""

    def __init__(self, r: Any, width: int, bits: int, start: int) -> None:
        self.r, self.width, self.bits, self.start = r, width, bits, start

    def __call__(self, module: Any, args: Any, out: Any) -> Any:
        import torch

        v = turned(out[..., self.start :].unflatten(-1, (-1, self.width)), self.r, self.bits).flatten(-2)
        return torch.cat((out[..., : self.start], v), -1) if self.start else v


class _Heads:
    """In front of the output projection: every head is rotated, all share a scale."""

    def __init__(self, r: Any, width: int, bits: int) -> None:
        self.r, self.width, self.bits = r, width, bits

    def __call__(self, module: Any, args: Any) -> Any:
        x = args[0]
        if self.r is None:
            return (quantised(x, self.bits),)
        y = (x.unflatten(-1, (-1, self.width)) @ self.r.mT).flatten(-2)
        return ((quantised(y, self.bits).unflatten(-1, (-1, self.width)) @ self.r).flatten(-2),)


class _Inner:
    """In front of the second half of the MLP."""

    def __init__(self, r4: Transform | None, bits: int) -> None:
        self.r4, self.bits = r4, bits

    def __call__(self, module: Any, args: Any) -> Any:
        x = args[0]
        if self.r4 is None:
            return (quantised(x, self.bits),)
        return (self.r4.fold(quantised(self.r4.apply(x), self.bits)),)


class _Keys:
    """Quantises keys that are rotated already; as they were before where `back` undoes that."""

    def __init__(self, back: Transform | None, bits: int) -> None:
        self.back, self.bits = back, bits

    def __call__(self, k: Any) -> Any:
        if self.back is None:
            return quantised(k, self.bits)
        return self.back.apply(quantised(self.back.fold(k), self.bits))


def turned(x: Any, r: Any, bits: int) -> Any:
    """R^T Q(R x) of each vector along the last axis; Q(x) where `r` is None."""
    return quantised(x, bits) if r is None else quantised(x @ r.mT, bits) @ r
