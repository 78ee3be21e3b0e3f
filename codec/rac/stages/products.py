"""Stages that compute with objects: lowrank/1 and basis/1 (format_spec/stages/lowrank.md and basis.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rac.errors import FormatError
from rac.grid import Box
from rac.native import product
from rac.native.prototypes import F32
from rac.stages.base import Product


@dataclass(frozen=True, slots=True)
class LowRank(Product):
    """lowrank/1: the numbers plus a product A B of two thin matrices."""

    id: ClassVar[str] = "lowrank/1"
    behind: ClassVar[tuple[str, ...]] = ("trellis/1",)
    objects: ClassVar[int] = 2
    column: ClassVar[tuple[str, Any]] = ("rank", 0)
    whole_rows: ClassVar[bool] = False

    def check(self, shapes: Sequence[tuple[int, ...]], rows: int, cols: int) -> None:
        """FormatError unless the objects are (rows, r) and (r, cols), r at most the smaller side."""
        r = shapes[0][-1] if shapes[0] else 0
        if not 1 <= r <= min(rows, cols) or list(shapes) != [(rows, r), (r, cols)]:
            raise FormatError(f"objects {list(shapes)} are no product of low rank of {rows} x {cols}")

    def join(self, v: F32, objects: Sequence[F32], box: Box) -> F32:
        """V + A B for the part `box`, in the order of section 3; `v` (h, w) is changed and returned."""
        a, b = objects
        product.add(v, a[box.r0 : box.r1], b[:, box.c0 : box.c1])
        return v

    def factors(self, objects: Sequence[F32]) -> tuple[F32, F32]:
        """The objects."""
        a, b = objects
        return a, b

    def detail(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
        """The rank."""
        return shapes[0][1]


@dataclass(frozen=True, slots=True)
class Basis(Product):
    """basis/1: the numbers times a square matrix U, a basis of the columns."""

    id: ClassVar[str] = "basis/1"
    behind: ClassVar[tuple[str, ...]] = ("trellis/1",)
    objects: ClassVar[int] = 1
    column: ClassVar[tuple[str, Any]] = ("basis", None)
    whole_rows: ClassVar[bool] = True

    def check(self, shapes: Sequence[tuple[int, ...]], rows: int, cols: int) -> None:
        """FormatError unless the object is (cols, cols)."""
        if list(shapes) != [(cols, cols)]:
            raise FormatError(f"object {list(shapes)} is no basis of {cols} columns")

    def join(self, v: F32, objects: Sequence[F32], box: Box) -> F32:
        """V U for the columns of the part `box`, in the order of section 3; `v` is (h, C), the result (h, w)."""
        u = objects[0][:, box.c0 : box.c1]
        out = np.zeros((len(v), u.shape[1]), np.float32)
        product.add(out, v, u)
        return out

    def detail(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
        """The name of the basis."""
        return names[0]
