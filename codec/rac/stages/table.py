"""The stages of the format: one row each (format_spec/registry.md)."""

from __future__ import annotations

from rac.stages.base import Coder, Numbers, Product
from rac.stages.bits import Bits
from rac.stages.groups import Groups
from rac.stages.lanes.parameters import Lanes
from rac.stages.plain import Raw, Zstd
from rac.stages.products import Basis, LowRank
from rac.stages.trellis import Trellis

CODERS: dict[str, type[Coder]] = {"raw/1": Raw, "zstd/1": Zstd, "lanes/1": Lanes, "bits/1": Bits}
NUMBERS: dict[str, type[Numbers]] = {"trellis/1": Trellis, "groups/1": Groups}
PRODUCTS: dict[str, type[Product]] = {"basis/1": Basis, "lowrank/1": LowRank}


def is_quantised(method: str) -> bool:
    """Whether a record whose last stage is `method` restores numbers that are only near those which were packed."""
    return method in NUMBERS or method in PRODUCTS


def is_resident(method: str) -> bool:
    """Whether a weight whose record ends in the stage `method` is worth keeping compressed in memory."""
    return is_quantised(method) or (method in CODERS and CODERS[method].resident)
