"""Where the linear layers of a transformers model are: one walk for calibration, the named methods and the runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer, the transposed one of GPT-2 among them."""
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def input_embedding(model: Any) -> Any:
    """The module in which tokens are looked up; None where the model does not say which one it is."""
    with contextlib.suppress(AttributeError, NotImplementedError):  # transformers raises it for towers side by side
        return model.get_input_embeddings()
    return None


def output_embedding(model: Any) -> Any:
    """The module that makes logits; None where there is none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def tables(model: Any) -> set[Any]:
    """Embeddings, and the output embedding."""
    import torch

    every = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return {m for m in (*every, output_embedding(model)) if isinstance(m, torch.nn.Module)}


def inside_blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of all that lies inside the blocks of a model: below the children of its lists of modules."""
    import torch

    lists = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    return ((name, module) for name, module in model.named_modules() if name.startswith(lists))


def blocks_linears(model: Any) -> dict[str, Any]:
    """Names to the linear layers inside the blocks of a model."""
    return {name: module for name, module in inside_blocks(model) if is_linear(module)}


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The model in evaluation mode, its weights without gradients; behind the `with` block it is as it was."""
    training, wanted = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for p, grad in wanted:
            p.requires_grad_(grad)
        model.train(training)
