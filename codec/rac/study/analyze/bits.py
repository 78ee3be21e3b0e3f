"""Bits that a matrix takes in each basis at one error of the outputs, by the coder that packs it.

Every basis is quantised and coded as `rac pack` does it, by a trellis of STATES states; tables and lists of scales are
counted, heads of records and a basis' own matrix are not. The step is looked for until the error is the reference's.
What is left of a difference, at most NEAR decibels where the search succeeds, counts as half a log2 of it, which is
what it takes at high rate; below LOW bits nothing is corrected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from rac.encode.quantise import trellis as lossy
from rac.study.analyze.bases import Basis, exponents
from rac.study.analyze.measures import GAUSSIAN, rms

STATES = 8
NEAR = 0.25  # decibels that the error may be off the reference's
LOW = 1.0
DOUBLE = 10 * math.log10(2)  # decibels of twice the energy
TRIES = 6


@dataclass(frozen=True, slots=True)
class Point:
    """A matrix, quantised and coded."""

    measured: float  # bytes of the units * 8 / weights
    error: float  # tr(E S E^T)
    scale: float  # log2 of the step, in units of which columns of weight 1 are
    off: float = 0.0  # decibels by which the error is above the reference's

    @property
    def bits(self) -> float:
        """Bits at the error of the reference."""
        return self.measured + self.off / DOUBLE / 2 if self.measured >= LOW else self.measured


def at(b: Basis, scale: float) -> Point:
    """Quantise and code with the step 2**scale / weight."""
    cols, middle = exponents(b.weight)
    scales = lossy.Scales(np.zeros(len(b.matrix), np.int8), cols)
    q = lossy.quantise(b.matrix, "F32", scale + middle, scales, lossy.Effort(STATES), b.recursion)
    _, units = q.coded()
    error = q.dense.view(np.float32) - b.matrix
    return Point(8 * sum(len(u) for u in units) / error.size, b.output(error), scale)


def reference(b: Basis, rate: float) -> Point:
    """The first basis at about `rate` bits per weight, those of a Gaussian."""
    size = max(rms(b.coded), 1e-30)
    return at(b, math.log2(size) + GAUSSIAN - 1 - rate)


def equal(b: Basis, ref: Point, first: Basis) -> Point:
    """Basis `b` at the error of `ref`, a point of the basis `first`."""
    if b is first:
        return ref
    scale = ref.scale + 0.5 * math.log2(max(first.cost, 1e-300) / max(b.cost, 1e-300))
    seen: list[tuple[float, float]] = []
    for _ in range(TRIES):
        p = at(b, scale)
        off = math.log2(p.error / ref.error) if p.error > 0 and ref.error > 0 else 0.0
        if abs(off) <= NEAR / DOUBLE:
            break
        seen.append((scale, off))
        slope = 2.0  # of log2 of the error, at high rate
        if len(seen) > 1 and (more := scale - seen[-2][0]):
            slope = min(4.0, max(0.5, (off - seen[-2][1]) / more))
        scale -= off / slope
    return replace(p, off=off * DOUBLE)
