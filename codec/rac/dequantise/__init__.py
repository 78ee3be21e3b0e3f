"""Quantised weights of other tools as the matrices that they stand for: codes, scales and what else belongs to them.

What is recognised goes by names, types and shapes; a configuration may state more. Nothing here knows where the stored
tensors are: of a source that is packed (rac.encode.sources.quantised), or of an archive that is loaded (rac.runtime).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rac.dequantise import floats, four, integers, tables
from rac.dequantise.found import SMALLEST, TABLES, Dequantised, Logical, Rows, Scope, Stored, rebound

__all__ = [
    "METHODS",
    "SMALLEST",
    "Dequantised",
    "Logical",
    "Rows",
    "Stored",
    "dtype_of",
    "find",
    "plain",
    "rebound",
    "stated_in",
    "wide",
]

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4", "gptq", "awq", "bitsandbytes")
"""Methods of `quantization_config` that are known."""
_FINDERS: tuple[Callable[[Scope], Iterator[Logical]], ...] = (
    *(tables.indexed, four.blocks, four.pairs, integers.words, integers.packed),
    floats.eight,
)
_STATED = ("quantization_config", "compression_config")
_CODES = ("U8", "I8", "I32", "F4", *TABLES)
_OF = "input|output|activation|k|v|q|prob|softmax"
_BESIDE = re.compile(rf"(.*[._])?({_OF})(_global)?_(scale|zero_point)(_ub|_inv)?|(.*\.)?qscale_act")
"""Scales of activations and caches, which nobody needs where weights are numbers."""


def find(tensors: Mapping[str, Stored], stated: Mapping[str, Any], where: str) -> tuple[list[Logical], set[str]]:
    """The matrices that stored tensors stand for, and the names of all tensors that these take the place of.

    `stated` is what the configuration says (`stated_in`), `where` a file for messages. SourceError where it names an
    unknown method, a part of a matrix is missing, or codes are left that nothing explains.
    """
    scope = Scope(tensors, stated, where)
    if scope.method == "rac":
        raise scope.error("its weights are records of an archive already (`rac pack --format hf`): pack its original")
    if scope.method and scope.method not in METHODS:
        raise scope.error(f"config.json names the quantisation {scope.method!r}, known are {', '.join(METHODS)}")
    found = []
    for finder in _FINDERS:
        for one in finder(scope):
            found.append(one)
            scope.used |= {*one.parts}
    gone = set(scope.used)
    if found:
        gone |= {n for n, t in scope.left() if _BESIDE.fullmatch(n) and math.prod(t.shape) < SMALLEST}
    for name, t in scope.left():
        large = len(t.shape) > 1 and math.prod(t.shape) >= SMALLEST
        if scope.method and large and t.dtype in _CODES and name not in gone:
            raise scope.wrong(name, f"is not understood as weights of {scope.method!r}")
    return found, gone


def wide(tensors: Mapping[str, Stored]) -> list[Logical]:
    """The large matrices of F64 among stored tensors, as F32, which can be quantised."""
    return [*floats.wide(Scope(tensors, {}, ""))]


def stated_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the quantisation, with its method as `quant_method`; empty where it says nothing."""
    for part in (config, config.get("text_config")):
        for key in _STATED:
            if isinstance(part, Mapping) and isinstance(stated := part.get(key), Mapping):
                method = stated.get("quant_method") or ("compressed-tensors" if key == _STATED[1] else "")
                return {**stated, "quant_method": method}
    return {}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of a quantisation any more."""
    return {k: plain(v) if isinstance(v, Mapping) else v for k, v in config.items() if k not in _STATED}


def dtype_of(config: Mapping[str, Any]) -> str:
    """The data type of matrices that are made: BF16, or F16 where the configuration says so."""
    text = config.get("text_config")
    every = (part.get(key) for part in (config, text) if isinstance(part, Mapping) for key in ("dtype", "torch_dtype"))
    return "F16" if next((d for d in every if d), "") == "float16" else "BF16"
