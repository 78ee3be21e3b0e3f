"""The trellis kernels through ctypes: the search of the encoder, and the decoder's numbers."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.errors import RacError

Array = NDArray[Any]
_n = ctypes.c_int64
_i = ctypes.c_int
_p = native._p


_SIZES = {"F32": 4, "BF16": 2}


def dequant(rec: NDArray[np.float32], even: bool, code: tuple[int, int], zero: int, dtype: str) -> bytes:
    """What the words of a tensor stand for, for `decode` and `native.job`; empty where no kernel is for the type.

    Args:
        rec: (256,) magnitude of each word; the caller keeps it alive.
        even: Whether it goes in equal steps.
        code: (H0, H1).
        zero: The word that stands for 0.
        dtype: Of the elements.
    """
    if native.library() is None or dtype not in _SIZES:
        return b""
    return native.DEQUANT.pack(native.address(rec), *code, zero, even, _SIZES[dtype])


def decode(
    words: NDArray[np.uint8], numbers: bytes, cols: NDArray[np.float32], rows: NDArray[np.float32], dst: Array
) -> None:
    """Words (h, w), which stand for `numbers` (`dequant`, not empty), to `dst` (h, w), unit column stride."""
    lib = native.library()
    assert lib is not None  # noqa: S101 - the caller asked
    h, w = words.shape
    states = np.empty(w + 31, np.uint16)
    lib.rac_untrellis(
        _p(words), _n(h), _n(w), numbers, _p(cols), _p(rows), _p(dst), _n(dst.strides[0] // dst.itemsize), _p(states)
    )


def block(
    states: int,
    code: tuple[int, int],
    plain: NDArray[np.float32],
    target: NDArray[np.float32],
    lane: int,
    feed: NDArray[np.float32],
    step: NDArray[np.float32],
    rec: NDArray[np.float32],
    rate: NDArray[np.float32],
    fine: NDArray[np.int8],
    low: int,
    row: NDArray[np.uint8] | None,
    far: float,
    below: NDArray[np.float32] | None = None,
    back: NDArray[np.float32] | None = None,
    lag: int = 6,
    no512: bool = False,
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.uint8], NDArray[np.int8]]:
    """Quantise the columns of a block from the last to the first, each fed the errors of those after it.

    Args:
        states: Of the trellis, 4 to 256, or 1: none, each number alone.
        code: (H0, H1).
        plain: (n, m) column-major columns.
        target: (n, m) the same with the errors of what is behind the block fed back; overwritten by plain - value.
        lane: Rows after which the trellis begins anew.
        feed: (n, n) weight of the error of column i in the target of column j < i, or (G, n, n): of each of G blocks of
            m / G rows.
        step: (n,) size of one unit, as fine as a column of high rate needs; 0: the column is dead.
        rec: (2 K + 1,) magnitudes of the integers -K..K.
        rate: (Q, Tr, 2 K + 1) cost of each in squared units, by deviation of the column and class of the row.
        fine: (Q,) how many quarter octaves finer than `step` a column of that deviation is coded; below 0: not at all.
        low: Quarter octaves of deviation / step of the first of the Q.
        row: (m,) class of each row, or None for one class.
        far: Units from which on a target is an outlier, whose value is the target itself.
        below: (m, m), [i, k], k < i: weight of the error of row k in the target of row i, or (G, m / G, m / G): within
            each block; None: rows know nothing of each other. 32 states and more.
        back: Its transpose, or transposes.
        lag: Blocks of 16 rows, 1 to 7, over which every survivor of the search feeds its own errors.
        no512: Run the code for machines without AVX-512, which gives the same.

    Returns:
        (integers (n, m), values (n, m), outliers (n, m), `fine` of each column).

    Raises:
        RacError: The C kernel is not there.
    """
    lib = native.library()
    if lib is None:
        raise RacError("lossy packing needs the C kernel, which was not built; reinstall with a C compiler")
    n, m = target.shape
    groups = 1 if feed.ndim == 2 else len(feed)
    out, recon, wild = np.empty((n, m), np.int16), np.empty((n, m), np.float32), np.empty((n, m), np.uint8)
    fine_of = np.empty(n, np.int8)
    bad = lib.rac_trellis_block(
        _i(states),
        _i(code[0]),
        _i(code[1]),
        _p(plain),
        _p(target),
        _n(n),
        _n(m),
        _n(lane),
        _p(feed),
        _p(step),
        _p(rec),
        _p(rate),
        _p(fine),
        _i(low),
        _i(len(fine)),
        _p(row),
        _n(rate.shape[1]),
        _i(len(rec) // 2),
        ctypes.c_float(far),
        _p(out),
        _p(recon),
        _p(wild),
        _p(fine_of),
        _p(below),
        _p(back),
        _n(groups),
        _i(lag),
        _i(no512),
    )
    if bad:
        raise MemoryError
    return out, recon, wild, fine_of
