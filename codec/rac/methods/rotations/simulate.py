"""Quantised activations and caches, simulated: what rotations are learned for, and what they are judged by.

A rotated model computes W R^T Q(R x), Q the quantiser. Here R^T Q(R x) is put in the place of x, and W stays what it
is: the numbers are those of the model whose weights are W R^T, gradients reach R by way of the activations, and no
step has to rotate every weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rac.errors import TransformError
from rac.linalg.transform import Transform, hooked
from rac.methods.transforms import hadamard, rotated_keys
from rac.methods.transforms.rotate import require_fused
from rac.methods.transforms.rules import Parts
from rac.models.activations import per_group

Way = Callable[[Any], Any]
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
    """Quantise activations and cache of a model, its weights left alone, inside the `with` block.

    Coordinates are those of `r1` (width, width) of the residual stream, `r2` (layers, head_dim, head_dim) of the
    values, torch tensors of any float type, `r3`, a Hadamard matrix for keys, and `r4`: inputs of the second half of
    the MLP, in layer i by the Hadamard matrix of seed r4 + i. None: not rotated. Where layers have online maps, what is
    quantised is what comes out of them: a model that has been transformed needs no `r1`, `r2` and `r4`.

    TransformError where there is an `r1` and the norms are not fused, an `r2` or `r4` and layers have online maps, or
    the attention cannot be replaced.
    """
    if r1 is not None:
        require_fused(p)
    for layer in p.layers:
        if (r2 is not None and hooked(layer.attention_out)) or (r4 is not None and hooked(layer.mlp_out)):
            raise TransformError(f"{layer.name} has an online transform; rotate before it is there")
    like = p.layers[0].mlp_out.weight
    r1, r2 = (None if r is None else r.to(like) for r in (r1, r2))
    bits, norm = how.activations, _through(how.activations, *_by_matrix(r1))
    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(p.layers):
            ways = _by_matrix(None if r2 is None else r2[i])
            value, start = _by_head(_through(how.cache, *ways), p.head_dim), layer.value.start
            heads = _through(bits, *(_by_head(way, p.head_dim) for way in ways))
            down = _through(bits, *_by_map(None if r4 is None else hadamard(p.inner, r4 + i)))
            for handle in (
                layer.attention_norm.register_forward_hook(lambda _, args, out: norm(out)),
                layer.mlp_norm.register_forward_hook(lambda _, args, out: norm(out)),
                layer.value.layer.register_forward_hook(_behind(value, start)),
                layer.attention_out.register_forward_pre_hook(lambda _, args, f=heads: (f(args[0]),)),
                layer.mlp_out.register_forward_pre_hook(lambda _, args, f=down: (f(args[0]),)),
            ):
                stack.enter_context(handle)
        if how.cache < PLAIN:  # keys are rotated already
            back, into = _by_map(None if r3 else hadamard(p.head_dim, None))
            stack.enter_context(rotated_keys(p, None, _through(how.cache, into, back)))
        yield


def _through(bits: int, into: Way, back: Way) -> Way:
    """Quantises in other coordinates: `into` leads there, `back` from there."""
    return lambda x: back(quantised(into(x), bits))


def _by_matrix(r: Any) -> tuple[Way, Way]:
    """R x of vectors along the last axis, and its inverse; None: nothing is rotated."""
    return (_same, _same) if r is None else (lambda x: x @ r.mT, lambda x: x @ r)


def _by_map(t: Transform | None) -> tuple[Way, Way]:
    return (_same, _same) if t is None else (t.apply, t.fold)


def _by_head(way: Way, width: int) -> Way:
    """What a function of heads makes of all of them, side by side."""
    return way if way is _same else lambda x: way(x.unflatten(-1, (-1, width))).flatten(-2)


def _behind(value: Way, start: int) -> Callable[..., Any]:
    """Hook of the layer that gives the values, from output `start` on: quantises what goes into the cache."""
    import torch

    return lambda _, args, out: torch.cat((out[..., :start], value(out[..., start:])), -1) if start else value(out)


def _same(x: Any) -> Any:
    return x
