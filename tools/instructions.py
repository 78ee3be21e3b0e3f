"""Instructions per weight of the C kernels, counted and not timed: the same on every machine, however busy.

python tools/instructions.py            # a table: AVX2 and AVX-512 on this machine, NEON in the emulator
python tools/instructions.py --write    # tests/unit/native/instructions.json, which a test compares with

All are compiled by the compiler of the wheels. What the C library executes is not counted. A row is what was done, how
often for each weight.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import rac
from rac.native import library, product, trellis
from rac.stages import trellis as tr
from support import arm  # type: ignore[import-untyped]

RATCHET = Path(__file__).parents[1] / "tests" / "unit" / "native" / "instructions.json"
CPUS = ("avx2", "avx512", "neon")
SIDE = 512
Work = Callable[[], object]


def version() -> str:
    """What compiled the kernels."""
    return f"ziglang {importlib.metadata.version('ziglang')}"


@functools.cache
def matrix(side: int = SIDE) -> NDArray[np.float32]:
    """Weights (side, side) as layers have them: normal, with rows and columns of several scales, and some zeros."""
    rng = np.random.default_rng(0)
    scales = np.exp2(rng.integers(-2, 2, (side, 1)) / 2) * np.exp2(rng.integers(-2, 2, side) / 2)
    out: NDArray[np.float32] = (0.02 * rng.standard_normal((side, side)) * scales).astype(np.float32)
    out.flat[::9973] = 0  # escapes
    return out


def decode(array: Any, **options: Any) -> tuple[Work, int]:
    """A tensor decoded, by itself: in a bundle with others the same lanes run behind one more call."""
    data = io.BytesIO()
    rac.pack({"w": array}, data, **options)
    return lambda: rac.open(data).get_tensor("w"), array.size


def encode(array: Any, **options: Any) -> tuple[Work, int]:
    """A tensor encoded losslessly."""
    return lambda: rac.pack({"w": array}, io.BytesIO(), **options), array.size


def search(states: int, rows: int, shaped: bool = False) -> tuple[Work, int]:
    """The search of a block of columns; `shaped`: rows feed each other too."""
    columns = 2 if shaped else 8
    x = np.random.default_rng(1).standard_normal((columns, rows), np.float32)
    rec = tr.magnitudes(states, 128)[96:161].copy()
    rate = np.abs(rec).astype(np.float32).reshape(1, 1, -1)
    below = np.tril(np.random.default_rng(2).standard_normal((rows, rows), np.float32) * np.float32(0.05), -1)
    how = trellis.Search(states, tr.CODES[states], rows, rec, rate, 64.0, below=below if shaped else None)
    feed, step = np.zeros((columns, columns), np.float32), np.full(columns, 0.5, np.float32)
    return lambda: trellis.block(how, x, x.copy(), feed, step), x.size


def multiply() -> tuple[Work, int]:
    """An exact product; for each term."""
    rng = np.random.default_rng(3)
    t, a, b = (rng.standard_normal(shape, np.float32) for shape in ((32, 256), (32, 64), (64, 256)))
    return lambda: product.add(t, a, b), 32 * 64 * 256


def bf16(side: int = SIDE) -> Any:
    """The matrix in 16 bits."""
    return matrix(side).astype(ml_dtypes.bfloat16)


WORK: dict[str, tuple[Callable[[], tuple[Work, int]], str]] = {
    "decode default, BF16": (lambda: decode(bf16()), "rac_spans"),
    "decode fast, BF16": (lambda: decode(bf16(), level="fast"), "rac_spans"),
    "decode max, BF16": (lambda: decode(bf16(), level="max"), "rac_spans"),
    "decode default, F32": (lambda: decode(matrix()), "rac_spans"),
    "decode 3 bits to BF16": (lambda: decode(bf16(), bits=3), "rac_spans"),
    "decode 3 bits to F32": (lambda: decode(matrix(), bits=3), "rac_spans"),
    "encode default, BF16": (lambda: encode(bf16()), ""),
    "encode max, BF16": (lambda: encode(bf16(128), level="max"), ""),
    "encode fast, BF16": (lambda: encode(bf16(), level="fast"), "rac_pack"),
    "encode default, F32": (lambda: encode(matrix()), ""),
    "search, 256 states": (lambda: search(256, 256), "rac_quantise"),
    "search, 8 states": (lambda: search(8, 256), "rac_quantise"),
    "shaped search, 256 states": (lambda: search(256, 48, shaped=True), "rac_quantise"),
    "product": (multiply, "rac_product"),
}
"""What is counted, and of which function; "": of each."""


SUM = """#include <stdint.h>
extern const int64_t __start_rac_counts[], __stop_rac_counts[];
int64_t rac_executed(void) {
    int64_t n = 0;
    for (const int64_t *at = __start_rac_counts; at < __stop_rac_counts; at += 2) n += at[0] * at[1];
    return n;
}
"""
COUNT = """
    .pushsection rac_counts,"aw",@progbits
