"""Cholesky factors in one order of additions, in C or numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rac.native.library import library

_BLOCK = 64
"""Columns of the kernel's scratch."""


def cholesky(a: NDArray[np.float64], reference: bool = False) -> NDArray[np.float64]:
    """The lower triangular L (n, n) with L L^T = `a`, the same bits on every machine.

    For k = 0, 1, ..., L_kk = sqrt(a_kk), L_ik = a_ik / L_kk, and L_ik L_jk, rounded, is taken off a_ij for k < j <= i.

    Args:
        a: (n, n) float64, symmetric; what is above its diagonal is not read.
        reference: In numpy, whether the kernel is there or not.

    Raises:
        numpy.linalg.LinAlgError: It is not positive definite.
    """
    out, n, bad = np.array(a, np.float64, order="C"), len(a), 0
    lib = None if reference else library()
    if lib is not None:
        scratch = np.empty((_BLOCK, n))
        bad = lib.rac_factor(out, n, scratch)
    else:
        for k in range(n):
            if not out[k, k] > 0:
                bad = k + 1
                break
            out[k, k] = np.sqrt(out[k, k])
            out[k + 1 :, k] /= out[k, k]
            out[k + 1 :, k + 1 :] -= out[k + 1 :, k, None] * out[k + 1 :, k]
    if bad:
        raise np.linalg.LinAlgError("matrix is not positive definite")
    return np.tril(out)
