"""What a lossy pack costs for each weight on this machine, and what follows for large models.

Times every stage alone, single thread, on BF16 Gaussian matrices of N x N with the second moment of random inputs, and
prints the rates, and from those of the largest N the core hours, memory and disk of three models, whose shapes are in
the code. docs/scaling.md holds what it printed.

  python tools/scaling.py                      1024, 2048 and 4096
  python tools/scaling.py --shape 8192x28672   one matrix of so many outputs and inputs through the whole encoder, its
                                               second moment and weights in files: seconds and memory (Linux)
  python tools/scaling.py --block demo/8b-shaped.safetensors --include 'blk.0.*'
                                               these tensors packed at 3 bits without a text: core seconds and memory
"""

from __future__ import annotations

import os

for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"

import argparse  # noqa: E402
import dataclasses  # noqa: E402
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
from numpy.typing import NDArray  # noqa: E402

import rac  # noqa: E402
from rac.calibrate.layers import Layer  # noqa: E402
from rac.encode import record as rec  # noqa: E402
from rac.encode.align.recipe import Recipe, calibrated  # noqa: E402
from rac.encode.code.plan import LEVELS  # noqa: E402
from rac.encode.quantise import trellis as lossy  # noqa: E402
from rac.encode.quantise.tensor import FEWEST as FEW  # noqa: E402
from rac.encode.quantise.tensor import PRODUCTS as LIMIT  # noqa: E402
from rac.encode.quantise.tensor import SHAPED, encode_with_words  # noqa: E402
from rac.encode.quantise.tensor import measure as measured  # noqa: E402
from rac.encode.sources import Extent, SourceTensor  # noqa: E402
from rac.encode.ties import Group  # noqa: E402
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
PASSES = 1.2
"""Over all matrices: one, and four tries on one row in twenty."""
CALIBRATION = 40960
"""Tokens of a calibration, the default of `rac pack`."""
CORES = 64


@dataclass(frozen=True)
class Input:
    """A vector that matrices of a block multiply."""

    n: int
    rows: tuple[int, ...]
    """Outputs of each matrix that reads it."""
    copies: int = 1
    share: float = 1.0
    """Of the tokens, for each copy."""


@dataclass(frozen=True)
class Model:
    """A chain of equal blocks."""

    name: str
    blocks: int
    width: int
    inputs: tuple[Input, ...]


def llama(name: str, blocks: int, width: int, inner: int) -> Model:
    """Grouped attention with keys and values of 1024; embeddings stay lossless."""
    inputs = (Input(width, (width, 1024, 1024)), Input(width, (width,)), Input(width, (inner, inner)))
    return Model(name, blocks, width, (*inputs, Input(inner, (width,))))


EXPERTS, ACTIVE, WIDTH, INNER = 384, 8, 7168, 2048
MODELS = (
    llama("8B", 32, 4096, 14336),
    llama("70B", 80, 8192, 28672),
    Model(
        "1T MoE",
        60,
        WIDTH,
        (
            Input(WIDTH, (WIDTH, WIDTH, WIDTH)),
            Input(WIDTH, (WIDTH,)),
            Input(WIDTH, (INNER, INNER), EXPERTS, ACTIVE / EXPERTS),
            Input(INNER, (WIDTH,), EXPERTS, ACTIVE / EXPERTS),
        ),
    ),
)


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
    forward = seconds(lambda: x @ w.T, 3)
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
    layer = Layer(lambda: np.load(folder / "second.npy", mmap_mode="r"), None)
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


def block(path: str, include: str, jobs: int) -> None:
    """Print what the tensors of a file cost that a pattern names, packed at 3 bits from the weights alone."""
    with tempfile.TemporaryDirectory() as folder:
        start, cpu, children = time.perf_counter(), time.process_time(), os.times().children_user
        notes: dict[str, int] = {}

        def note(what: str, _: int, of: int) -> None:
            notes[what] = of

        out = Path(folder) / "block.rac"
        done = rac.pack(path, out, bits=3, calibrate="none", include=include, jobs=jobs, note=note)
        took, cores = time.perf_counter() - start, time.process_time() - cpu + os.times().children_user - children
    print("\n".join(notes))
    print(f"{done.quantised} matrices, {done.weights:,} weights, {done.quantised_bits:.3f} bits, {jobs} jobs")
    print(f"{took:.1f} s, {cores:.1f} core seconds, {1e6 * cores / done.weights:.3f} for a million weights")
    print(f"{memory_now() / 1e9:.2f} GB of memory at most")


