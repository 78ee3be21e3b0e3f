"""Which matrices are tables: embeddings, with rows that are looked up by number, and output layers, a row a token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from rac.encode.sources.model import Attachment, SourceTensor

NAMED = ("*embed*", "*embd*", "*wte*", "*wpe*", "shared", "*lm_head*")
"""What a module is called that is a table."""
LAYERS = ("*proj*", "*patch*", "*time*", "*mapping*", "*_embedder")
"""What a module is called whose name says embedding too, and that is a linear layer or a convolution."""
WHOLE = ("head.weight", "output.weight", "*lm_head.decoder.weight", "*predictions.decoder.weight")
"""Tables by all of their name."""
MANY = 4  # matrices with as many rows as there are tokens, of one model, beyond which that is a coincidence
LARGEST = 1 << 20  # bytes of a configuration that is read


def by_name(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a table by the last word of its name (numbers are none), and by its shape: no convolution."""
    name = name.rpartition("::")[2]
    words = [word for word in name.split(".") if not word.isdecimal()] or [name]
    last = words[-2] if words[-1] == "weight" and len(words) > 1 else words[-1]
    named = any(fnmatchcase(last, p) for p in NAMED) and not any(fnmatchcase(last, p) for p in LAYERS)
    return any(fnmatchcase(name, p) for p in WHOLE) or (
        named and (len(shape) <= 2 or (len(shape) == 3 and shape[0] == 1))
    )


def is_table(t: SourceTensor) -> bool:
    """Whether a tensor is a table: as its model's configuration says, otherwise by its name."""
    return by_name(t.name, t.shape) if t.table is None else t.table


def marked(tensors: Sequence[SourceTensor], files: Sequence[Attachment]) -> tuple[SourceTensor, ...]:
    """The tensors of a folder, marked where one has a row for each token that a config.json of its files counts.

    Numbers that a configuration states for something else too say nothing, nor do those of many matrices.
    """
    sizes: set[int] = set()
    for file in files:
        if file.name.rpartition("/")[2] == "config.json" and _size(file) <= LARGEST:
            sizes |= _tokens(file.read())
    out = list(tensors)
    for n in sizes:
        mine = [i for i, t in enumerate(out) if len(t.shape) == 2 and t.shape[0] == n and not by_name(t.name, t.shape)]
        for i in mine if len(mine) <= MANY else ():
            out[i] = replace(out[i], table=True)
    return tuple(out)


def _size(file: Attachment) -> int:
    return len(file.data) if isinstance(file.data, bytes) else file.data.size


def _tokens(config: bytes) -> set[int]:
    """Sizes of vocabularies that a configuration states, and that nothing else in it has."""
    try:
        found = list(_numbers(json.loads(config)))
    except (ValueError, RecursionError):
        return set()
    return {n for key, n in found if "vocab_size" in key} - {n for key, n in found if "vocab" not in key}


def _numbers(of: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers under keys, at any depth."""
    if isinstance(of, dict):
        for key, value in of.items():
            if isinstance(value, int) and not isinstance(value, bool):
                yield key, value
            else:
                yield from _numbers(value)
