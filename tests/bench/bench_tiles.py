"""Speed of the decoder of tiles on the tiles of files: `python tests/bench/bench_tiles.py FILE.rac...`.

What a load gives to the kernel is kept, with copies of the units, and run again in one thread, in calls of about as
many bytes as a load makes (decode/engine.py:GROUP), whose units were looked at just before. What is measured is
rac_spans alone: checksums and decoding, without reading, Python and first touches of the output. Prints nanoseconds per
weight for each instruction set, number of lanes and weights per symbol.
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
from rac.native.prototypes import TileShared, TileSpan

Kind = tuple[int, int, int, bool]
Spans = dict[Kind, list[TileSpan]]


def spans_of(path: str) -> tuple[Spans, list[Any]]:
    """The spans of a file by (lanes, weights per symbol, bytes of a word, whether numbers), and what they point to."""
    kept: list[Any] = []
    found: Spans = defaultdict(list)
    run = work.Work.run

    def keep(self: Any) -> None:
        kept.append((self._of, self._alive))
        for span in self._spans:
            data = np.frombuffer(ctypes.string_at(span.all.unit, span.all.size), np.uint8).copy()
            mine = TileSpan.from_buffer_copy(span)
            mine.all.unit = native.address(data)
            shared = TileShared.from_address(span.all.shared)
            found[shared.lanes, shared.per, shared.word, bool(span.all.numbers)].append(mine)
            kept.append(data)
        run(self)

    work.Work.run = keep  # type: ignore[method-assign]
    try:
        kept.append(rac.load_file(path))
    finally:
        work.Work.run = run  # type: ignore[method-assign]
    return dict(found), kept


def weights_of(s: TileSpan) -> int:
    """Weights of the tiles of a span."""
    across = -(-s.all.cols // s.wide)
    tall = (min(s.tall, s.all.rows - i // across * s.tall) for i in range(s.first, s.first + s.tiles))
    wide = (min(s.wide, s.all.cols - i % across * s.wide) for i in range(s.first, s.first + s.tiles))
    return sum(h * w for h, w in zip(tall, wide, strict=True))


def calls(spans: list[TileSpan]) -> list[list[TileSpan]]:
    """The spans of each call."""
    out: list[list[TileSpan]] = [[]]
    size = 0
    for span in spans:
        out[-1].append(span)
        size += span.all.size
        if size >= GROUP:
            out.append([])
            size = 0
    return out


def run(groups: list[list[TileSpan]]) -> float:
    """Seconds of all calls."""
    spent = 0.0
    for spans in groups:
        for span in spans:
            xxh3(memoryview((ctypes.c_char * span.all.size).from_address(span.all.unit)))
        start = time.perf_counter()
        if wrong := native.decode_spans(spans):
            raise RuntimeError(wrong[3])
        spent += time.perf_counter() - start
    return spent


def seconds(spans: list[TileSpan], spent: float) -> float:
    """The fastest of the runs that fit into `spent` seconds."""
    groups, best, end = calls(spans), float("inf"), time.perf_counter() + spent
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
        found, _kept = spans_of(path)
        print(f"{path}\n| lanes | per symbol | tiles | weights |" + "".join(f" {c} ns |" for c in sets))
        total = dict.fromkeys(sets, 0.0)
        everything = 0
        for (lanes, per, word, numbers), spans in sorted(found.items()):
            weights = sum(weights_of(s) for s in spans)
            everything += weights
            what = "numbers" if numbers else f"{8 * word} bits"
            line = f"| {lanes} | {per}, {what} | {sum(s.tiles for s in spans)} | {weights} |"
            for cpu in sets:
                with using(cpu):
                    t = seconds(spans, given.seconds)
                total[cpu] += t
                line += f" {t / weights * 1e9:.3f} |"
            print(line)
        print(f"| all | | | {everything} |" + "".join(f" {t / everything * 1e9:.3f} |" for t in total.values()))
        print("M weights/s: " + ", ".join(f"{c} {everything / t / 1e6:.0f}" for c, t in total.items()) + "\n")


if __name__ == "__main__":
    main()
