"""What encodes each coder of the format: one row each, in the order in which they are asked for proposals."""

from __future__ import annotations

from rac.encode.code.lanes import LanesEncoder
from rac.encode.code.plain import BitsEncoder, RawEncoder, ZstdEncoder
from rac.encode.code.plan import Encoder, Level, Source, View

ENCODERS: dict[str, type[Encoder]] = {
    "raw/1": RawEncoder,
    "lanes/1": LanesEncoder,
    "zstd/1": ZstdEncoder,
    "bits/1": BitsEncoder,
}


def analyse(source: Source, dtype: str, shape: tuple[int, ...], level: Level) -> Encoder:
    """The encoder with the smallest proposal: each sees the best so far; an empty tensor is stored by the first."""
    return proposed(source, dtype, shape, level)[0]


def proposed(source: Source, dtype: str, shape: tuple[int, ...], level: Level) -> tuple[Encoder, int]:
    """That encoder, and the bytes that it would take, about; small tensors are stored by the first at some levels."""
    view = View(source, dtype, shape, level)
    best: Encoder | None = None
    size = 0
    for kind in ENCODERS.values():
        if best is not None and view.size <= level.plain:
            break
        if found := kind.propose(view, size):
            best, size = found
    assert best is not None  # noqa: S101 - the first always proposes
    return best, size