def table(head: str, rows: list[list[str]]) -> None:
    """Print a table."""
    print(f"\n| {head} |\n|{' ---: |' * (head.count('|') + 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def row_feedback(rates: list[Rates]) -> tuple[float, float]:
    """For each weight: a constant of the search, and what each further row adds; a line through the measurements."""
    slope, start = np.polyfit([r.n for r in rates], [r.below for r in rates], 1) if len(rates) > 1 else (0.0, 0.0)
    if slope <= 0:
        slope, start = 0.0, np.mean([r.below for r in rates])
    return float(start), float(slope)


def extrapolate(model: Model, rates: list[Rates], held: tuple[float, float]) -> tuple[list[str], list[str]]:
    """Rows of the tables of time, in hours of one core, and of memory and disk, in GB."""
    b, hour, r = model.blocks, 3.6e12, rates[-1]
    every = [(i, m) for i in model.inputs for m in i.rows]
    weights = b * sum(i.copies * i.n * m for i, m in every)
    of_token = b * sum(i.copies * i.share * i.n * m for i, m in every)
    moments = b * sum(i.copies * i.n**2 for i in model.inputs)
    per_token = 3 * r.forward * of_token + r.moment * b * sum(i.copies * i.share * i.n**2 for i in model.inputs)
    calibration = CALIBRATION * per_token / hour
    cholesky = r.cholesky * b * sum(i.copies * i.n**3 for i in model.inputs) / hour
    feedback = r.feedback * b * sum(i.copies * m * i.n**2 / 2 for i, m in every) / hour
    start, slope = row_feedback(rates)
    below = b * sum(i.copies * i.n * m * (start + slope * m) for i, m in every) / hour
    search, coding = r.search * weights / hour, r.coding * weights / hour
    one = feedback + search + coding
    errors = 2 * r.feedback * b * sum(i.copies * min(m * i.n**2, max(LIMIT, FEW * i.n**2)) for i, m in every) / hour
    total = calibration + cholesky + PASSES * one + errors + 2 * r.restore * weights / hour
    parts = (calibration, cholesky, feedback, search, coding, one, errors, total, below)
    time_row = [model.name, f"{weights / 1e9:,.1f}", *(f"{v:,.1f}" for v in parts), f"{total / CORES:,.2f}"]
    block = 4 * (weights + moments) / b
    largest = max(max(held[0] * i.n**2, held[0] / 2 * i.n**2 + (4 + held[1]) * i.n * m) for i, m in every)
    sizes = (
        2 * weights,
        4 * CALIBRATION * model.width * (b + 1),
        4 * moments,
        block,
        largest,
        4 * max(i.n**2 for i in model.inputs),
    )
    return time_row, [model.name, *(f"{v / 1e9:,.1f}" for v in sizes)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=[1024, 2048, 4096], help="default: 1024 2048 4096")
    parser.add_argument("--shape", metavar="OUTPUTSxINPUTS", help="only one matrix of this shape, all of the way")
    parser.add_argument("--block", metavar="FILE", help="only pack tensors of this file, named by --include")
    parser.add_argument("--include", default="blk.0.*", help="pattern of their names; default: blk.0.*")
    parser.add_argument("--jobs", type=int, default=2, help="threads of --block; default: 2")
    args = parser.parse_args()
    if args.block:
        block(args.block, args.include, args.jobs)
        return
    if args.shape:
        with tempfile.TemporaryDirectory() as folder:
            m, n = map(int, args.shape.split("x"))
            one_matrix(m, n, Path(folder))
        return
    rates = []
    for n in args.sizes:
        rates.append(measure(n))
    held = memory(min(2048, max(args.sizes)))
    print("Rates, ns, one thread.")
    table(
        "n | forward: token, weight | moment: token, n^2 | triangular: n^3 | feedback: multiply-add | "
        "search: weight | row feedback: weight | coding: weight | restore: weight",
        [
            [
                str(r.n),
                *(f"{v:.4f}" for v in (r.forward, r.moment, r.cholesky, r.feedback)),
                *(f"{v:.1f}" for v in (r.search, r.below, r.coding, r.restore)),
            ]
            for r in rates
        ],
    )
    print("\nThe same as ns for each weight of a square matrix, in one pass.")
    table(
        "n | triangular | feedback | search | coding | sum | row feedback | calibration, 40,960 tokens",
        [
            [
                str(r.n),
                *(
                    f"{v:,.0f}"
                    for v in (
                        r.cholesky * r.n,
                        r.feedback * r.n / 2,
                        r.search,
                        r.coding,
                        r.cholesky * r.n + r.feedback * r.n / 2 + r.search + r.coding,
                        r.below,
                        CALIBRATION * (3 * r.forward + r.moment),
                    )
                ),
            ]
            for r in rates
        ],
    )
    print(f"\nMemory at most: triangular {held[0]:.0f} bytes for each n^2, quantising {held[1]:.0f} for each weight.")
    print(
        "Holds the interpreter's lock, one thread, share of its time: "
        f"{', '.join(f'n = {n}: {lock_share(n):.0%}' for n in args.sizes)}."
    )
    rows = [extrapolate(model, rates, held) for model in MODELS]
    print(f"\nComputed: hours of one core with the rates of n = {rates[-1].n}.")
    table(
        "model | quantised weights, 1e9 | calibration | triangular | feedback | search | coding | one pass | "
        f"measuring | all, {PASSES} passes | row feedback, one pass | all on {CORES} cores",
        [a for a, _ in rows],
    )
    print("\nComputed: GB on disk and in memory.")
    table(
        "model | BF16 weights, disk | hidden states, disk | second moments, disk | one block in calibration, memory | "
        "largest matrix, memory | largest second moment",
        [b for _, b in rows],
    )


if __name__ == "__main__":
    main()
