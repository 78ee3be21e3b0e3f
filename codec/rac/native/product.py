"""Products and Cholesky factors in one order of additions, and numbers to words, in C or numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library
from rac.native.prototypes import F32, Array

_BLOCK = 64  # columns of the kernel's scratch


def add(t: F32, a: F32, b: F32) -> None:
    """t[i, j] += a[i, k] * b[k, j] for k = 0, 1, ..., each product and sum rounded; all have unit column stride."""
    lib = library()
    if lib is not None:
        lib.rac_product(t, a, b)
        return
    with np.errstate(all="ignore"):  # an infinity or a NaN is a result like any other
        for k in range(len(b)):
            t += a[:, k, None] * b[k]


def rounded(v: F32, dtype: str, dst: Array) -> bool:
    """Contiguous numbers to as many words of the data type in `dst`; False where no kernel is there for it."""
    lib = library()
    if lib is None or dtype not in ("F32", "BF16"):
        return False
    lib.rac_round(v, v.size, dst, dst.itemsize)
    return True


def factor(a: NDArray[np.float64]) -> None:
    """The lower triangle of `a` (n, n), C-contiguous, to the L of `cholesky`, in its place; what is above is undefined.

    numpy.linalg.LinAlgError where it is not positive definite, and `a` is undefined then.
    """
    n, bad = len(a), 0
    lib = library()
    if lib is not None:
        bad = lib.rac_factor(a, n, np.empty((_BLOCK, n)))
    else:
        for k in range(n):
            if not a[k, k] > 0:
                bad = k + 1
                break
            a[k, k] = np.sqrt(a[k, k])
            a[k + 1 :, k] /= a[k, k]
            a[k + 1 :, k + 1 :] -= a[k + 1 :, k, None] * a[k + 1 :, k]
    if bad:
        raise np.linalg.LinAlgError("matrix is not positive definite")


def cholesky(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """The lower triangular L (n, n) with L L^T = `a` (n, n), the same bits on every machine.

    For k = 0, 1, ..., L_kk = sqrt(a_kk), L_ik = a_ik / L_kk, and L_ik L_jk, rounded, is taken off a_ij for k < j <= i.
    What is above the diagonal of `a` is not read. numpy.linalg.LinAlgError where it is not positive definite.
    """
    out = np.array(a, np.float64, order="C")
    factor(out)
    return np.tril(out)
