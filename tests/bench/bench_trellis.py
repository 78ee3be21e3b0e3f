"""The trellis alone on Gaussian samples: `python tests/bench/bench_trellis.py`.

For each number of states, step and lambda (what a bit is worth in squared units): entropy of the integers, distance
from the rate-distortion bound, and ns per sample of the search, one thread. No coder: an ideal one is assumed.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

from rac.native import trellis as native
from rac.stages import trellis as tr

COLUMNS, ROWS, MOST = 256, 4096, 60


def search(x: NDArray[np.float32], states: int, step: float, slope: float) -> tuple[float, float, float]:
    """(bits, squared error, ns per sample) after four rounds of search and counting."""
    rec = tr.magnitudes(states, 128)[128 - MOST : 129 + MOST].copy()
    p = np.exp(-0.5 * (rec.astype(np.float64) * step) ** 2) + 1e-9
    p /= p.sum()
    for _ in range(4):
        rate = (-slope * np.log2(p)).astype(np.float32).reshape(1, 1, -1)
        search = native.Search(states, tr.CODES[states], ROWS, rec, rate, 2.0 * MOST)
        steps = np.full(COLUMNS, step, np.float32)
        start = time.perf_counter()
        k, value, *_ = native.block(search, x, x.copy(), np.zeros((COLUMNS, COLUMNS), np.float32), steps)
        seconds = time.perf_counter() - start
        n = np.bincount((k + MOST).ravel(), minlength=2 * MOST + 1)
        p = (n + 0.02) / (n + 0.02).sum()
    share = n[n > 0] / x.size
    return -float((share * np.log2(share)).sum()), float(((x - value) ** 2).mean()), 1e9 * seconds / x.size


def main() -> None:
    """Print the table."""
    x = np.random.default_rng(0).standard_normal((COLUMNS, ROWS), np.float32)
    variance = float(x.var(dtype=np.float64))
    print("| states | step | lambda | bits | distance from R(D) | ns per sample |")
    print("|---:|---:|---:|---:|---:|---:|")
    for states in (4, 8, 32, 256, 512, 1024):
        for step in (0.25, 0.5, 0.9):
            for slope in (0.2, 0.35, 0.5):
                bits, error, ns = search(x, states, step, slope)
                gap = bits - 0.5 * math.log2(variance / error)
                print(f"| {states} | {step} | {slope} | {bits:.3f} | {gap:.4f} | {ns:.0f} |")


if __name__ == "__main__":
    main()
