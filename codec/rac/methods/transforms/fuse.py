"""Gains of norms into the projections behind them, so that a norm commutes with rotations of its input.

RMSNorm(x) = g * x / rms(x), and rms(R x) = rms(x) for orthogonal R: with g = 1 the norm of a rotated input is the
rotated norm (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456, section 4).
"""

from __future__ import annotations

from typing import Any

from rac.methods.transforms.rules import Parts


def untie(p: Parts) -> None:
    """Give the output layer a weight of its own where it shares that of the embedding; the configuration says so."""
    if p.head.weight is not p.embedding.weight:
        return
    p.head.weight = type(p.head.weight)(p.head.weight.data.clone(), requires_grad=p.head.weight.requires_grad)
    p.model.config.tie_word_embeddings = False
    if hasattr(p.model, "all_tied_weights_keys"):
        p.model.all_tied_weights_keys = {}
    n = p.head.weight.numel()
    p.did("untie", f"untied: the output layer has {n:,} weights of its own (tie_word_embeddings = false)")


def fuse_norms(p: Parts) -> None:
    """Fuse the gain of every norm into the projections that read it; all gains are 1 then.

    Norms behind the output projections (Gemma 2) keep theirs: nothing linear follows them.
    """
    untie(p)
    groups = [(p.norm, (p.head,))]
    for layer in p.layers:
        groups += [(layer.attention_norm, layer.attention_in), (layer.mlp_norm, layer.mlp_in)]
    for norm, readers in groups:
        gain = p.gain(norm)
        for reader in readers:
            reader.weight.data.copy_(reader.weight.data.double() * gain)
        p.set_gain(norm, gain.new_ones(len(gain)))
    p.did("fuse_norms", f"fused: the gains of {len(groups)} norms")


def fused(p: Parts) -> bool:
    """Whether all gains that `fuse_norms` fuses are 1."""
    norms: list[Any] = [p.norm]
    for layer in p.layers:
        norms += [layer.attention_norm, layer.mlp_norm]
    return all(bool((p.gain(norm) == 1).all()) for norm in norms)
