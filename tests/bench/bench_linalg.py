"""What the same bytes on any machine cost: a pass of quantising with our kernels and with BLAS and LAPACK, in turn.

    OPENBLAS_NUM_THREADS=1 PYTHONPATH=codec python tests/bench/bench_linalg.py [STATES] [ROUNDS]

Matrices of the shapes of SmolLM2 135M, with second moments of their own; seconds of the processor, the median of the
rounds' ratios.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.encode.align.recipe import exponents
from rac.encode.quantise import trellis as lossy
from rac.linalg import triangular as tri
from rac.native import product

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))
Kernels = tuple[Callable[..., None], Callable[..., Any]]
OURS: Kernels = product.add, product.cholesky


def by_blas(t: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> None:
    t += a @ b


def moment(cols: int, seed: int) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).standard_normal((2 * cols, cols)) * np.geomspace(1, 30, cols)
    return np.asarray(x.T @ x / len(x), np.float32)


def seconds(kernels: Kernels, w: NDArray[np.float32], second: NDArray[np.float32], states: int) -> NDArray[np.float64]:
    """(of the factor, of everything)"""
    vars(product)["add"], vars(tri)["cholesky"] = kernels
    start = time.process_time()
    t = tri.triangular(second, 0.03)
    factor = time.process_time() - start
    scales = lossy.Scales(np.zeros(len(w), np.int8), exponents(t.by_column))
    lossy.quantise(w, "BF16", -4.0, scales, lossy.Effort(states), t)
    return np.array([factor, time.process_time() - start])


def main(states: int = 32, rounds: int = 5) -> None:
    print(f"{states} states; factor and whole pass, seconds of the processor: ours, BLAS and LAPACK, ratio")
    for rows, cols in SHAPES:
        w = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
        second = moment(cols, 1)
        seconds(OURS, w, second, states)  # the tables of rates are made once
        found = []
        for i in range(rounds):
            turn: tuple[Kernels, ...] = (OURS, (by_blas, np.linalg.cholesky))
            both = [seconds(k, w, second, states) for k in turn[:: 1 if i % 2 else -1]]
            found.append(both if i % 2 else both[::-1])
        ours, blas = np.median(found, 0)
        ratio = np.median([a[1] / b[1] for a, b in found])
        print(f"{rows} x {cols}: {ours[0]:.3f} {ours[1]:.3f}, {blas[0]:.3f} {blas[1]:.3f}, {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
