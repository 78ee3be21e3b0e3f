"""Weights to symbols and raw bits, and back.

`quantize` and `dequantize` are the trellis as functions of a numpy array; files are made of what lies below them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rac.quantize.matrix import dequantize, quantize

__all__ = ["dequantize", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("rac.quantize.matrix"), name)
