"""What a lossy pack costs for each weight on this machine, and what follows for large models.

Times every stage alone, single thread, on BF16 Gaussian matrices of N x N with the second moment of random inputs, and
prints the rates, and from those of the largest N the core hours, memory and disk of three models (large_models.py).
docs/scaling.md holds what it printed.

  python tools/scaling.py                      1024, 2048 and 4096
  python tools/scaling.py --shape 8192x28672   one matrix of so many outputs and inputs through the whole encoder, its
                                               second moment and weights in files: seconds and memory (Linux)
  python tools/scaling.py --measured one.json --check four.json
                                               the same from a pack that tools/lossy_at_scale.py has made, and what
                                               it says of another one beside what that took
"""

from __future__ import annotations

import os

for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import tracemalloc  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

import large_models  # noqa: E402
from large_models import CALIBRATION, HOUR, MODELS, PASSES, Costs, table  # noqa: E402
from rac.calibrate.layers import Layer  # noqa: E402
from rac.encode import record as rec  # noqa: E402
from rac.encode.align.recipe import Recipe, calibrated  # noqa: E402
from rac.encode.code.plan import LEVELS  # noqa: E402
from rac.encode.quantise import trellis as lossy  # noqa: E402
from rac.encode.quantise.tensor import SHAPED, encode_with_words  # noqa: E402
from rac.encode.quantise.tensor import measure as measured  # noqa: E402
from rac.encode.sources import Extent, SourceTensor  # noqa: E402
from rac.encode.ties import Group  # noqa: E402
from rac.linalg.factors import Factors  # noqa: E402
from rac.linalg.triangular import Triangular, triangular  # noqa: E402
from rac.native import product  # noqa: E402
from rac.native import trellis as native  # noqa: E402
from rac.quantize import MOST, magnitudes  # noqa: E402
from rac.stages import trellis as tr  # noqa: E402
from rac.stages.words import from_words, to_words  # noqa: E402

F32 = np.float32
TOKENS = 1024
"""Inputs that the products are timed on."""
STATES = 256


@dataclass(frozen=True)
class Rates:
    """Nanoseconds."""

    n: int
    forward: float
    """For each token and weight."""
    moment: float
    """For each token and n^2."""
    cholesky: float
    """For each n^3."""
    feedback: float
    """For each of the m n^2 / 2 multiply-adds."""
    search: float
    """For each weight, as the rest."""
    below: float
    """Of the search with row feedback beyond one without."""
    coding: float
    restore: float


def seconds(work: Callable[[], Any], repeat: int = 1) -> float:
    """Of the fastest of some runs."""
    took = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took)


def inputs(n: int) -> NDArray[np.float32]:
    """(TOKENS, n) Gaussian inputs of different deviations."""
    rng = np.random.default_rng(n)
    return rng.standard_normal((TOKENS, n), F32) * np.exp(rng.standard_normal(n) / 2).astype(F32)


def bf16(n: int) -> NDArray[np.float32]:
    """(n, n) Gaussian numbers of BF16."""
    return from_words(to_words(np.random.default_rng(0).standard_normal((n, n), F32), "BF16"), "BF16")


def quantise(w: NDArray[np.float32], recursion: Triangular | None = None) -> lossy.Quantised:
    """About 3 bits for each weight."""
    scales = lossy.Scales(np.zeros(len(w), np.int8), np.zeros(w.shape[1], np.int8))
    return lossy.quantise(w, "BF16", -2.0, scales, lossy.Effort(STATES), recursion)


def feed_back(feed: NDArray[np.float32], error: NDArray[np.float32]) -> None:
    """The products between blocks of columns."""
    for b in range(len(feed), lossy.BLOCK, -lossy.BLOCK):
        a, target = b - lossy.BLOCK, np.zeros((lossy.BLOCK, error.shape[1]), F32)
        product.add(target, np.ascontiguousarray(feed[a:b, b:]), error[b:])


def search_rows(columns: NDArray[np.float32], below: NDArray[np.float32] | None) -> None:
    """The search of some columns, with the errors of rows fed to later rows."""
    n, m = columns.shape
    states = STATES if below is None else SHAPED
    rate = (0.35 * np.abs(np.arange(-MOST, MOST + 1.0))).astype(F32).reshape(1, 1, -1)
    how = native.Search(states, tr.CODES[states], m, magnitudes(states), rate, 2.0 * MOST, below=below)
    native.block(how, columns, columns.copy(), np.zeros((n, n), F32), np.full(n, 0.25, F32))


def code(q: lossy.Quantised) -> int:
    """Bytes of the tiles."""
    return sum(map(len, rec.coded(q.words, LEVELS["default"])[1]))


