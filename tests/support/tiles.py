"""Small tensors in many tiles: the one place where tests reach for how the encoder cuts."""

import pytest

from rac.encode.code import plan

SMALL = ((1, 1 << 7), (3, 1 << 9), (4, 1 << 62))
"""Several tiles from 128 stored bytes on."""


def cut(patch: pytest.MonkeyPatch, cuts: tuple[tuple[int, int], ...] = SMALL) -> None:
    """Cut as `plan.CUTS` says, with other numbers: (tiles along each side, up to which stored size); all levels."""
    for name in ("CUTS", "COARSE"):
        patch.setattr(plan, name, cuts)
