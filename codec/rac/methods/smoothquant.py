"""SmoothQuant (arXiv 2211.10438) with its alpha searched: the one of a grid with the least error of layers' outputs.

The error of an alpha is that of the outputs of every layer behind the places that are smoothed, weights and inputs
quantised, over the energy of these outputs, in the mean over the layers. A layer is judged by itself: its inputs are
those of the model as it is (docs/methods/smoothquant.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.methods.gptq import Floats, rtn
from rac.methods.transforms.rules import Parts
from rac.methods.transforms.smooth import PLACES, Maxima, inputs, maxima, readers, scales, smooth
from rac.models.activations import per_token
from rac.stages.groups import Grouped, values

ALPHAS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
"""0.5 is the paper's for OPT and BLOOM, 0.75 for GLM-130B; 0.85 the authors' for Llama."""
Rounded = Callable[[Floats], Grouped]
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
    """Smooth a model (`transforms.parts`), in place; returns alpha, as `p.about` says it. Nothing is rounded.

    `sequences` are token ids (batch, n) each: a part of the calibration text. `alpha` is 0 to 1; None: the best of
    ALPHAS for weights of `bits`, rounded to nearest on a symmetric grid, `group` columns sharing a scale (None: all),
    and inputs of `activations` bits, one scale for each token (None: as they are). `places` are names from PLACES:
    where inputs are made smooth.

    TransformError where there are no sequences, or inputs are not finite or mapped online; ValueError where an alpha, a
    place or a number of bits is out of range.
    """
    sequences = list(sequences)
    found = maxima(p, sequences)
    if alpha is None:
        rounded = partial(rtn, bits=bits, group=group, symmetric=True)
        alpha, _ = choose(p, found, sequences, rounded, activations, places=places)
    smooth(p, found, alpha, places)
    return alpha


def choose(
    p: Parts,
    found: Maxima,
    sequences: Iterable[Any],
    rounded: Rounded,
    activations: int | None,
    alphas: Sequence[float] = ALPHAS,
    places: Sequence[str] = ("attention", "mlp"),
) -> tuple[float, dict[float, float]]:
    """The best alpha, and the relative squared error of the outputs for each; the model is left alone.

    `found` is what `maxima` has found for the model, before `smooth`; `rounded` quantises a weight. Errors are those of
    `smoothquant`.
    """
    import torch

    alphas = tuple(alphas)
    if not alphas or not all(0 <= a <= 1 for a in alphas) or set(places) - set(PLACES):
        raise ValueError(f"alphas are 0 to 1, places are {', '.join(PLACES)}, not {alphas}, {tuple(places)}")
    seen: dict[tuple[str, str], list[Any]] = {}

    def see(key: tuple[str, str], x: Any) -> None:
        seen.setdefault(key, []).append(x[:: max(1, len(x) // TOKENS)].clone())

    inputs(p, places, sequences, see)
    errors: dict[float, list[float]] = {a: [] for a in alphas}
    for layer, place in itertools.product(p.layers, places):
        x = torch.cat(seen[layer.name, place])
        for a in alphas:
            errors[a] += _errors(readers(layer, place), x, scales(p, layer, place, found, a), rounded, activations)
    means = {a: float(np.mean(e)) for a, e in errors.items()}
    return min(means, key=lambda a: means[a]), means


def _errors(
    layers: Iterable[Any], x: Any, by: NDArray[np.float64], rounded: Rounded, activations: int | None
) -> list[float]:
    """Relative squared error of the outputs of each layer behind a place, its inputs divided by `by`."""
    out = []
    given = x / x.new_tensor(by)
    given = per_token(given, activations) if activations is not None else given
    for layer in layers:
        w = layer.weight.detach().double()
        smoothed = (w * w.new_tensor(by)).cpu().numpy()
        stored = w.new_tensor(values(rounded(smoothed)))
        want = x.double() @ w.t()
        error = given.double() @ stored.t() - want
        out.append(float(error.square().sum() / want.square().sum().clamp(min=1e-300)))
    return out
