"""What the original predicts on sequences, in files, and how far other predictions are from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate.folder import Folder
from rac.container.zstd import digest

MOST = 256  # likeliest tokens of a position, each with its probability
DRAWN = 256  # tokens drawn from the others by their probabilities: each stands for an equal share of these
SEED = 0
_CHUNK = 128  # positions whose probabilities are made at once


class NotFiniteError(Exception):
    """The original predicts no probabilities."""


def teach(logits: Callable[[Any], Any], ids: NDArray[np.int64], folder: Folder, done: Callable[[int], None]) -> None:
    """Keep logarithms of tokens' probabilities for sequences (n, rows, context): of the likeliest, and of some others.

    A file is named after its sequence: what the folder has already, for whatever lessons, is not made again.
    NotFiniteError where a logit is not finite.
    """
    for i, sequence in enumerate(ids):
        if (log := _name("log", sequence)) not in folder:
            with torch.no_grad():
                out = logits(torch.from_numpy(np.ascontiguousarray(sequence)))
                made = torch.Generator().manual_seed(SEED)
                found = [_some(part, made) for part in out.reshape(-1, out.shape[-1]).split(_CHUNK)]
            value, index = (torch.cat([pair[k] for pair in found]).cpu().numpy() for k in (0, 1))
            if not np.isfinite(value).all():
                raise NotFiniteError("the original predicts NaN or infinity")
            folder.put(_name("index", sequence), index.astype(np.uint16 if out.shape[-1] <= 1 << 16 else np.int32))
            folder.put(log, value.astype(np.float16))
            if i % 8 == 7:
                folder.commit()
        done(i + 1)
    folder.commit()


def _some(logits: Any, made: Any) -> tuple[Any, Any]:
    """(tokens, MOST + DRAWN) logarithms of probabilities, and places, of the likeliest and of drawn tokens."""
    log = logits - logits.logsumexp(-1, keepdim=True)
    value, index = log.topk(min(MOST, log.shape[-1]), -1)
    if log.shape[-1] <= MOST:
        return value, index
    others = log.exp().scatter_(-1, index, 0).cumsum(-1)
    at = torch.rand(len(log), DRAWN, generator=made).to(log.device) * others[:, -1:]
    drawn = torch.searchsorted(others, at.clamp(min=0)).clamp_(max=log.shape[-1] - 1)
    return torch.cat([value, log.gather(-1, drawn)], -1), torch.cat([index, drawn], -1)


def lesson(folder: Folder, ids: NDArray[np.int64], device: str) -> tuple[Any, Any, Any]:
    """Places, logarithms and weights (tokens, MOST + DRAWN) of sequences; the weights of a token add up to 1."""
    index, value = (np.array(folder.array(_name(kind, ids))) for kind in ("index", "log"))
    log = torch.from_numpy(value).float().to(device)
    weight = log.exp()
    if log.shape[-1] > MOST:
        left = (1 - weight[:, :MOST].sum(-1, keepdim=True)).clamp_(min=0)
        weight[:, MOST:] = left / DRAWN
    weight /= weight.sum(-1, keepdim=True)
    return torch.from_numpy(index.astype(np.int64)).to(device), log, weight


def _name(kind: str, ids: NDArray[np.int64]) -> str:
    return f"{kind}-{digest(repr(ids.shape).encode() + np.ascontiguousarray(ids, '<i8').tobytes()).hex()}.npy"


class _Divergence(torch.autograd.Function):  # type: ignore[misc]
    """Mean over tokens of KL(p || q): p by some of its logarithms and their weights, q by logits (tokens, n)."""

    @staticmethod
    def forward(ctx: Any, logits: Any, index: Any, log: Any, weight: Any) -> Any:
        total = torch.logsumexp(logits, -1, keepdim=True)
        ctx.save_for_backward(logits, index, weight, total)
        return (weight * (log - logits.gather(-1, index) + total)).sum(-1).mean()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        logits, index, weight, total = ctx.saved_tensors
        out = torch.sub(logits, total).exp_()
        out.scatter_add_(-1, index, -weight)
        return out.mul_(grad / len(out)), None, None, None


def divergence(logits: Any, taught: tuple[Any, Any, Any]) -> Any:
    """Nats a token of logits (..., n) from what was taught, in the order of their positions: right in the mean."""
    return _Divergence.apply(logits.reshape(-1, logits.shape[-1]), *taught)