def measure(n: int) -> Rates:
    """The rates at one size."""
    x, w = inputs(n), bf16(n)
    torch.set_num_threads(1)
    tx, tw = torch.from_numpy(x), torch.from_numpy(w)
    forward = seconds(lambda: tx @ tw.T, 3)  # which runs the model; the moments are numpy's
    moment = seconds(lambda: x.T @ x, 3)
    second = x.T @ x / F32(TOKENS)
    cholesky = seconds(lambda: triangular(second, 0.03))
    found = triangular(second, 0.03)
    feedback = seconds(lambda: feed_back(found.feed, w))
    columns = np.ascontiguousarray(w[:64])
    below = np.tril(0.01 * np.random.default_rng(1).standard_normal((n, n), F32) / F32(n**0.5), -1)
    plain, fed = (seconds(lambda b=b: search_rows(columns, b)) for b in (None, below))  # type: ignore[misc]
    quantise(w[:64, :64])  # the rates of the trellis, found once in a process
    search = seconds(lambda: quantise(w))
    q = quantise(w)
    coding, restore = seconds(lambda: code(q)), seconds(lambda: q.digest)
    ns = 1e9 / n**2
    return Rates(
        n,
        forward * ns / TOKENS,
        moment * ns / TOKENS,
        cholesky * ns / n,
        2 * feedback * ns / n,
        search * ns,
        (fed - plain) * 1e9 / columns.size,
        coding * ns,
        restore * ns,
    )


def memory(n: int) -> tuple[float, float]:
    """Bytes at most, beyond what is given: of `triangular` for each n^2, of quantising for each weight."""
    x, w = inputs(n), bf16(n)
    second = x.T @ x
    found = triangular(second, 0.03)

    def peak(work: Callable[[], Any]) -> float:
        tracemalloc.start()
        work()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most / n**2

    return peak(lambda: triangular(second, 0.03)), peak(lambda: quantise(w, found))


def lock_share(n: int) -> float:
    """Share of the time of a matrix in one thread in which it holds the interpreter's lock.

    It is what another thread that only counts loses, less what it loses to other work on the machine.
    """
    x, w = inputs(n), bf16(n)
    second = x.T @ x / F32(TOKENS)

    def work() -> None:
        code(quantise(w, triangular(second, 0.03)))

    def count(until: Callable[[], bool]) -> float:
        start, cpu = time.perf_counter(), time.thread_time()
        while not until():
            for _ in range(1000):
                pass
        return (time.thread_time() - cpu) / (time.perf_counter() - start)

    end = time.perf_counter() + 3
    alone = count(lambda: time.perf_counter() > end)
    took = seconds(work)
    beside: list[float] = []
    other = threading.Thread(target=lambda: beside.append(seconds(work)))
    other.start()
    counted = count(lambda: bool(beside))
    return max(0.0, 1 - counted / alone) * beside[0] / took


