"""Speed of the kernels of lanes/1 alone, on made-up weights: `python tests/bench/bench_kernels.py`.

Prints Msym/s (coded symbols; decoding is that of a whole tile to BF16 words) for each number of lanes and of weights
per symbol, against constriction's own coder, one lane, in the same run. Only ratios mean anything: machines differ,
and neighbours interfere.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rac import native
from rac.entropy import tables
from rac.entropy.ans import Models

STEPS = 1 << 20
REPEAT = 7


def best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of REPEAT runs."""
    times = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def exponents(n: int) -> NDArray[np.uint8]:
    """(n,) how far the exponents of Gaussian weights lie below the largest, at most 15."""
    w = np.abs(np.random.default_rng(0).standard_normal(n, np.float32)) + np.float32(1e-9)
    e = np.frexp(w)[1].astype(np.int64)
    out: NDArray[np.uint8] = np.minimum(e.max() - e, 15).astype(np.uint8)
    return out


def row(per: int, name: object, words: int, encode: Callable[[], object], decode: Callable[[], object]) -> None:
    """Measure, and print a line."""
    packed, unpacked = (STEPS / best(run) / 1e6 for run in (encode, decode))
    print(f"| {per} | {name} | {32 * words / (STEPS * per):.3f} | {packed:.0f} | {unpacked:.0f} |", end=" ")
    print(f"{2 * per * unpacked:.0f} |" if isinstance(name, int) else "|")


def lanes_row(per: int, lanes: int, base: NDArray[np.uint8], sym: NDArray[np.uint8], freq: NDArray[np.uint16]) -> None:
    """The C kernels: symbols to lanes, and a tile of one row to BF16 words."""
    same = np.arange(256, dtype=np.uint8)[None]
    model, luts = native.symbol_model(freq, same), native.lookup(freq, same[0])
    segments = np.array([[STEPS, 0]], np.int64)
    coded = native.encode_lanes(sym, lanes, segments, model)
    assert coded is not None, "the C kernel was not built"
    words, counts = coded
    mantissa = np.random.default_rng(1).integers(0, 256, STEPS * per, np.uint8).tobytes()
    parts = (bytes(4) + counts.tobytes(), words.tobytes(), mantissa)
    unit = np.frombuffer(b"".join(p + bytes(-len(p) % 16) for p in parts), np.uint8)
    values, bases, table = np.zeros(256, np.uint16), np.zeros(256, np.uint32), np.zeros(1, np.uint8)
    values[:16] = 120 - np.arange(16)
    arrays = (native.address(a) for a in (luts, values, bases, table))
    shared = native.TileShared(*arrays, 1, 1, 0, lanes, per, 2, 0, 1, 7, 8, 16, 16, 256)
    n, dst = STEPS * per, np.empty((1, STEPS * per), np.uint16)
    at, to = native.address(unit), native.address(dst)
    job = native.TileJob(at, len(unit), 0, 0, to, 1, n, n, ctypes.addressof(shared))
    span = native.TileSpan(job, 0, 0, 1, 1, n, 2)
    assert native.decode_spans([span]) is None
    assert ((dst[0] >> 7 & 255) == values[base]).all()
    row(
        per,
        lanes,
        len(words),
        lambda: native.encode_lanes(sym, lanes, segments, model),
        lambda: native.decode_spans([span]),
    )


def main() -> None:
    """Print the table."""
    print(f"kernel: {native.kernel()}; {STEPS} symbols of one table, one thread\n")
    print("| weights per symbol | lanes | bits per weight | encode Msym/s | decode Msym/s | decode MB/s of BF16 |")
    print("|---:|---:|---:|---:|---:|---:|")
    for per in (1, 2):
        base = exponents(STEPS * per)
        sym = base if per == 1 else base[::2] | base[1::2] << np.uint8(4)
        freq = tables.normalise(np.bincount(sym, minlength=256))[None]
        for lanes in (4, 8, 16, 32, 64):
            lanes_row(per, lanes, base, sym, freq)
        coder = Models(freq)
        places = coder.index[0][sym].astype(np.int32)
        stream = coder.encode(places, [(STEPS, 0)])
        row(
            per,
            "constriction",
            len(stream),
            partial(coder.encode, places, [(STEPS, 0)]),
            partial(coder.decode, stream, [(STEPS, 0)]),
        )


if __name__ == "__main__":
    main()
