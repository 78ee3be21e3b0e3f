"""Quantised sources as what a pack to a budget takes: one tensor from codes, scales and what else there is.

A lossless pack takes the stored tensors as they are. A pack to a budget reads a source through `logical`, which makes
the numbers whenever they are read (rac.dequantise) and keeps them nowhere.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rac import dequantise
from rac.dequantise import Dequantised, Logical
from rac.encode.sources import gguf
from rac.encode.sources.model import Attachment, Source, SourceTensor
from rac.encode.sources.safetensors import parse_json
from rac.errors import SourceError

_OTHERS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # of modelopt, GPTQ and AWQ
_INDEX = ".safetensors.index.json"


def logical(source: Source, where: str) -> Source:
    """The source with one tensor for each matrix, whatever it is stored as; the same where all are plain already.

    config.json no longer states a quantisation then, and the index lists the tensors that are there. SourceError where
    the configuration names an unknown method, a part of a matrix is missing, or codes are left that nothing explains.
    """
    if source.kind == "gguf":
        return gguf.numbers(source, where)
    configs = {posixpath.dirname(a.name): a for a in source.attachments if posixpath.basename(a.name) == "config.json"}
    found: dict[str, tuple[Logical, str]] = {}  # by the archive's name of the codes, with a prefix of its new name
    dropped: set[str] = set()
    for (folder, prefix), tensors in _places(source).items():
        config = _json(configs[folder], where) if folder in configs else {}
        try:
            matrices, gone = dequantise.find(tensors, _stated(config, source, folder, where), where)
        except SourceError as e:
            raise SourceError(f"{e.message}; without a budget it is packed as it is", file=e.file) from e
        matrices += dequantise.wide({n: t for n, t in tensors.items() if n not in gone})
        found |= {tensors[one.parts[0]].name: (one, prefix) for one in matrices}
        dropped |= {tensors[name].name for name in gone}
    if not found:
        return source
    dtype = dequantise.dtype_of(_json(configs[""], where) if "" in configs else {})
    made = tuple(_tensors(source, found, dropped, dtype))
    schemes = tuple(sorted({one.scheme for one, _ in found.values()}))
    sums = {file: digest for file, digest in source.sha256.items() if file not in source.headers}
    files = tuple(_files(source, made, where))
    return replace(source, tensors=made, attachments=files, headers={}, sha256=sums, dequantised=schemes)


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
    if stated := dequantise.stated_in(config):
        return stated
    for file in source.attachments:
        if file.name == posixpath.join(folder, "hf_quant_config.json"):
            return {**_json(file, where), "quant_method": "modelopt"}
    return {}


def _tensors(
    source: Source, found: Mapping[str, tuple[Logical, str]], dropped: set[str], dtype: str
) -> Iterator[SourceTensor]:
    """The matrices where their codes were, and what is none."""
    for t in source.tensors:
        if t.name not in found:
            if t.name not in dropped:
                yield t
            continue
        one, prefix = found[t.name]
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
            text = json.dumps(dequantise.plain(config), indent=2, ensure_ascii=False)
            yield Attachment(file.name, text.encode() + b"\n")
        elif name.endswith(_INDEX):
            yield Attachment(file.name, _index(_json(file, where), folder, tensors))
        else:
            yield file


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
