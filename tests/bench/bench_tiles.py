"""Speed of the decoder of tiles on the tiles of files: `python tests/bench/bench_tiles.py FILE.rac...`.

The jobs of a load are kept, with copies of their units, and run again in one thread, in calls of about as many bytes
as a load makes (decode/engine.py:GROUP), whose units were read just before, as a load does for their checksums. What is
measured is rac_tiles alone, without checksums, Python and first touches of the output. Prints nanoseconds per weight
for each instruction set, number of lanes and weights per symbol.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import defaultdict
from typing import Any

import numpy as np

import rac
from rac import native
from rac.container.zstd import xxh3
from rac.cpu import work
from rac.decode.engine import GROUP
from rac.native.library import cpus, using
from rac.native.prototypes import TileJob, TileShared

Kind = tuple[int, int, int, bool]
Jobs = dict[Kind, list[TileJob]]


def jobs_of(path: str) -> tuple[Jobs, list[Any]]:
    """The jobs of a file by (lanes, weights per symbol, bytes of a word, whether numbers), and what they point to."""
    kept: list[Any] = []
    found: Jobs = defaultdict(list)
    run = work.Work.run

    def keep(self: Any) -> None:
        kept.append((self._jobs, self._of, self._alive))
        for job in self._jobs:
            unit = np.frombuffer(ctypes.string_at(job.unit, job.size), np.uint8).copy()
            mine = TileJob.from_buffer_copy(job)
            mine.unit = native.address(unit)
            shared = TileShared.from_address(job.shared)
            found[shared.lanes, shared.per, shared.word, bool(job.numbers)].append(mine)
            kept.append(unit)
        run(self)

    work.Work.run = keep  # type: ignore[method-assign]
    try:
        kept.append(rac.load_file(path))
    finally:
        work.Work.run = run  # type: ignore[method-assign]
    return dict(found), kept


def calls(jobs: list[TileJob]) -> list[list[TileJob]]:
    """The jobs of each call."""
    out: list[list[TileJob]] = [[]]
    size = 0
    for job in jobs:
        out[-1].append(job)
        size += job.size
        if size >= GROUP:
            out.append([])
            size = 0
    return out


def run(groups: list[list[TileJob]]) -> float:
    """Seconds of all calls."""
    spent = 0.0
    for jobs in groups:
        for job in jobs:
            xxh3(memoryview((ctypes.c_char * job.size).from_address(job.unit)))
        start = time.perf_counter()
        if wrong := native.decode_tiles(jobs):
            raise RuntimeError(wrong[2])
        spent += time.perf_counter() - start
    return spent


def seconds(jobs: list[TileJob], spent: float) -> float:
    """The fastest of the runs that fit into `spent` seconds."""
    groups, best, end = calls(jobs), float("inf"), time.perf_counter() + spent
    while True:
        best = min(best, run(groups))
        if time.perf_counter() > end:
            return best


def main() -> None:
    """Print the table of each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--cpu", action="append", help="an instruction set; all that there are if none is named")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each cell")
    given = parser.parse_args()
    sets = given.cpu or list(cpus())
    for path in given.files:
        found, _kept = jobs_of(path)
        print(f"{path}\n| lanes | per symbol | tiles | weights |" + "".join(f" {c} ns |" for c in sets))
        total = dict.fromkeys(sets, 0.0)
        everything = 0
        for (lanes, per, word, numbers), jobs in sorted(found.items()):
            weights = sum(j.rows * j.cols for j in jobs)
            everything += weights
            what = "numbers" if numbers else f"{8 * word} bits"
            line = f"| {lanes} | {per}, {what} | {len(jobs)} | {weights} |"
            for cpu in sets:
                with using(cpu):
                    t = seconds(jobs, given.seconds)
                total[cpu] += t
                line += f" {t / weights * 1e9:.3f} |"
            print(line)
        print(f"| all | | | {everything} |" + "".join(f" {t / everything * 1e9:.3f} |" for t in total.values()))
        print("M weights/s: " + ", ".join(f"{c} {everything / t / 1e6:.0f}" for c, t in total.items()) + "\n")


if __name__ == "__main__":
    main()
