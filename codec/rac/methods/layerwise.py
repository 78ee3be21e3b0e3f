"""A causal language model quantised block by block: GPTQ (arXiv 2210.17323, section 4) and round to nearest.

The inputs of a block come from the blocks before it as they are once quantised. Within a block all layers are
calibrated together, or one set of layers with the same input after the other (`sequential`). Layers may map their
input (rac.linalg.transform), and hooks may quantise it (rac.runtime.simulate, entered around the call): the Hessians
are of what reaches the weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate import text as calibration_text
from rac.calibrate.chain import Chain, UnfitError
from rac.calibrate.moments import Collector
from rac.calibrate.text import Note
from rac.encode.options import silent
from rac.errors import RacError, UnsupportedError
from rac.methods import gptq
from rac.methods.matrices import joined, of_blocks, weights
from rac.models.linears import frozen
from rac.stages.groups import Grouped, values

ROWS = 2048
"""Tokens that a block takes at once."""


def calibration_ids(path: str, text: str, tokens: int = 40960, context: int = 1024) -> NDArray[np.int64]:
    """Token ids (n, context) of the beginning of a text, by the tokenizer in folder `path`.

    SourceError where there is no tokenizer, or the text is too short.
    """
    found = calibration_text.text_ids(path, text, tokens)
    return calibration_text.sequences(found.ids, tokens, min(context, found.longest), found.front)


def quantise_gptq(
    model: Any,
    ids: NDArray[np.int64],
    bits: int,
    group: int | None = 128,
    *,
    sequential: bool = True,
    note: Note | None = None,
    **how: Any,
) -> dict[str, Grouped]:
    """GPTQ of every linear layer of the decoder blocks; the model gets the numbers of the grids, in place.

    Embeddings and output layer are left alone. Memory: the hidden states of the text, and Hessians of one block.

    `model` is one of transformers, in float32 on the CPU, whose blocks are a chain; `ids` (n, context) are token ids of
    the calibration text (`calibration_ids`); `bits`, `group` and `how` go to `gptq`. With `sequential` layers whose
    inputs other layers of the block make see them quantised: one more pass of the block for each set of layers with the
    same input. `note` is called with "gptq", blocks done, and all of them. Returns names of weights to what is stored,
    in the order of the model.

    Fused experts have a Hessian each, drawn towards that of all, and are rounded together. UnsupportedError where the
    model is no chain of blocks, or weights are stored (in, out). Errors of `gptq` name the layer.
    """
    import torch

    tell = note or silent
    every = of_blocks(model)
    found: dict[str, Grouped] = {}
    with _chain(model, ids) as chain, torch.no_grad():
        inside = [{name: layers[name] for name in layers if name in every} for layers in chain.inside]
        if outside := set(every) - {name for layers in inside for name in layers}:
            raise UnsupportedError("lies outside the chain of blocks", unit=repr(min(outside)))
        tokens = torch.from_numpy(ids)
        batch = chain.batch(tokens[: max(1, ROWS // ids.shape[1])])
        hidden = torch.cat([chain.start(part) for part in tokens.split(batch)])
        for i, layers in enumerate(inside):
            for names in _sets(chain, i, layers, hidden[:1], sequential):
                seeing = Collector({name: layers[name] for name in names}, outputs=False)
                with seeing as seen, layers[names[-1]].register_forward_hook(_end):
                    for part in hidden.split(batch):
                        with contextlib.suppress(_End):
                            chain.run(i, part)
                for name in names:
                    rounded = partial(gptq.gptq, bits=bits, group=group, **how)
                    found |= _put(name, layers[name], rounded, seen)
            for part in hidden.split(batch):
                part.copy_(chain.run(i, part))
            tell("gptq", i + 1, len(chain.blocks))
    return {key: found[key] for name, module in every.items() for key in weights(name, module)}


def quantise_rtn(
    model: Any, bits: int, group: int | None = 128, *, note: Note | None = None, **how: Any
) -> dict[str, Grouped]:
    """Round every linear layer of the decoder blocks to nearest, in place, without a text.

    Arguments, result and errors are those of `quantise_gptq`; `how` goes to `rtn`. The blocks need be no chain.
    """
    tell = note or silent
    layers = of_blocks(model)
    found: dict[str, Grouped] = {}
    for i, (name, layer) in enumerate(layers.items(), 1):
        found |= _put(name, layer, partial(gptq.rtn, bits=bits, group=group, **how))
        tell("rounding to nearest", i, len(layers))
    return found


def _put(name: str, layer: Any, rounded: Callable[..., Grouped], seen: Collector | None = None) -> dict[str, Grouped]:
    """Quantise the matrices of a module by the inputs that were `seen`, if any, and give it the numbers."""
    import torch

    found = {}
    for key, matrices in weights(name, layer).items():
        if seen is None:
            hessians: list[Any] = [None] * len(matrices)
        elif len(matrices) == 1:
            hessians = [seen.second[seen.key[name]]]
        else:
            hessians = seen.of_experts(key)
        parts = []
        for w, hessian in zip(matrices, hessians, strict=True):
            try:
                g = rounded(w.numpy(), **({} if hessian is None else {"hessian": hessian}))
            except RacError as e:
                e.unit = e.unit or repr(name)
                raise
            made = torch.from_numpy(values(g))
            lost = float(w.square().sum(dtype=torch.float64)), float((made - w).square().sum(dtype=torch.float64))
            parts.append(replace(g, lost=lost))
            w.copy_(made)
        found[key] = joined(parts)
    return found


@contextlib.contextmanager
def _chain(model: Any, ids: NDArray[np.int64]) -> Iterator[Chain]:
    """The model as a chain of blocks, in evaluation mode; what that changes of it is changed back."""
    hooks = [(m._forward_hooks, set(m._forward_hooks)) for m in model.modules()]
    try:
        with frozen(model):
            try:
                chain = Chain(model, True, ids[:1])
            except (UnfitError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as e:
                raise UnsupportedError(f"{type(model).__name__} cannot be run block by block: {e}") from e
            yield chain
    finally:
        for held, before in hooks:
            for key in set(held) - before:
                del held[key]


class _End(Exception):
    """Nothing more of a block needs to run."""


def _end(*_: Any) -> None:
    raise _End


def _sets(chain: Chain, i: int, layers: Mapping[str, Any], hidden: Any, sequential: bool) -> list[list[str]]:
    """Names of the layers of block `i` in sets that are calibrated together, both in the order in which they run."""
    order: dict[str, None] = {}
    with contextlib.ExitStack() as stack:
        for name, m in layers.items():
            stack.enter_context(m.register_forward_hook(lambda *_, name=name: order.update({name: None})))
        seen = stack.enter_context(Collector(layers, outputs=False))
        chain.run(i, hidden)
    if missing := layers.keys() - order:
        raise UnsupportedError(
            "does not run on the calibration text, or its weight is read without it; --recipe rtn rounds it",
            unit=repr(min(missing)),
        )
    sets: dict[str, list[str]] = {}
    for name in order:
        sets.setdefault(seen.key.get(name, name) if sequential else "", []).append(name)
    return list(sets.values())
