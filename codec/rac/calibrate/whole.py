"""A calibration by passes of a whole model, one for each sequence: of what is no chain of blocks."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate.endings import Ending, Outputs, Predictions
from rac.calibrate.folder import Folder
from rac.calibrate.moments import Collector, Sums, linears
from rac.calibrate.outer import size
from rac.calibrate.reader import ERRORS, Reader, feed
from rac.calibrate.tables import Tables, embeddings, output_layer
from rac.calibrate.text import Note
from rac.calibrate.wide import Wide
from rac.errors import SourceError
from rac.models.linears import input_embedding


@contextlib.contextmanager
def leaves(model: Any) -> Any:
    """Gradients begin at the embeddings: those of the weights are not wanted."""
    tables = {*embeddings(model).values(), *map(input_embedding, model.modules())} - {None}
    with contextlib.ExitStack() as stack:
        for t in tables:
            stack.enter_context(t.register_forward_hook(lambda _, __, out: out.detach().requires_grad_(True).clone()))
        yield


def calibrate(
    reader: Reader,
    ids: NDArray[np.int64],
    end: Ending | None,
    folder: Folder,
    note: Note,
    path: str,
    outer: bool,
) -> None:
    """Calibrate with passes of the whole model: backward from an ending where it can, else forward alone."""
    try:
        need, scored = _tried(reader, torch.from_numpy(ids[:1]), end is not None)
        if isinstance(end, Predictions) and not scored:
            end = Outputs()
        if outer:
            layers = (m for m in linears(reader.model).values() if isinstance(m, torch.nn.Linear))
            need += sum(size(*m.weight.shape) for m in layers)
        what = f"its weights, what it makes of {ids.shape[1]} tokens, second moments"
        note(f"it needs about {need / 1e6:.0f} MB: {what}", 0, 0)
        for again in (False, True):
            try:
                return whole(reader, ids, None if again else end, folder, note, outer)
            except ERRORS as why:
                if again or end is None:
                    raise
                note(f"no backward pass, so no sensitivities: {_said(why)}", 0, 0)
    except ERRORS as why:
        what = f"{type(reader.model).__name__} cannot be calibrated on a text ({_said(why)})"
        raise SourceError(f"{what}; `--calibrate none` works", file=path) from why


def _said(e: Exception) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _tried(reader: Reader, tokens: Any, fisher: bool) -> tuple[int, bool]:
    """Bytes of weights and of what a pass keeps of one sequence, and whether that ends in scores of tokens.

    Nothing is kept in this run: what autograd would keep is counted.
    """
    model, largest, inputs = reader.model, 0, 0

    def count(module: Any, args: Any, out: Any) -> None:
        nonlocal largest, inputs
        every = out if isinstance(out, tuple) else (out,)
        largest = max(largest, sum(4 * t.numel() for t in every if isinstance(t, torch.Tensor)))
        inputs += 4 * args[0].numel() if isinstance(module, torch.nn.Linear) else 0

    model.requires_grad_(False)
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_hook(count))
        stack.enter_context(torch.set_grad_enabled(fisher))
        if fisher:
            stack.enter_context(leaves(model))
        wide = stack.enter_context(Wide())
        wide.saved = 0
        out = model(**feed(model, reader.causal, tokens))
    logits = getattr(out, "logits", None)
    scored = logits is not None and logits.dim() == 3 and logits.shape[1] == tokens.shape[1]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    sums = sum(4 * m.weight.shape[-1] ** 2 for m in linears(model).values() if isinstance(m, torch.nn.Linear))
    return weights + sums + 4 * largest + (wide.saved + inputs if fisher else 0), scored


def whole(reader: Reader, ids: NDArray[np.int64], end: Ending | None, folder: Folder, note: Note, outer: bool) -> None:
    """Calibrate with one pass of the whole model for each sequence; nothing is kept in between."""
    model, tokens, fisher = reader.model, torch.from_numpy(ids), end is not None
    for p in model.parameters():
        p.requires_grad_(False)
    folder.state.update(layers={}, steps=0)
    folder.commit(drop=lambda name: name != "ids.npy")
    sums = Sums()
    with Collector(linears(model), outputs=fisher, outer=outer) as found, contextlib.ExitStack() as stack:
        if fisher:
            stack.enter_context(leaves(model))
        tables = stack.enter_context(Tables(found, embeddings(model), output_layer(model)))
        stack.enter_context(torch.set_grad_enabled(fisher))
        for s in range(len(ids)):
            out = model(**feed(model, reader.causal, tokens[s : s + 1]))
            if end is not None:
                end.backward(out, s, 0, tables)
                found.settle()
            del out
            if outer:  # sequences are what tells chance
                sums.add(found.take())
            note("calibrating", s + 1, len(ids))
        sums.add(found.take())
    sums.save(folder, "whole", ids.size, fisher)
