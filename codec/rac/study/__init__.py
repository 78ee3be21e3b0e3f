"""Studies: files against their original, methods against each other, bases of a model."""

import re
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def role(name: str) -> str:
    """The name of a tensor with the numbers of layers and experts left out."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by what `key` says of them, in the order in which they come."""
    out: dict[K, list[T]] = {}
    for item in items:
        out.setdefault(key(item), []).append(item)
    return out
