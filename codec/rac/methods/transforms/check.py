"""Whether a transformed model computes what it did."""

from __future__ import annotations

from typing import Any

from rac.errors import TransformError
from rac.methods.transforms.rules import Parts

MOST = 1e-3
"""Largest difference of logits, as a share of the largest logit, at which a model still computes the same."""


def logits(model: Any, tokens: Any) -> Any:
    """(batch, n, vocabulary) float64 of token ids (n,) or (batch, n); no gradient, and dropout is off."""
    import torch

    ids = tokens if tokens.ndim == 2 else tokens[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits.double()
    finally:
        model.train(training)


def deviation(model: Any, transformed: Any, tokens: Any) -> float:
    """Max |difference of logits| / max |logit|; infinite where there is a NaN.

    Args:
        model: The original, or its logits (`logits`), where it is transformed in place.
        transformed: What came of it.
        tokens: Ids (n,) or (batch, n), on the device of the models.
    """
    before, after = (x if hasattr(x, "ndim") else logits(x, tokens) for x in (model, transformed))
    found = float((after - before).abs().max() / before.abs().max())
    return found if found == found else float("inf")


def require_same(model: Any, p: Parts, tokens: Any, most: float = MOST) -> float:
    """The deviation of a transformed model from what it was (`deviation`); only one that passes here can be packed.

    Raises:
        TransformError: It is above `most`.
    """
    found = deviation(model, p.model, tokens)
    if found <= most:
        p.deviation = found
    else:
        raise TransformError(
            f"the transform has changed what the model computes: logits differ by {found:.2e} of the largest, "
            f"{most:g} is allowed; it is not packed"
        )
    return found
