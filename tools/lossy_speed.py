"""Speed of the lossy kernels under each instruction set: loading a lossy pack, its numbers alone, and the search.

    rac pack SMOLLM2 -o 3bit.rac --bits 3 --calibrate none
    python tools/lossy_speed.py load 3bit.rac       # weights per second of rac.load_file, for 1 and 2 threads
    python tools/lossy_speed.py numbers             # of the trellis of the decoder, one thread
    python tools/lossy_speed.py search              # ns per weight of the search of the encoder, one thread
    python tools/lossy_speed.py product             # multiplications and additions per second of the exact product

The best of several runs, under every set that this machine has or those named by --cpu. Only ratios mean much: machines
differ.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

import rac
from rac import native
from rac.native import product
from rac.native import trellis as kernel
from rac.stages import trellis as tr

MOST, LAG = 60, 6


def best(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest run of as many as fit into `seconds`, three at least."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def load(path: str, cpus: list[str], threads: list[int], framework: str, seconds: float) -> None:
    """Loading a whole file."""
    weights = sum(math.prod(a.shape) for a in rac.load_file(path, framework=framework).values())
    print(f"| {path}, {weights / 1e6:.1f} M weights | threads | M weights/s |\n| --- | ---: | ---: |")
    for cpu in cpus:
        for n in threads:
            with native.using(cpu):
                took = best(partial(rac.load_file, path, framework=framework, threads=n), seconds)
            print(f"| {cpu} | {n} | {weights / took / 1e6:.0f} |", flush=True)


def numbers(cpus: list[str], seconds: float) -> None:
    """Words of a tile to numbers."""
    rng = np.random.default_rng(0)
    rows, cols = 1024, 512
    words = np.clip(np.rint(rng.normal(128, 1.5, (rows, cols))), 116, 140).astype(np.uint8)
    by_row, by_col = (rng.uniform(0.5, 2, n).astype(np.float32) for n in (rows, cols))
    even = tr.magnitudes(256, 128)
    others = even.copy()
    others[112:144] += rng.integers(-9, 9, 32).astype(np.float32) / 64
    print("| numbers | magnitudes | to | M weights/s |\n| --- | --- | --- | ---: |")
    for cpu in cpus:
        for name, rec, states in (("even", even, 256), ("corrected", others, 256), ("even, 1024 states", even, 1024)):
            for dtype, word in (("BF16", np.uint16), ("F32", np.uint32)):
                dst = np.empty((rows, cols), word)
                with native.using(cpu):
                    how = kernel.dequant(rec, tr.CODES[states], 128, dtype)
                    if how is None:
                        raise SystemExit("there is no kernel for these numbers")
                    took = best(partial(kernel.decode, words, how, by_col, by_row, dst), seconds)
                print(f"| {cpu} | {name} | {dtype} | {words.size / took / 1e6:.0f} |", flush=True)


def rounds(states: int, shaped: bool, x: NDArray[np.float32]) -> Callable[[], object]:
    """A search of the columns x (n, m)."""
    n, m = x.shape
    rec = tr.magnitudes(states, 128)[128 - MOST : 129 + MOST].copy()
    rate = (0.35 * 0.7213 * (rec / 4.0) ** 2).astype(np.float32).reshape(1, 1, -1)
    below = None
    if shaped:
        below = np.tril(np.random.default_rng(1).standard_normal((m, m)) / m, -1).astype(np.float32)
    how = kernel.Search(states, tr.CODES[states], m, rec, rate, 2.0 * MOST, below=below, lag=LAG)
    feed, step = np.zeros((n, n), np.float32), np.ones(n, np.float32)
    return lambda: kernel.block(how, x, x.copy(), feed, step)


def search(cpus: list[str], seconds: float) -> None:
    """The search of the encoder, without and with errors of rows that are fed to later rows."""
    x = (4 * np.random.default_rng(0).standard_normal((16, 1024))).astype(np.float32)
    print("| search | states | shaped | ns per weight |\n| --- | ---: | --- | ---: |")
    for states in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
        for shaped in (False, True)[: 1 + (32 <= states <= 256)]:
            for cpu in cpus:
                with native.using(cpu):
                    took = best(rounds(states, shaped, x), seconds)
                print(f"| {cpu} | {states} | {'yes' if shaped else 'no'} | {1e9 * took / x.size:.1f} |", flush=True)


def products(cpus: list[str], seconds: float) -> None:
    """Exact products and Cholesky factors."""
    rng = np.random.default_rng(0)
    n = 384
    a, b = (rng.standard_normal((n, n), np.float32) for _ in range(2))
    m = a.astype(np.float64) @ a.T + n * np.eye(n)
    print("| product | of | G/s |\n| --- | --- | ---: |")
    for cpu in cpus:
        with native.using(cpu):
            took = best(lambda: product.add(np.zeros((n, n), np.float32), a, b), seconds)
            print(f"| {cpu} | float32 | {n**3 / took / 1e9:.2f} |", flush=True)
            took = best(lambda: product.cholesky(m), seconds)
            print(f"| {cpu} | factor of float64 | {n**3 / 6 / took / 1e9:.2f} |", flush=True)


def main() -> None:
    """Print one table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["load", "numbers", "search", "product"])
    p.add_argument("file", nargs="?", help="a lossy pack, for `load`")
    p.add_argument("--cpu", action="append", choices=native.cpus(), help="again for each; all")
    p.add_argument("--threads", action="append", type=int, help="again for each; 1 and 2")
    p.add_argument("--framework", default="np", choices=["np", "pt"])
    p.add_argument("--seconds", type=float, default=0.3, help="of measuring, for each row")
    args = p.parse_args()
    cpus = args.cpu or list(native.cpus())
    if args.what == "load":
        if not args.file:
            p.error("load needs a file")
        load(args.file, cpus, args.threads or [1, 2], args.framework, args.seconds)
    else:
        {"numbers": numbers, "search": search, "product": products}[args.what](cpus, args.seconds)


if __name__ == "__main__":
    main()
