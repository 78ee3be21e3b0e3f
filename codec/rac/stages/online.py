"""What a tensor record states of its layer's input, checked (format_spec/stages/online.md)."""

from __future__ import annotations

from collections.abc import Callable

from rac.container import index
from rac.errors import FormatError, UnsupportedError
from rac.linalg import hadamard
from rac.records import Online
from rac.registry import ONLINE
from rac.stages.base import Head

DTYPES = ("F64", "F32", "F16", "BF16")


def parse(
    value: Head, dtype: str, shape: tuple[int, ...], shape_of: Callable[[str], tuple[int, ...] | None], at: int
) -> Online:
    """The map `online` of a tensor of `shape` at `at`; `shape_of` an object that stands before it, None: there is none.

    UnsupportedError where the kind or a key of it is not known, FormatError where anything else is wrong.
    """
    kind = value.get("id")
    if not isinstance(kind, str) or kind not in ONLINE:
        raise UnsupportedError(f"online transform {kind!r} is not known to this version", offset=at)
    if missing := ONLINE[kind] - value.keys():
        raise FormatError(f"online transform lacks {min(missing)!r}", offset=at)
    if unknown := value.keys() - ONLINE[kind]:
        raise UnsupportedError(f"online transform has the unknown key {min(unknown)!r}", offset=at)
    if dtype not in DTYPES or len(shape) != 2 or 0 in shape:
        raise FormatError(f"{dtype} {list(shape)} is no weight that has an input", offset=at)
    name, size, seed, inner = value.get("object", ""), value.get("size", 0), value.get("seed"), value["inner"]
    if not isinstance(name, str) or not index.is_count(inner) or not index.is_count(size):
        raise FormatError("online transform is malformed", offset=at)
    if seed is not None and not index.is_count(seed):
        raise FormatError("seed of an online transform is malformed", offset=at)
    if kind == "matrix/1":
        found = shape_of(name)
        if found is None:
            raise FormatError(f"object {name!r}, which the tensor's input needs, does not stand before it", offset=at)
        if len(found) != 2 or found[0] != found[1]:  # the index may claim any shape
            raise FormatError(f"object {list(found)} is no square matrix", offset=at)
        size = found[0]
    if inner < 1 or size < 1 or shape[1] % (size * inner):
        raise FormatError(f"online transform of {size} x {inner} does not divide {shape[1]} columns", offset=at)
    if kind == "hadamard/1":
        try:
            hadamard.order(size)
        except ValueError as e:
            raise FormatError(f"online transform: {e}", offset=at) from e
    return Online(kind, size, inner, seed, name)
