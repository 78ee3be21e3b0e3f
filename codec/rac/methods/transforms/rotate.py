"""Gains and rotations that are fused into weights, and maps that a layer applies while it runs.

RMSNorm(x) = g * x / rms(x), and rms(R x) = rms(x) for orthogonal R: with g = 1 the norm of a rotated input is the
rotated norm (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456, section 4).

The names R1 to R4 are those of SpinQuant (arXiv 2405.16406): R1 of the residual stream, R2 of the values of each head,
R3 of queries and keys, R4 in front of the second half of the MLP. The randomised Hadamard matrices, and the online one
across the heads, are those of QuaRot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.errors import TransformError, UnsupportedError
from rac.linalg.transform import Transform, hook, hooked
from rac.methods.transforms.rules import INSTEAD, Layer, Parts, Rows
from rac.models.activations import attention
from rac.records import Online

ORTHOGONAL = 1e-5
"""Largest element of R^T R - I of a matrix that is taken for a rotation."""


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
    groups = _gains(p)
    for norm, readers in groups:
        gain = p.gain(norm)
        for reader in readers:
            reader.weight.data.copy_(reader.weight.data.double() * gain)
        p.set_gain(norm, gain.new_ones(len(gain)))
    p.did("fuse_norms", f"fused: the gains of {len(groups)} norms")


def _gains(p: Parts) -> list[tuple[Any, tuple[Any, ...]]]:
    """Norms that can be fused, and the layers that read them."""
    found = [(p.norm, (p.head,))]
    for layer in p.layers:
        found += [(layer.attention_norm, layer.attention_in), (layer.mlp_norm, layer.mlp_in)]
    return found


def require_fused(p: Parts) -> None:
    """TransformError unless all gains that `fuse_norms` fuses are 1."""
    if not all(bool((p.gain(norm) == 1).all()) for norm, _ in _gains(p)):
        raise TransformError("the gains of the norms are not fused; call fuse_norms first")


def hadamard(width: int, seed: int | None, size: int | None = None, inner: int = 1) -> Transform:
    """A randomised Hadamard matrix (format_spec/stages/online.md); TransformError where there is none."""
    try:
        return Transform(Online("hadamard/1", width if size is None else size, inner, seed), width)
    except ValueError as e:
        raise TransformError(str(e)) from e


def matrix(m: NDArray[np.floating[Any]], width: int | None = None, inner: int = 1) -> Transform:
    """A map of given numbers (h, h), rounded to float32; its object is named after its content."""
    m32 = np.ascontiguousarray(m, "<f4")
    if not np.isfinite(m32).all():
        raise TransformError("a rotation holds NaN or infinity")
    name = f"online-{zstd.digest(m32.reshape(-1).view(np.uint8).data).hex()[:16]}"
    try:
        return Transform(Online("matrix/1", len(m32), inner, None, name), width or len(m32), m32)
    except ValueError as e:
        raise TransformError(str(e)) from e


def _require_rotation(r: Transform, width: int, what: str) -> None:
    """TransformError unless the map is a rotation of a width."""
    if r.width != width:
        raise TransformError(f"a rotation of width {r.width}, {what} has {width}")
    if r.matrix is not None:
        m = r.matrix.astype(np.float64)
        if (off := float(np.abs(m.T @ m - np.eye(len(m))).max())) > ORTHOGONAL:
            raise TransformError(f"the rotation is not orthogonal: R^T R differs from 1 by {off:.1e}")


def _last(r: Transform, w: Any, inverse: bool) -> None:
    """The last axis of `w` in blocks of the width of `r`, in place: each block multiplied by R, or a weight by R^-1."""
    wide = w.double().reshape(-1, r.width)
    w.copy_((r.absorb(wide) if inverse else r.apply(wide)).reshape(w.shape))


def _outputs(r: Transform, rows: Rows) -> None:
    """R times the outputs of a layer."""
    turned = rows.weight.t().contiguous()
    _last(r, turned, inverse=False)
    rows.weight.copy_(turned.t())
    if rows.bias is not None:
        _last(r, rows.bias, inverse=False)


def require_rotatable(p: Parts) -> None:
    """TransformError where gains stand in the coordinates of the residual stream, which R1 would change."""
    if p.rules.behind:
        raise TransformError(
            f"{p.model.config.model_type!r} has norms with gains behind its projections ({p.rules.behind[0]}), which "
            "cannot be fused: the residual stream cannot be rotated. Heads and MLP can (rotate_values, online_heads, "
            f"online_down), and {INSTEAD}"
        )


def rotate_residual(p: Parts, r1: Transform) -> None:
    """R1: rotate the residual stream of a model whose norms are fused, by a rotation of its width.

    TransformError where the norms are not fused, the architecture has gains in the coordinates of the stream, or `r1`
    is not orthogonal or of another width.
    """
    require_rotatable(p)
    require_fused(p)
    _require_rotation(r1, p.width, "the residual stream")
    _last(r1, p.embedding.weight.data, inverse=False)
    for layer in p.layers:
        for reader in (*layer.attention_in, *layer.mlp_in):
            _last(r1, reader.weight.data, inverse=True)
        for writer in (layer.attention_out, layer.mlp_out):
            _outputs(r1, Rows(writer, 0))
    _last(r1, p.head.weight.data, inverse=True)
    p.did("rotate_residual", f"R1, the residual stream: {r1.describe()}")


def rotate_values(p: Parts, layer: Layer, r2: Transform) -> None:
    """R2: rotate the values of every head of a layer, and what the output projection reads, by one rotation (d, d).

    TransformError where `r2` is not orthogonal or not of the head's width, or the output projection has an online map,
    which stands in coordinates of its own.
    """
    _require_rotation(r2, p.head_dim, "a head")
    if hooked(layer.attention_out):
        raise TransformError(f"{layer.name}: rotate the values before the heads are mixed online")
    _outputs(r2, layer.value)
    _last(r2, layer.attention_out.weight.data, inverse=True)
    p.did(f"rotate_values {layer.name}")


def online(p: Parts, layer: Any, name: str, t: Transform) -> None:
    """Let a linear layer map its input by `t`, and its weight undo that.

    TransformError where the layer has a map already or is of another width, or the map has no inverse.
    """
    if hooked(layer):
        raise TransformError(f"{name} has an online transform already")
    if t.width != layer.in_features:
        raise TransformError(f"{name}: an online transform of width {t.width}, the layer has {layer.in_features}")
    try:
        layer.weight.data.copy_(t.absorb(layer.weight.data.double()))
    except np.linalg.LinAlgError as e:
        raise TransformError(f"{name}: the online transform has no inverse") from e
    hook(layer, t)
    p.did(f"online {name}")
    p.online[f"{name}.weight"] = t


def online_heads(p: Parts, layer: Layer, seed: int | None) -> None:
    """Mix the heads in front of the output projection: H of order heads for each element of a head."""
    t = hadamard(p.heads * p.head_dim, seed, p.heads, p.head_dim)
    online(p, layer.attention_out, f"{layer.name}.{p.rules.attention_out}", t)


def online_down(p: Parts, layer: Layer, seed: int | None) -> None:
    """R4: mix the inputs of the second half of the MLP."""
    online(p, layer.mlp_out, f"{layer.name}.{p.rules.mlp_out}", hadamard(p.inner, seed))


def quarot(p: Parts, seed: int = 0) -> None:
    """All of QuaRot but the cache: norms fused, R1, R2, and online maps of the heads and in front of the second half.

    Together R2 and the map across the heads are a Hadamard matrix of all inputs of the output projection. R1 has the
    signs of `seed`; layer i those of seed + 3 i + 1 (R2), + 2 (heads) and + 3 (MLP). `about` says "keys", the seed of
    R3, which a quantised cache is to have.
    """
    require_rotatable(p)  # before anything is changed
    done = list(p.about.get("transforms", ()))
    fuse_norms(p)
    rotate_residual(p, hadamard(p.width, seed))
    for i, layer in enumerate(p.layers):
        rotate_values(p, layer, hadamard(p.head_dim, seed + 3 * i + 1))
        online_heads(p, layer, seed + 3 * i + 2)
        online_down(p, layer, seed + 3 * i + 3)
    p.notes.append(f"R2, the values of each head: {hadamard(p.head_dim, None).describe()}")
    p.notes.append(f"online, across the heads: {hadamard(p.heads, None).describe()}")
    p.notes.append(f"R4, online, in front of {p.rules.mlp_out}: {hadamard(p.inner, None).describe()}")
    p.about |= {"transforms": [*done, f"quarot {seed}"], "keys": seed}


@contextlib.contextmanager
def rotated_keys(
    p: Parts,
    seed: int | None = None,
    keys: Callable[[Any], Any] | None = None,
    values: Callable[[Any], Any] | None = None,
) -> Iterator[None]:
    """R3: rotate queries and keys of all layers inside the `with` block, by one randomised Hadamard matrix per head.

    q . k is what it was, so that the model computes the same, and no file needs to state it; keys that are quantised
    for the cache are then without outliers. What a file may state is the `seed` of the signs (None: no random ones),
    among what is known of its making. The cache holds keys that are not rotated: all are rotated when they are read.
    `keys` is called with the rotated keys (batch, key heads, n, head_dim), `values` with the values; what a quantiser
    like that returns is used.

    TransformError where the model's attention is no function that transformers lets one replace.
    """
    import transformers

    r3 = hadamard(p.head_dim, seed)

    def rotated(_: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        k = r3.apply(k)
        return r3.apply(q), keys(k) if keys else k, values(v) if values else v

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(attention(p.model, transformers, rotated))
        except UnsupportedError as e:
            raise TransformError(f"keys cannot be rotated: {e.message}") from e
        yield
