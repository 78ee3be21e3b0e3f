"""The trellis kernels: the search of the encoder, and the decoder's numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rac.errors import RacError
from rac.native.library import library
from rac.native.prototypes import F32, Array, Columns, Dequant, Quantiser, address

_SIZES = {"F32": 4, "BF16": 2}


def dequant(rec: F32, code: tuple[int, int], zero: int, dtype: str) -> Dequant | None:
    """What words stand for, for `decode` and `TileJob`; None where no kernel is there for the type.

    `rec` (256,) are their magnitudes, which the caller keeps alive; `code` is (H0, H1).
    """
    if library() is None or dtype not in _SIZES:
        return None
    return Dequant(address(rec), *code, zero, _SIZES[dtype])


def decode(words: NDArray[np.uint8], numbers: Dequant, cols: F32, rows: F32, dst: Array) -> None:
    """Words (h, w), contiguous, which stand for `numbers`, to `dst` (h, w), unit column stride."""
    lib = library()
    assert lib is not None  # noqa: S101 - `dequant` asked
    lib.rac_untrellis(words, numbers, cols, rows, dst, np.empty(words.shape[1] + 63, np.uint16))


@dataclass(slots=True)
class Search:
    """How the columns of a tensor are quantised (src/quantise.h)."""

    states: int  # of the trellis, 4 to 1024; 1: none, each number alone
    code: tuple[int, int]  # (H0, H1)
    lane: int  # rows after which the trellis begins anew
    rec: F32  # (2 K + 1,) magnitudes of the integers -K..K
    rate: F32  # (Q, Tr, 2 K + 1) cost of each in squared units, by deviation of the column and class of the row
    far: float  # units from which on a target is an outlier, whose value is the target itself
    fine: NDArray[np.int8] = field(default_factory=lambda: np.zeros(1, np.int8))
    """(Q,) how many quarter octaves finer than its step a column of that deviation is coded; -1: not at all."""
    low: int = 0  # quarter octaves of deviation / step of the first of the Q
    row: NDArray[np.uint8] | None = None  # (m,) class of each row; None: one class
    below: F32 | None = None
    """(m, m), [i, k], k < i: weight of the error of row k in the target of row i, or (G, m / G, m / G): within each
    block; None: rows know nothing of each other. 32 to 256 states, or 1."""
    lag: int = 6  # blocks of 16 rows, 1 to 7, over which every survivor of the search feeds its own errors
    sparse: bool = False  # numbers that are 0 stay 0, and deviations are those of the others; with 1 state only
    _back: F32 | None = field(init=False)

    def __post_init__(self) -> None:
        """Transpose the weights of rows once, not for every block of columns."""
        if self.below is not None and self.states > 256:
            raise ValueError(f"errors of rows are fed back with at most 256 states, not {self.states}")
        self._back = None if self.below is None else np.ascontiguousarray(self.below.swapaxes(-1, -2))

    def _arguments(self) -> Quantiser:
        return Quantiser(
            *(self.states, *self.code, self.low, len(self.fine), len(self.rec) // 2, self.rate.shape[1], self.lag),
            self.lane,
            *map(address, (self.rec, self.rate, self.fine, self.row, self.below, self._back)),
            *(self.far, self.sparse),
        )


class Quantised(NamedTuple):
    """What a block of columns became."""

    integers: NDArray[np.int16]  # (n, m)
    values: F32  # (n, m)
    outliers: NDArray[np.uint8]  # (n, m) whether the value is the target itself
    fine: NDArray[np.int8]  # (n,) `Search.fine` of each column


def block(search: Search, plain: F32, target: F32, feed: F32, step: F32) -> Quantised:
    """Quantise the columns of a block from the last to the first, each fed the errors of those after it.

    Args:
        search: How.
        plain: (n, m) column-major columns.
        target: (n, m) the same with the errors of what is behind the block fed back; overwritten by plain - value.
        feed: (n, n) weight of the error of column i in the target of column j < i, or (G, n, n): of each of G blocks of
            m / G rows.
        step: (n,) size of one unit, as fine as a column of high rate needs; 0: the column is dead.

    Raises:
        RacError: The C kernel is not there.
    """
    lib = library()
    if lib is None:
        raise RacError("lossy packing needs the C kernel, which was not built; reinstall with a C compiler")
    n, m = target.shape
    integers, values = np.empty((n, m), np.int16), np.empty((n, m), np.float32)
    out = Quantised(integers, values, np.empty((n, m), np.uint8), np.empty(n, np.int8))
    arrays = [address(a) for a in (plain, target, feed, step, *out)]
    if lib.rac_quantise(search._arguments(), Columns(n, m, feed.size // (n * n), *arrays)):
        raise MemoryError
    return out
