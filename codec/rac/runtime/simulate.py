"""W4A4 and the like: a model whose layers and attention see quantised activations, simulated in its own data type.

Inputs of the linear layers of the decoder blocks are rounded behind the online transform of the layer, where it has
one; keys behind their position embedding, rotated first if `rotate_keys` says so. The output layer sees all bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import transformers

from rac.errors import UnsupportedError
from rac.linalg.transform import Transform
from rac.models.activations import attention, per_group, per_token
from rac.models.linears import blocks_linears
from rac.records import Online
from rac.runtime.layers import RacLinear

CLIP, KV_CLIP = 0.9, 0.95
"""QuaRot's clip ratios (arXiv 2404.00456): of activations below 8 bits, of keys and values below 8 bits."""


@dataclass
class Simulation:
    """What is quantised."""

    linears: int = 0
    """Layers whose inputs are."""
    attentions: set[int] = field(default_factory=set, repr=False)
    """Those whose keys and values were, so far: those that have run."""

    @property
    def heads(self) -> int:
        """How many attentions these are."""
        return len(self.attentions)


@contextlib.contextmanager
def simulated(
    model: Any,
    activations: int | None = None,
    kv: int | None = None,
    *,
    clip: float | None = None,
    kv_clip: float | None = None,
    kv_group: int | None = None,
    rotate_keys: bool = False,
    seed: int | None = None,
    static: Mapping[str, float] | None = None,
    asymmetric: bool = False,
) -> Iterator[Simulation]:
    """Quantise activations, keys and values of a model inside the `with` block; its weights are left alone.

    Activations: a grid for each token, per_token of rac.models.activations or, asymmetric, per_group. Keys and values:
    a grid from least to largest for each token and head, or groups of it, per_group.

    `activations` are 2 to 16 bits, `kv` (keys and values) 1 to 16; None: as they are. `clip` is the share of the range
    of an activation grid (None: CLIP if it is symmetric and below 8 bits, otherwise 1), `kv_clip` that of keys or
    values (None: KV_CLIP below 8 bits, otherwise 1), in groups of `kv_group` numbers (None: all of a head).
    `rotate_keys` rotates queries and keys by a Hadamard matrix of the head before (QuaRot; SpinQuant's R3), with signs
    of `seed` (None: no random ones). `static` is the largest magnitude of the inputs of each layer (`largest`): one
    symmetric grid for all tokens. `asymmetric` grids of activations go from the least to the largest number of a token
    (SpinQuant), not about zero (QuaRot, SmoothQuant).

    UnsupportedError where there is nothing to quantise in such a model, it runs past what is replaced, or it is
    compressed with layers that map their input themselves; ValueError where nothing is asked for, or numbers are out of
    range.
    """
    _check(activations, kv, clip, kv_clip)
    if static is not None and asymmetric:
        raise ValueError("static scales are of symmetric grids")
    found = Simulation()
    with contextlib.ExitStack() as stack:
        if activations is not None:
            share = clip or (CLIP if activations < 8 and not asymmetric else 1.0)
            made = partial(per_group if asymmetric else per_token, bits=activations, clip=share)
            last = _Last(made)
            if static is not None and (lacking := blocks_linears(model).keys() - static.keys()):
                raise ValueError(f"no static scale for {min(lacking)!r}")
            scales = static or {}
            found.linears = _before(stack, model, lambda name, x: last(x, scales.get(name)))
            if not found.linears:
                raise UnsupportedError(f"{type(model).__name__} has no linear layers in blocks to quantise inputs of")
        if kv is not None:
            rotate = _rotation(seed) if rotate_keys else lambda x: x
            change = _cache(found, kv, kv_clip or (KV_CLIP if kv < 8 else 1.0), kv_group, rotate)
            stack.enter_context(attention(model, transformers, change))
            stack.enter_context(model.register_forward_hook(lambda *_: _has_run(model, found)))
        yield found


def largest(model: Any, sequences: Iterable[Any]) -> dict[str, float]:
    """Run a model over sequences of token ids, (batch, n) each; the largest input of each layer, for `static`."""
    found: dict[str, float] = {}

    def see(name: str, x: Any) -> Any:
        found[name] = max(found.get(name, 0.0), float(x.detach().abs().max()))
        return x

    with contextlib.ExitStack() as stack, torch.no_grad():
        _before(stack, model, see)
        for ids in sequences:
            model(ids, use_cache=False)
    return found


def _check(activations: int | None, kv: int | None, clip: float | None, kv_clip: float | None) -> None:
    if activations is None and kv is None:
        raise ValueError("say what to quantise: activations, keys and values, or both")
    for what, bits, least in (("activations", activations, 2), ("keys and values", kv, 1)):
        if bits is not None and not least <= bits <= 16:
            raise ValueError(f"{what} have {least} to 16 bits, not {bits}")
    for share in (clip, kv_clip):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"a clip ratio is above 0, at most 1, not {share}")


def _before(stack: contextlib.ExitStack, model: Any, change: Callable[[str, Any], Any]) -> int:
    """Hooks of the linear layers in blocks: what `change` makes of name and input, in its place; returns their number.

    UnsupportedError where a layer would map its input after the hook.
    """
    layers = blocks_linears(model)
    for name, layer in layers.items():
        if isinstance(layer, RacLinear) and layer.online() is not None:
            what = "maps its input by itself; load the model dense to quantise what the map gives"
            raise UnsupportedError(what, unit=repr(name))

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> Any:
            if args:
                return (change(name, args[0]), *args[1:]), kwargs
            return args, kwargs | {"input": change(name, kwargs["input"])}

        stack.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
    return len(layers)


class _Last:
    """Quantises inputs by `made`, once for layers that follow each other with the same."""

    def __init__(self, made: Callable[..., Any]) -> None:
        self.made = made
        self._given: tuple[Any, ...] = (None,)
        self._found: Any = None

    def __call__(self, x: Any, most: float | None) -> Any:
        how = {} if most is None else {"most": most}
        if torch.is_grad_enabled() or x.is_inference():  # of the latter no version says whether they have changed
            return self.made(x, **how)
        if self._given[0] is not x or self._given[1:] != (x._version, most):
            self._found, self._given = self.made(x, **how), (x, x._version, most)
        return self._found


def _cache(
    found: Simulation, bits: int, clip: float, group: int | None, rotate: Callable[[Any], Any]
) -> Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]:
    """What attention is given with quantised keys and values, keys and queries rotated before."""

    def quantised(module: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        found.attentions.add(id(module))
        return rotate(q), per_group(rotate(k), bits, group, clip), per_group(v, bits, group, clip)

    return quantised


def _rotation(seed: int | None) -> Callable[[Any], Any]:
    """Applies the Hadamard matrix of the last axis."""
    of = cache(lambda width: Transform(Online("hadamard/1", width, 1, seed), width))
    return lambda x: of(x.shape[-1]).apply(x)


def _has_run(model: Any, found: Simulation) -> None:
    """A hook behind the model."""
    if not found.heads:
        raise UnsupportedError(f"the attention of {type(model).__name__} ran past what quantises keys and values")
