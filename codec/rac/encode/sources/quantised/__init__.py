"""Quantised weights as the matrices that they stand for: one logical tensor from codes, scales and what else there is.

A lossless pack takes the stored tensors as they are. A pack to a budget quantises what the codes stand for: it reads
a source through `logical`, which makes the numbers whenever they are read and keeps them nowhere.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from rac.encode.sources.model import SMALLEST, Attachment, Source, SourceTensor
from rac.encode.sources.quantised import floats, four, integers, tables
from rac.encode.sources.quantised.found import Dequantised, Logical, Scope
from rac.encode.sources.safetensors import parse_json
from rac.errors import SourceError

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4", "gptq", "awq", "bitsandbytes")
_FINDERS: tuple[Callable[[Scope], Iterator[Logical]], ...] = (
    *(tables.indexed, four.blocks, four.pairs, integers.words, integers.packed),
    *(floats.eight, floats.wide),
)
_STATED = ("quantization_config", "compression_config")
_OTHERS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # of modelopt, GPTQ and AWQ
_INDEX = ".safetensors.index.json"
_CODES = ("U8", "I8", "I32", "F4", "F8_E4M3", "F8_E5M2")
_OF = "input|output|activation|k|v|q|prob|softmax"
_BESIDE = re.compile(rf"(.*[._])?({_OF})(_global)?_(scale|zero_point)(_ub|_inv)?|(.*\.)?qscale_act")
"""Scales of activations and caches, which nobody needs where weights are numbers."""


def logical(source: Source, where: str) -> Source:
    """The source with one tensor for each matrix, whatever it is stored as; the same where all are plain already.

    config.json no longer states a quantisation then, and the index lists the tensors that are there. SourceError where
    the configuration names an unknown method, a part of a matrix is missing, or codes are left that nothing explains.
    """
    configs = {posixpath.dirname(a.name): a for a in source.attachments if posixpath.basename(a.name) == "config.json"}
    found: dict[str, tuple[Logical, Scope, str]] = {}  # by the archive's name of the codes
    dropped: set[str] = set()
    for place, tensors in _places(source).items():
        folder, prefix = place
        config = _json(configs[folder], where) if folder in configs else {}
        scope = Scope(tensors, _stated(config, source, folder, where), where)
        if scope.method and scope.method not in METHODS:
            known = ", ".join(METHODS)
            what = f"config.json names the quantisation {scope.method!r}, known are {known}; pack it without a budget"
            raise SourceError(f"{what}, or dequantise it first", file=where)
        for find in _FINDERS:
            for one in find(scope):
                found[tensors[one.parts[0]].name] = one, scope, prefix
                scope.used |= {*one.parts}
        dropped |= {tensors[name].name for name in scope.used}
        if scope.used:
            dropped |= {t.name for n, t in scope.left() if _BESIDE.fullmatch(n) and math.prod(t.shape) < SMALLEST}
        _explained(scope, dropped)
    if not found:
        return source
    dtype = _dtype(_json(configs[""], where) if "" in configs else {})
    tensors_now = tuple(_tensors(source, found, dropped, dtype))
    files = tuple(_files(source, tensors_now, where))
    schemes = tuple(sorted({one.scheme for one, _, _ in found.values()}))
    return replace(source, tensors=tensors_now, attachments=files, headers={}, dequantised=schemes)


def _places(source: Source) -> dict[tuple[str, str], dict[str, SourceTensor]]:
    """Tensors by (folder, prefix of their names in the archive) and their names in the files."""
    out: dict[tuple[str, str], dict[str, SourceTensor]] = {}
    for t in source.tensors:
        shard = str((t.extra or {}).get("shard", ""))
        prefix = f"{shard}::" if shard and t.name.startswith(f"{shard}::") else ""
        out.setdefault((posixpath.dirname(shard), prefix), {})[t.name.removeprefix(prefix)] = t
    return out


def _json(file: Attachment, where: str) -> dict[str, Any]:
    return parse_json(file.read(), file.name, where)


def _stated(config: Mapping[str, Any], source: Source, folder: str, where: str) -> dict[str, Any]:
    """What a configuration says of the quantisation; empty where it says nothing."""
    for part in (config, config.get("text_config")):
        for key in _STATED:
            if isinstance(part, dict) and isinstance(stated := part.get(key), dict):
                method = stated.get("quant_method") or ("compressed-tensors" if key == _STATED[1] else "")
                return {**stated, "quant_method": method}
    for file in source.attachments:
        if file.name == posixpath.join(folder, "hf_quant_config.json"):
            return {**_json(file, where), "quant_method": "modelopt"}
    return {}


def _explained(scope: Scope, dropped: set[str]) -> None:
    """SourceError where there are codes beside those of the matrices that were found."""
    for name, t in scope.left():
        large = len(t.shape) > 1 and math.prod(t.shape) >= SMALLEST
        if scope.method and large and t.dtype in _CODES and t.name not in dropped:
            raise scope.wrong(name, f"is not understood as weights of {scope.method!r}; pack it without a budget")


def _dtype(config: Mapping[str, Any]) -> str:
    """The data type of matrices that are made: BF16, or F16 where the configuration says so."""
    text = config.get("text_config")
    every = (part.get(key) for part in (config, text) if isinstance(part, dict) for key in ("dtype", "torch_dtype"))
    return "F16" if next((d for d in every if d), "") == "float16" else "BF16"


def _tensors(
    source: Source, found: Mapping[str, tuple[Logical, Scope, str]], dropped: set[str], dtype: str
) -> Iterator[SourceTensor]:
    """The matrices where their codes were, and what is none."""
    for t in source.tensors:
        if t.name not in found:
            if t.name not in dropped:
                yield t
            continue
        one, _, prefix = found[t.name]
        data = Dequantised(one.rows, "F32" if t.dtype == "F64" else dtype, math.prod(one.shape[:-1]), one.shape[-1])
        extra = {**t.extra, "name": one.name} if t.extra and "name" in t.extra else t.extra
        yield SourceTensor(prefix + one.name, data.dtype, one.shape, data, extra)


def _files(source: Source, tensors: tuple[SourceTensor, ...], where: str) -> Iterator[Attachment]:
    """The files that travel along, rewritten where they describe codes."""
    for file in source.attachments:
        folder, name = posixpath.split(file.name)
        if name in _OTHERS:
            continue
        if name == "config.json" and _stated(config := _json(file, where), source, folder, where):
            parts = {k: _plain(v) for k, v in _plain(config).items()}
            yield Attachment(file.name, json.dumps(parts, indent=2, ensure_ascii=False).encode() + b"\n")
        elif name.endswith(_INDEX):
            yield Attachment(file.name, _index(_json(file, where), folder, tensors))
        else:
            yield file


def _plain(config: Any) -> Any:
    """A part of a configuration without what it says of a quantisation."""
    return {k: v for k, v in config.items() if k not in _STATED} if isinstance(config, dict) else config


def _index(index: dict[str, Any], folder: str, tensors: tuple[SourceTensor, ...]) -> bytes:
    """The index of the files as they are when unpacked."""
    inside = [(t, t.extra or {}) for t in tensors]
    inside = [(t, e) for t, e in inside if posixpath.dirname(e.get("shard", "")) == folder and "name" not in e]
    files = set(index.get("weight_map", {}).values())
    placed = {t.name: posixpath.basename(e["shard"]) for t, e in inside if "shard" in e}
    index["weight_map"] = {name: file for name, file in sorted(placed.items()) if file in files}
    if isinstance(index.get("metadata"), dict):
        index["metadata"]["total_size"] = sum(t.nbytes for t, _ in inside if t.name in index["weight_map"])
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"
