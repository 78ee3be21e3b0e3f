"""SmoothQuant's migration (arXiv 2211.10438): outliers of the inputs into the weights, channel by channel.

For X W^T with channels j of the input s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); the input is divided by s in what
makes it (the gain of a norm, the values, the gated half of the MLP), and the columns of W are multiplied by it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import TransformError
from rac.linalg.transform import hooked
from rac.methods.transforms.rules import Layer, Parts

PLACES = ("attention", "mlp", "heads", "down")
"""Where inputs are made smooth: of the projections behind the two norms, of the output projection, of the MLP's
second half."""
LEAST = 1e-5
"""Smallest maximum that counts, as in the authors' method: a channel without inputs or weights is left alone."""
Place = tuple[str, str]
"""Name of a layer, and one of PLACES."""
Maxima = Mapping[Place, NDArray[np.float64]]
"""The largest magnitude of each input (n,) of a place."""


def inputs(p: Parts, places: Iterable[str], sequences: Iterable[Any], see: Callable[[Place, Any], None]) -> None:
    """Run the model over sequences of token ids; `see` gets a place and inputs (tokens, n) of it."""
    import torch

    def watch(key: Place) -> Callable[..., None]:
        return lambda _, args: see(key, args[0].detach().reshape(-1, args[0].shape[-1]))

    if not (sequences := list(sequences)):
        raise TransformError("smoothing needs sequences to run the model on")
    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer, place in itertools.product(p.layers, places):
            stack.enter_context(readers(layer, place)[0].register_forward_pre_hook(watch((layer.name, place))))
        for ids in sequences:
            p.model(ids, use_cache=False)


def maxima(p: Parts, sequences: Iterable[Any]) -> dict[Place, NDArray[np.float64]]:
    """Run the model over sequences of token ids, each (batch, n), and note the largest magnitude of each input."""
    found: dict[Place, NDArray[np.float64]] = {}

    def see(key: Place, x: Any) -> None:
        most = x.abs().amax(0).double().cpu().numpy()
        found[key] = np.maximum(found[key], most) if key in found else most

    inputs(p, PLACES, sequences, see)
    return found


def smooth(p: Parts, found: Maxima, alpha: float = 0.5, places: Iterable[str] = ("attention", "mlp")) -> None:
    """Divide inputs by their scale, and multiply weights by it, at some of PLACES of every layer.

    `found` is what `maxima` found for this model before any change of it; gains of norms need not be fused, and are 1
    no longer. `alpha`, 0 to 1, is how much of the outliers goes into the weights. The paper's places are the first two.

    TransformError where inputs are not known, not finite, or mapped online; ValueError where `alpha` or a place is not
    known.
    """
    places = tuple(places)
    if not 0 <= alpha <= 1 or set(places) - set(PLACES):
        raise ValueError(f"alpha is 0 to 1, places are {', '.join(PLACES)}, not {alpha}, {places}")
    for layer, place in itertools.product(p.layers, places):
        _smooth(p, layer, place, scales(p, layer, place, found, alpha))
    p.did(f"smooth {alpha:g} {' '.join(places)}", f"smoothed with alpha {alpha:g}: {', '.join(places)}")


def readers(layer: Layer, place: str) -> tuple[Any, ...]:
    """The linear layers whose inputs are made smooth at a place."""
    return (layer.attention_in, layer.mlp_in, (layer.attention_out,), (layer.mlp_out,))[PLACES.index(place)]


def scales(p: Parts, layer: Layer, place: str, found: Maxima, alpha: float) -> NDArray[np.float64]:
    """(n,) what the inputs of a place are divided by; errors are those of `smooth`."""
    if (layer.name, place) not in found:
        raise TransformError(f"{layer.name}: the largest inputs of {place!r} are not known")
    most = found[layer.name, place]
    if any(hooked(reader) for reader in readers(layer, place)):
        raise TransformError(f"{layer.name}: smooth the inputs of {place!r} before they are mapped online")
    if not np.isfinite(most).all():
        raise TransformError(f"{layer.name}: inputs of {place!r} hold NaN or infinity")
    by_weight = np.max([r.weight.data.double().abs().amax(0).cpu().numpy() for r in readers(layer, place)], axis=0)
    shape = (p.kv_heads, p.heads // p.kv_heads, p.head_dim)
    if place == "heads":  # query heads of one group read the same values
        most, by_weight = (v.reshape(shape).max(1, keepdims=True) for v in (most, by_weight))
    used = (most > LEAST) & (by_weight > LEAST)
    s = np.where(used, np.maximum(most, LEAST) ** alpha / np.maximum(by_weight, LEAST) ** (1 - alpha), 1.0)
    return np.broadcast_to(s, shape).reshape(-1) if place == "heads" else s


def _smooth(p: Parts, layer: Layer, place: str, by: NDArray[np.float64]) -> None:
    s = readers(layer, place)[0].weight.data.new_tensor(by).double()
    for reader in readers(layer, place):
        reader.weight.data.copy_(reader.weight.data.double() * s)
    if place in ("attention", "mlp"):
        norm = layer.attention_norm if place == "attention" else layer.mlp_norm
        p.set_gain(norm, p.gain(norm) / s)
        return
    if place == "heads":
        s = s.reshape(p.kv_heads, -1, p.head_dim)[:, 0].reshape(-1)
    rows = layer.value if place == "heads" else layer.up
    rows.weight.copy_(rows.weight.double() / s[:, None])
    if rows.bias is not None:
        rows.bias.copy_(rows.bias.double() / s)
