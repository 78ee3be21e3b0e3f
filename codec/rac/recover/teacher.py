"""What the original predicts on sequences, in files, and how far other predictions are from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate.folder import Folder

MOST = 512  # likeliest tokens of a position that are told apart; all others count as one
TINY = 1e-9
_CHUNK = 128  # positions whose probabilities are made at once


class NotFiniteError(Exception):
    """The original predicts no probabilities."""


def teach(logits: Callable[[Any], Any], ids: NDArray[np.int64], folder: Folder, done: Callable[[int], None]) -> None:
    """Keep the logarithms of the likeliest tokens' probabilities for sequences (n, rows, context), one file for each.

    What the folder has already is not made again. NotFiniteError where a logit is not finite.
    """
    for i, sequence in enumerate(ids):
        if _name("log", i) not in folder:
            with torch.no_grad():
                out = logits(torch.from_numpy(np.ascontiguousarray(sequence)))
                found = [_likeliest(part) for part in out.reshape(-1, out.shape[-1]).split(_CHUNK)]
            value, index = (torch.cat([pair[k] for pair in found]).cpu().numpy() for k in (0, 1))
            if not np.isfinite(value).all():
                raise NotFiniteError("the original predicts NaN or infinity")
            folder.put(_name("index", i), index.astype(np.uint16 if out.shape[-1] <= 1 << 16 else np.int32))
            folder.put(_name("log", i), value.astype(np.float16))
            if i % 8 == 7 or i == len(ids) - 1:
                folder.commit()
        done(i + 1)


def _likeliest(logits: Any) -> tuple[Any, Any]:
    value, index = logits.topk(min(MOST, logits.shape[-1]), -1)
    return value - logits.logsumexp(-1, keepdim=True), index


def lesson(folder: Folder, i: int, device: str) -> tuple[Any, Any]:
    """(tokens, MOST) places and logarithms of sequence `i`."""
    index, value = (np.array(folder.array(_name(kind, i))) for kind in ("index", "log"))
    return torch.from_numpy(index.astype(np.int64)).to(device), torch.from_numpy(value).float().to(device)


def _name(kind: str, i: int) -> str:
    return f"{kind}-{i:05}.npy"


class _Divergence(torch.autograd.Function):  # type: ignore[misc]
    """Mean over tokens of KL(p || q): p by its likeliest tokens and the rest as one, q by logits (tokens, n)."""

    @staticmethod
    def forward(ctx: Any, logits: Any, index: Any, log: Any) -> Any:
        total = torch.logsumexp(logits, -1, keepdim=True)
        mine = logits.gather(-1, index) - total
        p = log.exp()
        rest, other = ((1 - x.sum(-1, keepdim=True)).clamp(min=TINY) for x in (p, mine.exp()))
        ctx.save_for_backward(logits, index, p, total, rest / other)
        each = (p * (log - mine)).sum(-1, keepdim=True) + rest * (rest / other).log()
        return each.mean()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        logits, index, p, total, ratio = ctx.saved_tensors
        out = torch.sub(logits, total).exp_()
        at = out.gather(-1, index) - p
        out *= 1 - ratio
        out.scatter_(-1, index, at)
        return out.mul_(grad / len(out)), None, None


def divergence(logits: Any, taught: tuple[Any, Any]) -> Any:
    """Nats a token of logits (..., n) from what was taught, in the order of their positions."""
    return _Divergence.apply(logits.reshape(-1, logits.shape[-1]), *taught)
