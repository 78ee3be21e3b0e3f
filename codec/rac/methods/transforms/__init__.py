"""Transforms of a causal language model that leave what it computes as it is: fused, rotated, smoothed, mapped online.

docs/transforms.md shows how they are used: on a model in float32, in place, in float64. torch and transformers are met
through the model, and imported only where a function needs them.
"""

from rac.methods.transforms.rotate import (
    fuse_norms,
    hadamard,
    matrix,
    online,
    online_down,
    online_heads,
    quarot,
    rotate_residual,
    rotate_values,
    rotated_keys,
    untie,
)
from rac.methods.transforms.rules import RULES, Parts, parts
from rac.methods.transforms.smooth import maxima, smooth
from rac.methods.transforms.source import deviation, logits, require_same, source

__all__ = ["RULES", "Parts", "deviation", "fuse_norms", "hadamard", "logits", "matrix", "maxima", "online"]
__all__ += ["online_down", "online_heads", "parts", "quarot", "require_same", "rotate_residual", "rotate_values"]
__all__ += ["rotated_keys", "smooth", "source", "untie"]
