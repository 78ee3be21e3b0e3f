"""Counts of coded symbols to the frequency tables of lanes/1: in one call of a C kernel, or in numpy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.encode.code import classes
from rac.entropy import tables
from rac.stages.lanes.parameters import Lanes, codes, pairs

PAIR_RARE = 45000  # a pair rarer than that costs more as one of 4096 frequency units than as two escapes of 8 bits
ORDERS = range(-2, 2)  # that the tables are tried in
_SAME = np.arange(256, dtype=np.uint8)


@functools.lru_cache(64)
def both(base: int, first_escape: int) -> int:
    """The pair of two first escapes."""
    return int(np.flatnonzero((pairs(base, first_escape, 2) == first_escape).all(1))[0])


def fit(counts: classes.Counts, p: Lanes) -> native.Fitted:
    """Tables for counts (T, symbols); the rarest pairs are two escapes, where the first escape reaches all tops."""
    # an escape has a byte
    rare = p.per == 2 and len(p.escapes) > 0 and max(p.runs) < p.escapes[0] + 256
    of, code = both(p.base, p.first_escape) if rare else -1, codes(p.base, p.first_escape, p.per)
    found = native.fit(counts, code, of, p.first_escaping, PAIR_RARE, classes.FRACTION)
    return _fit(counts, p, of) if found is None else found


def _fit(counts: classes.Counts, p: Lanes, of: int) -> native.Fitted:
    """`native.fit` in numpy."""
    odd: NDArray[Any] = np.zeros(counts.shape, np.bool_)
    if of >= 0:
        odd = (counts > 0) & (counts * PAIR_RARE < counts.sum(1, keepdims=True))
        odd[:, p.first_escaping :] = False
        moved = np.where(odd, counts, 0).sum(1)
        counts = np.where(odd, 0, counts)
        counts[:, of] += moved
    freq = np.stack([tables.normalise(c) for c in counts])
    order, packed = min(((o, tables.to_bytes(freq, o)) for o in ORDERS), key=lambda v: len(v[1]))
    model, escaping = coded(freq, odd if odd.any() else None, p)
    each = classes.log2(np.full(1, 4096)) - classes.log2(freq.astype(np.int64))
    length = int((counts * each).sum())
    return native.Fitted(freq, odd if odd.any() else None, model, escaping, order, packed, length)


def same(p: Lanes, odd: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """(T, 256) coded symbol as which each is coded; pairs that are `odd` (T, symbols) as two first escapes."""
    out = np.tile(_SAME, (p.tables, 1))
    if odd is not None:
        out[:, : p.symbols][odd] = both(p.base, p.first_escape)
    return out


def coded(
    freq: NDArray[np.uint16], odd: NDArray[np.bool_] | None, p: Lanes
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """(T, 256) model and escapes of tables (T, symbols): see src/encode.h."""
    code = codes(p.base, p.first_escape, p.per)
    model, escaping = (np.zeros((p.tables, 256), kind) for kind in (np.uint32, np.uint8))
    escaping[:, code[p.first_escaping :]] = 1
    if odd is not None:
        at, which = np.nonzero(odd)
        escaping[at, code[which]] = 2
    model[:, code] = native.symbol_model(freq, same(p, odd))[:, : p.symbols]
    return model, escaping
