"""SmoothQuant (arXiv 2211.10438) with its alpha searched: the one of a grid with the least error of layers' outputs.

The paper searches one migration strength for a model on a part of its calibration text. Here the error of an alpha is
that of the outputs of every layer behind the places that are smoothed, weights and inputs quantised, over the energy of
these outputs, in the mean over the layers. A layer is judged by itself: its inputs are those of the model as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import TransformError
from rac.methods.gptq import rtn
from rac.methods.transforms.rules import Layer, Parts
from rac.methods.transforms.smooth import PLACES, Maxima, maxima, readers, scales, smooth
from rac.models.activations import per_token
from rac.stages.groups import values

ALPHAS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
"""0.5 is the paper's for OPT and BLOOM, 0.75 for GLM-130B; 0.85 the authors' for Llama."""
TOKENS = 256
"""Tokens of each sequence, about, evenly spread, that errors are measured on."""


def smoothquant(
    p: Parts,
    sequences: Iterable[Any],
    alpha: float | None = None,
    *,
    bits: int = 8,
    activations: int | None = 8,
    group: int | None = None,
    places: Sequence[str] = ("attention", "mlp"),
) -> float:
    """Smooth a model, in place; returns the alpha that was given or found. Nothing is rounded.

    Arguments and errors are those of `choose` and `smooth`. `p.about` says the alpha.
    """
    sequences = list(sequences)
    found = maxima(p, sequences)
    if alpha is None:
        alpha, _ = choose(p, found, sequences, bits=bits, activations=activations, group=group, places=places)
    smooth(p, found, alpha, places)
    return alpha


def choose(
    p: Parts,
    found: Maxima,
    sequences: Iterable[Any],
    alphas: Sequence[float] = ALPHAS,
    *,
    bits: int = 8,
    activations: int | None = 8,
    group: int | None = None,
    places: Sequence[str] = ("attention", "mlp"),
) -> tuple[float, dict[float, float]]:
    """The best alpha, and the relative squared error of the outputs for each; the model is left alone.

    Args:
        p: The model, before `smooth`.
        found: What `maxima` has found for it.
        sequences: Token ids (batch, n) each: a part of the calibration text.
        alphas: 0 to 1 each.
        bits: Bits of the weights, rounded to nearest on a symmetric grid.
        activations: Bits of the inputs, one scale for each token; None: as they are.
        group: Columns that share a scale; None: all.
        places: Names from PLACES: what `smooth` is going to be given.

    Raises:
        TransformError: There are no sequences, or what `smooth` would raise.
        ValueError: There is no alpha, or one, a place or a number of bits is out of range.
    """
    alphas = tuple(alphas)
    if not alphas or not all(0 <= a <= 1 for a in alphas) or set(places) - set(PLACES):
        raise ValueError(f"alphas are 0 to 1, places are {', '.join(PLACES)}, not {alphas}, {tuple(places)}")
    seen = _inputs(p, sequences, places)
    errors: dict[float, list[float]] = {a: [] for a in alphas}
    for layer in p.layers:
        for place in places:
            for a in alphas:
                by = scales(p, layer, place, found, a)
                errors[a] += _errors(layer, place, seen[layer.name, place], by, bits, activations, group)
    means = {a: float(np.mean(e)) for a, e in errors.items()}
    return min(means, key=lambda a: means[a]), means


def _inputs(p: Parts, sequences: Iterable[Any], places: Sequence[str]) -> dict[tuple[str, str], Any]:
    """Some inputs (tokens, n) of each place."""
    import torch

    found: dict[tuple[str, str], list[Any]] = {}

    def watch(key: tuple[str, str]) -> Any:
        def see(_: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            found.setdefault(key, []).append(x[:: max(1, len(x) // TOKENS)].clone())

        return see

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in p.layers:
            for place in places:
                first = readers(layer, place)[0]
                stack.callback(first.register_forward_pre_hook(watch((layer.name, place))).remove)
        for ids in sequences:
            p.model(ids, use_cache=False)
    if not found:
        raise TransformError("the search for alpha needs sequences to run the model on")
    return {key: torch.cat(parts) for key, parts in found.items()}


def _errors(
    layer: Layer, place: str, x: Any, by: NDArray[np.float64], bits: int, activations: int | None, group: int | None
) -> list[float]:
    """Relative squared error of the outputs of each layer behind a place, its inputs divided by `by`."""
    out = []
    given = x / x.new_tensor(by)
    given = per_token(given, activations) if activations is not None else given
    for reader in readers(layer, place):
        w = reader.weight.detach().double()
        smooth = (w * w.new_tensor(by)).cpu().numpy()
        stored = w.new_tensor(values(rtn(smooth, bits, group, symmetric=True)))
        want = x.double() @ w.t()
        error = given.double() @ stored.t() - want
        out.append(float(error.square().sum() / want.square().sum().clamp(min=1e-300)))
    return out
