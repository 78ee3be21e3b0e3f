"""R3 (SpinQuant, arXiv 2405.16406): queries and keys rotated behind their position embedding, for a quantised cache.

q . k is what it was, so that the model computes the same, and no file needs to state it; keys that are quantised for
the cache are then without outliers. What a file may state is the seed, among what is known of its making.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rac.errors import TransformError, UnsupportedError
from rac.methods.transforms.rotate import hadamard
from rac.methods.transforms.rules import Parts
from rac.models.activations import Attention, attention


@contextlib.contextmanager
def rotated_keys(
    p: Parts,
    seed: int | None = None,
    keys: Callable[[Any], Any] | None = None,
    values: Callable[[Any], Any] | None = None,
) -> Iterator[None]:
    """Rotate queries and keys of all layers inside the `with` block, by one randomised Hadamard matrix per head.

    Args:
        p: The model. Its cache holds keys that are not rotated: all keys are rotated when they are read.
        seed: Seed of the matrix's signs; None: no random signs.
        keys: Called with the rotated keys (batch, key heads, n, head_dim); what it returns is used: a quantiser.
        values: Called with the values (batch, key heads, n, head_dim); what it returns is used.

    Raises:
        TransformError: The model's attention is no function that transformers lets one replace.
    """
    import transformers

    r3 = hadamard(p.head_dim, seed)

    def around(own: Attention) -> Attention:
        def rotated(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            q, k = r3.apply(q), r3.apply(k)
            return own(module, q, keys(k) if keys else k, values(v) if values else v, *args, **kwargs)

        return rotated

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(attention(p.model, transformers, around))
        except UnsupportedError as e:
            raise TransformError(f"keys cannot be rotated: {e.message}") from e
        yield