.Lrac_count{0}: .quad 0, {1}
    .popsection
    leaq -128(%rsp), %rsp
    pushfq
    incq .Lrac_count{0}(%rip)
    popfq
    leaq 128(%rsp), %rsp
"""
"""What begins a straight piece of code, of so many instructions: counts how often it runs, and changes nothing else."""


def with_counts(text: str) -> str:
    """Assembly of x86-64 whose straight pieces count themselves."""
    pieces: list[list[str]] = [[]]
    for line in text.splitlines():
        label, code = not line.startswith(("\t", " ", "#")) and ":" in line, re.match(r"\s+([a-z]\w*)", line)
        if label and not line.startswith((".Ltmp", ".Lfunc_end")):
            pieces.append([])
        pieces[-1].append(line)
        if code and code[1].startswith("j"):
            pieces.append([])
    out: list[str] = []
    for i, piece in enumerate(pieces):
        at = [k for k, line in enumerate(piece) if re.match(r"\s+[a-z]", line)]
        out += [*piece[: at[0]], COUNT.format(i, len(at)), *piece[at[0] :]] if at else piece
    return "\n".join(out) + "\n"


@functools.cache
def counted_library(cpu: str) -> Path:
    """The kernels of an instruction set of x86-64, which count what they execute."""
    out = Path(arm.place(cpu)).with_suffix(".counted.so")
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    target, flags = arm.BUILDS[cpu]
    command = [*arm.compiler(target), *arm.FLAGS, *flags, "-fno-asynchronous-unwind-tables", "-w"]
    with tempfile.TemporaryDirectory() as folder:
        made = [Path(folder) / "sum.c"]
        made[0].write_text(SUM)
        for source in sorted(arm.SOURCES.glob("*.c")):
            made.append(Path(folder) / f"{source.stem}.s")
            subprocess.run([*command, "-S", str(source), "-o", str(made[-1])], check=True)
            made[-1].write_text(with_counts(made[-1].read_text()))
        half = out.with_suffix(".half")
        subprocess.run([*command, *map(str, made), "-lm", "-o", str(half)], check=True)
        half.rename(out)
    return out


class Counted(arm.Indirect):  # type: ignore[misc]
    """A library of this machine that counts what it executes."""

    def __init__(self, cpu: str) -> None:
        self._lib = ctypes.CDLL(str(counted_library(cpu)))
        self._lib.rac_executed.restype = ctypes.c_int64
        self._lock = threading.Lock()
        super().__init__(cpu)

    def _run(self, name: str, values: list[int]) -> int:
        call = getattr(self._lib, name)
        call.restype = ctypes.c_int64
        with self._lock:  # all threads count in one place
            before = self._lib.rac_executed()
            out = call(*map(ctypes.c_uint64, values))
            self.counts[name] += self._lib.rac_executed() - before
        return int(out)


@contextmanager
def counting(cpu: str) -> Iterator[Counter[str]]:
    """Instructions of each function that is called in the block, whose kernels are those of an instruction set."""
    counted = arm.library(cpu).counted() if cpu in arm.CPUS else nullcontext()
    lib = arm.library(cpu) if cpu in arm.CPUS else Counted(cpu)
    with counted:
        library._instead.append(lib)
        try:
            yield lib.counts
        finally:
            library._instead.pop()


def count(name: str, cpus: Sequence[str] = CPUS) -> dict[str, dict[str, float]]:
    """Instructions per weight of one of WORK, of each function that counts, under each instruction set."""
    prepare, only = WORK[name]
    work, weights = prepare()
    out: dict[str, dict[str, float]] = {}
    for cpu in cpus:
        with counting(cpu) as counts:
            work()
        for function, n in sorted(counts.items()):
            if only in ("", function) and n >= weights / 20:
                out.setdefault(name if only else f"{name}: {function}", {})[cpu] = round(n / weights, 2)
    return out


def main() -> None:
    """Print, or write."""
    names = [name for name in WORK if any(part in name for part in sys.argv[1:])] or list(WORK)
    print("| | " + " | ".join(CPUS) + " | neon / avx2 |\n| --- |" + " ---: |" * (len(CPUS) + 1))
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        found = count(name)
        for row, of in found.items():
            cells = [f"{of[cpu]:.2f}" if cpu in of else "" for cpu in CPUS]
            ratio = f"{of['neon'] / of['avx2']:.2f}" if {"neon", "avx2"} <= of.keys() else ""
            print(f"| {row} | " + " | ".join(cells) + f" | {ratio} |", flush=True)
        rows |= found
    if "--write" in sys.argv:
        kept = json.loads(RATCHET.read_text()) if len(names) < len(WORK) else {}
        rows = kept.get("per weight", {}) | rows if kept.get("compiler") == version() else rows
        RATCHET.write_text(json.dumps({"compiler": version(), "per weight": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