def memory_now() -> int:
    """Bytes of the process' own memory at most since this was called last; pages of mapped files count."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


@dataclass(frozen=True)
class Stored:
    """A second moment in a file, as a calibration leaves it."""

    path: Path

    @property
    def key(self) -> str:
        """What tells it from others."""
        return str(self.path)

    def __call__(self) -> NDArray[np.float32]:
        """Mapped."""
        found: NDArray[np.float32] = np.load(self.path, mmap_mode="r")
        return found


def one_matrix(m: int, n: int, folder: Path) -> None:
    """Print what one matrix (m, n) of BF16 takes on its way through the encoder, at 3 bits."""
    rng = np.random.default_rng(0)
    deviation = np.exp(rng.standard_normal(n) / 2).astype(F32)
    x = rng.standard_normal((TOKENS, n), F32) * deviation
    moment = np.lib.format.open_memmap(folder / "second.npy", "w+", F32, (n, n))
    for a in range(0, n, 1024):
        moment[a : a + 1024] = x[:, a : a + 1024].T @ x / F32(TOKENS)
    del moment, x
    with (folder / "weights").open("wb") as file:
        for a in range(0, m, 256):
            file.write(to_words(rng.standard_normal((min(256, m - a), n), F32) * F32(0.02), "BF16").tobytes())
    t = SourceTensor("w", "BF16", (m, n), Extent(str(folder / "weights"), 0, 2 * m * n))
    group = Group(t, (), {})
    layer = Layer(Stored(folder / "second.npy"), None, factors=Factors(folder=str(folder)))
    print(f"{m} outputs, {n} inputs: {8 * n * n / 1e9:.2f} GB of float64 for its factor, {m * n:,} weights")
    memory_now()
    start, cpu = memory_now(), time.process_time()

    def tell(what: str) -> None:
        nonlocal cpu
        most, now = memory_now(), time.process_time()
        each = (most - start) / n**2
        print(f"{what}: {now - cpu:.1f} s, {most / 1e9:.2f} GB at most, {each:.2f} bytes for each n^2 beyond the start")
        cpu = time.process_time()

    recipe: Recipe = calibrated([group], {"w": layer}, (), "default")
    tell("recipe")
    e, words = encode_with_words(group, dataclasses.replace(recipe, scale=-2.0))
    tell("quantised and coded")
    del words
    e = measured(e, t, recipe)
    tell("measured")
    assert e.fidelity is not None  # noqa: S101
    print(f"{8 * e.size / (m * n):.3f} bits a weight, {e.fidelity.snr:.2f} dB")


def row_feedback(rates: list[Rates]) -> tuple[float, float]:
    """For each weight: a constant of the search, and what each further row adds; a line through the measurements."""
    slope, start = np.polyfit([r.n for r in rates], [r.below for r in rates], 1) if len(rates) > 1 else (0.0, 0.0)
    if slope <= 0:
        slope, start = 0.0, np.mean([r.below for r in rates])
    return float(start), float(slope)


def costs(r: Rates) -> Costs:
    """What the rates say of a pack; the rest of it is not among them."""
    two = 2 * r.restore
    return Costs(r.forward, r.moment, r.cholesky, r.feedback, r.search, r.coding, r.feedback, two, PASSES)


def tables(sizes: list[int]) -> None:
    """Measure and print all."""
    rates = [measure(n) for n in sizes]
    held = memory(min(2048, max(sizes)))
    print("Rates, ns, one thread.")
    each = [
        [str(r.n)]
        + [f"{v:.4f}" for v in (r.forward, r.moment, r.cholesky, r.feedback)]
        + [f"{v:.1f}" for v in (r.search, r.below, r.coding, r.restore)]
        for r in rates
    ]
    table(
        "n | forward: token, weight | moment: token, n^2 | triangular: n^3 | feedback: multiply-add | "
        "search: weight | row feedback: weight | coding: weight | restore: weight",
        each,
    )
    print("\nThe same as ns for each weight of a square matrix, in one pass.")
    each = []
    for r in rates:
        one = [r.cholesky * r.n, r.feedback * r.n / 2, r.search, r.coding]
        calibration = CALIBRATION * (3 * r.forward + r.moment)
        each.append([str(r.n), *(f"{v:,.0f}" for v in (*one, sum(one), r.below, calibration))])
    table(
        f"n | triangular | feedback | search | coding | sum | row feedback | calibration, {CALIBRATION:,} tokens", each
    )
    print(f"\nMemory at most: triangular {held[0]:.1f} bytes for each n^2, quantising {held[1]:.1f} for each weight.")
    print(
        "Holds the interpreter's lock, one thread, share of its time: "
        f"{', '.join(f'n = {n}: {lock_share(n):.0%}' for n in sizes)}."
    )
    print(f"\nComputed: hours of one core with the rates of n = {rates[-1].n}; calibration without its moments.")
    large_models.hours(costs(rates[-1]))
    start, slope = row_feedback(rates)
    for model in MODELS:
        every = sum(i.copies * i.n * m * (start + slope * m) for i, m in model.matrices)
        print(f"{model.name}: {model.blocks * every / HOUR:,.1f} hours of row feedback in a pass, where it is used")
    print("\nComputed: GB on disk and in memory.")
    large_models.sizes(held)


def of_pack(measured: Path, others: list[Path]) -> None:
    """Print what a pack that was measured says of large models, and of other packs that were measured too."""
    found = json.loads(measured.read_text())
    costs = Costs.measured(found, large_models.blocks(found))
    print(f"Nanoseconds: {', '.join(f'{k} {v:.4g}' for k, v in dataclasses.asdict(costs).items())}.")
    print(f"\nComputed from {found['blocks']} packed blocks: hours of one core, calibration on {CALIBRATION:,} tokens.")
    large_models.hours(costs)
    for other in others:
        large_models.check(costs, json.loads(other.read_text()))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=[1024, 2048, 4096], help="default: 1024 2048 4096")
    parser.add_argument("--shape", metavar="OUTPUTSxINPUTS", help="only one matrix of this shape, all of the way")
    parser.add_argument("--measured", type=Path, metavar="JSON", help="only what a pack of lossy_at_scale.py says")
    parser.add_argument("--check", type=Path, nargs="*", default=[], metavar="JSON", help="of these packs too")
    args = parser.parse_args()
    if args.measured:
        of_pack(args.measured, args.check)
    elif args.shape:
        with tempfile.TemporaryDirectory() as folder:
            m, n = map(int, args.shape.split("x"))
            one_matrix(m, n, Path(folder))
    else:
        tables(args.sizes)


if __name__ == "__main__":
    main()
