"""Symbols to words and back: integer frequency tables, ANS lanes.

`encode` and `decode` are one lane with one table as functions of a numpy array.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rac.entropy.integers import decode, encode

__all__ = ["decode", "encode"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("rac.entropy.integers"), name)
