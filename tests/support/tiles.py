"""Small tensors in many tiles."""

import pytest

from rac.encode.code import plan

SMALL = ((1, 1 << 7), (3, 1 << 9), (4, 1 << 62))
"""Several tiles from 128 stored bytes on."""


def cut(patch: pytest.MonkeyPatch, cuts: tuple[tuple[int, int], ...] = SMALL) -> None:
    """Cut by other rows of the table `plan.CUTS`: (tiles along each side, up to which stored size)."""
    for kind in plan.CUTS:
        patch.setitem(plan.CUTS, kind, cuts)
