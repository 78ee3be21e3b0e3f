"""Cycles per weight of the kernels on cores of aarch64, by llvm-mca's models of them: a model, not a measurement.

    python tools/cycles.py            # all rows of tools/instructions.py; or those that an argument is part of

A row runs in the emulator, which counts how often each straight piece of code is executed. llvm-mca simulates each
piece in a loop of its own, all data in the nearest cache and every branch foreseen; what it takes, times how often it
runs, is summed up for each function. Needs LLVM 17 or later, of which Debian has llvm-19.
"""

from __future__ import annotations

import bisect
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

from instructions import WORK
from rac.native import library
from support import arm  # type: ignore[import-untyped]

CORES = {"Neoverse V1": "neoverse-v1", "Neoverse V2": "neoverse-v2", "Apple (LLVM's Cyclone)": "apple-m4"}
COVERED, ITERATIONS, SMALL = 0.97, 30, 0.02


def tool(name: str) -> str:
    """The newest of an LLVM tool that is installed."""
    for version in ("", *(f"-{n}" for n in range(30, 16, -1))):
        if path := shutil.which(name + version):
            text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            found = re.search(r"version (\d+)", text)
            if found and int(found[1]) >= 17:
                return path
    sys.exit(f"no {name} of LLVM 17 or later here: apt install llvm-19")


@dataclass
class Piece:
    """Straight code: where in the library, how many bytes, how often it was executed."""

    at: int
    size: int
    times: int


def pieces(name: str) -> tuple[list[Piece], int]:
    """What one of WORK executes on NEON, the most instructions first, and how many weights it has."""
    import unicorn

    lib, hits, sizes = arm.library("neon"), Counter[int](), {}

    def block(_: object, at: int, size: int, __: object) -> None:
        hits[at - lib.image.base] += 1
        sizes[at - lib.image.base] = size

    work, weights = WORK[name][0]()
    hook = lib._uc.hook_add(unicorn.UC_HOOK_BLOCK, block)
    lib._uc.ctl_flush_tb()
    library._instead.append(lib)
    try:
        work()
    finally:
        library._instead.pop()
        lib._uc.hook_del(hook)
        lib._uc.ctl_flush_tb()
    found: list[Piece] = []
    for at in sorted(sizes):
        last = found[-1] if found else None
        if last and last.at + last.size == at and last.times == hits[at]:  # the emulator cuts long ones
            last.size += sizes[at]
        else:
            found.append(Piece(at, sizes[at], hits[at]))
    return sorted(found, key=lambda p: -p.size * p.times), weights


def functions() -> list[tuple[int, str]]:
    """Where each function begins."""
    text = subprocess.run([tool("llvm-nm"), str(arm.library("neon").path)], capture_output=True, text=True, check=True)
    lines = [line.split() for line in text.stdout.splitlines()]
    return sorted((int(x[0], 16), x[2]) for x in lines if len(x) == 3 and x[1] in "tT")


def assembly(piece: Piece) -> str:
    """A piece as llvm-mca reads it."""
    code = bytes(arm.library("neon").image.memory[piece.at : piece.at + piece.size])
    command = [tool("llvm-mc"), "--disassemble", "-triple=aarch64", "-mattr=+all"]
    out = subprocess.run(command, input=" ".join(f"{b:#x}" for b in code), capture_output=True, text=True, check=True)
    return "\n".join(line for line in out.stdout.splitlines() if not line.lstrip().startswith("."))


def cycles(texts: list[str], core: str) -> list[float]:
    """Cycles of each piece when it is executed over and over."""
    regions = [f"# LLVM-MCA-BEGIN p{i}\n{text}\n# LLVM-MCA-END" for i, text in enumerate(texts)]
    command = [
        tool("llvm-mca"),
        "-mtriple=aarch64",
        f"-mcpu={core}",
        "-mattr=+all",
        f"-iterations={ITERATIONS}",
        "-json",
    ]
    source = "\n".join(regions) + "\n"
    out = subprocess.run(command, input=source, capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    summaries = [region["SummaryView"] for region in json.loads(out.stdout)["CodeRegions"]]
    return [s["TotalCycles"] / s["Iterations"] for s in summaries]


def row(name: str) -> None:
    """Prints a line for each function that takes more than a few of the instructions."""
    found, weights = pieces(name)
    everything = sum(p.size * p.times for p in found)
    kept: list[Piece] = []
    while sum(p.size * p.times for p in kept) < COVERED * everything:
        kept.append(found[len(kept)])
    texts = [assembly(p) for p in kept]
    by_core = {core: cycles(texts, of) for core, of in CORES.items()}
    starts = functions()
    names = [starts[bisect.bisect(starts, (p.at, "~")) - 1][1] for p in kept]
    for function in dict.fromkeys(names):
        own = [i for i, n in enumerate(names) if n == function]
        executed = sum(kept[i].size // 4 * kept[i].times for i in own)
        if executed * 4 < SMALL * everything:
            continue
        took = [sum(of[i] * kept[i].times for i in own) / weights for of in by_core.values()]
        cells = " | ".join(f"{t:.2f}" for t in took)
        print(f"| {name} | `{function}` | {executed / weights:.2f} | {cells} |", flush=True)


def main() -> None:
    """Print a table."""
    print("| | function | instructions | " + " | ".join(CORES) + " |\n| --- | --- |" + " ---: |" * (len(CORES) + 1))
    for name in WORK:
        if len(sys.argv) == 1 or any(part in name for part in sys.argv[1:]):
            row(name)


if __name__ == "__main__":
    main()
