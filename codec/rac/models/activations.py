"""Activations as if they were quantised: rounded to few bits and back, in the floating-point numbers of the model.

Tensors of torch are met through their methods, transformers is handed in. Rounding has no gradient here.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rac.errors import UnsupportedError

Change = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]
_LEAST = 1e-30
"""Scale of a vector of zeros."""
_count = itertools.count()


def per_token(x: Any, bits: int, clip: float = 1.0, most: Any = None) -> Any:
    """Each vector along the last axis on a symmetric grid of 2**bits - 1 or 2**bits numbers, `x` of any shape.

    As of QuaRot (arXiv 2404.00456, section 5) with clip 0.9, of SmoothQuant (2211.10438) with 1: the share of the
    largest magnitude up to which the grid goes. `most` is that magnitude where it is known beforehand (a static scale);
    None: that of each vector. The data type is kept; `bits` are 2 to 16.
    """
    wide = x.float() if x.dtype.itemsize < 4 else x
    half = 2 ** (bits - 1)
    top = wide.abs().amax(-1, keepdim=True) if most is None else wide.new_tensor(most)
    scale = (top * (clip / (half - 1))).clamp(min=_LEAST)
    return ((wide / scale).round().clamp(-half, half - 1) * scale).to(x.dtype)


def per_group(x: Any, bits: int, group: int | None = None, clip: float = 1.0) -> Any:
    """Groups of each vector along the last axis on a grid between their least and largest number, and 0.

    As QuaRot's keys and values, with clip 0.95, the share of both that the grid goes to, and one group for each head.
    The data type is kept; `bits` are 1 to 16. ValueError where `group` (None: all) does not divide the vectors.
    """
    n = x.shape[-1]
    group = group or n
    if n % group:
        raise ValueError(f"groups of {group} do not divide vectors of {n}")
    wide = (x.float() if x.dtype.itemsize < 4 else x).reshape(*x.shape[:-1], n // group, group)
    top = 2**bits - 1
    low = wide.amin(-1, keepdim=True).clamp(max=0) * clip
    high = wide.amax(-1, keepdim=True).clamp(min=0) * clip
    scale = ((high - low) / top).clamp(min=_LEAST)
    zero = (-low / scale).round()
    found = (((wide / scale).round() + zero).clamp(0, top) - zero) * scale
    return found.reshape(x.shape).to(x.dtype)


@contextlib.contextmanager
def attention(model: Any, transformers: Any, change: Change) -> Iterator[None]:
    """Change what the attention of all layers of a model of `transformers`, the package, is given in the `with` block.

    `change` is called with (module, queries, keys, values), keys and values (batch, key heads, n, head_dim), those of
    the cache among them, behind the position embedding; it returns what takes the place of the three.

    UnsupportedError where the model's attention is no function that transformers lets one replace.
    """
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    config = model.config.get_text_config()
    base = config._attn_implementation
    plain = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    own = plain if base == "eager" else functions.get(base)
    if own is None or base not in masks:
        raise UnsupportedError(f"attention {base!r} of {type(model).__name__} is not one that can be replaced")
    name = f"rac-attention-{next(_count)}"
    functions[name] = lambda module, q, k, v, *args, **how: own(module, *change(module, q, k, v), *args, **how)
    masks.register(name, masks[base])  # masks are only made for names of all instances, which cannot be taken back
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = base
        del functions[name]
