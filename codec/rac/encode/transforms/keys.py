"""R3 (SpinQuant, arXiv 2405.16406): queries and keys rotated behind their position embedding, for a quantised cache.

q . k is what it was, so that the model computes the same, and no file needs to state it; keys that are quantised for
the cache are then without outliers. What a file may state is the seed, among what is known of its making.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rac.encode.transforms.rotate import hadamard
from rac.encode.transforms.rules import Parts
from rac.errors import TransformError

_count = itertools.count()


@contextlib.contextmanager
def rotated_keys(
    p: Parts, seed: int | None = None, keys: Callable[[Any], Any] | None = None,
    values: Callable[[Any], Any] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Rotate queries and keys of all layers inside the `with` block, by one randomised Hadamard matrix per head.

    Args:
        p: The model. Its cache holds keys that are not rotated: all keys are rotated when they are read.
        seed: Of the signs; None: none.
        keys: Called with the rotated keys (batch, key heads, n, head_dim); what it returns is used: a quantiser.
        values: The same for the values.

    Raises:
        TransformError: The model's attention is no function that transformers lets one replace.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = p.model.config
    base = config._attn_implementation
    plain = getattr(sys.modules[type(p.model).__module__], "eager_attention_forward", None)
    attention = plain if base == "eager" else ALL_ATTENTION_FUNCTIONS.get(base)
    if attention is None or base not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise TransformError(f"keys cannot be rotated: attention {base!r} is not one that can be replaced")
    r3 = hadamard(p.head_dim, seed)

    def rotated(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        q, k = r3.apply(q), r3.apply(k)
        return attention(module, q, keys(k) if keys else k, values(v) if values else v, *args, **kwargs)

    name = f"rac-keys-{next(_count)}"
    ALL_ATTENTION_FUNCTIONS.register(name, rotated)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = base
