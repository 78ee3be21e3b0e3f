"""Whole files of a model at given sizes: KL, top-1 and perplexity on several texts, packs of nearly one size averaged.

Packs of one size scatter by a few percent in KL, so each size is packed several times, a thousandth smaller each time,
and the last row of a size is their mean. The calibration is made once (`--cache`).

  python tools/whole_file_bar.py demo/smollm2-hf valid.txt --text wikitext=test.txt --text manual=zstd.1.txt --packs 3
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import rac
from rac.calibrate.evaluate import Measure
from rac.machine import parse_size

LESS = 0.001
"""Share of a size by which each pack of it is smaller than the one before."""
FIGURES = ("kl", "top1", "perplexity")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("calibration", nargs="+", help="texts, self, auto or none")
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE: measure on it")
    parser.add_argument("--sizes", nargs="+", default=["54MB", "64MB", "77MB"])
    parser.add_argument("--packs", type=int, default=3, help="of each size")
    parser.add_argument("--tokens", type=int, default=40960, help="to calibrate on")
    parser.add_argument("--measured", type=int, default=8192, help="tokens to measure on")
    parser.add_argument("--cache", help="folder where the calibration is kept")
    parser.add_argument("--out", help="folder where the files stay, a name for each size")
    parser.add_argument("--no-embeddings", action="store_true", help="embeddings stay lossless")
    args = parser.parse_args()
    if args.out:
        os.makedirs(args.out, exist_ok=True)
    texts = dict(one.split("=", 1) for one in args.text)
    measures = {
        name: Measure(args.folder, Path(file).read_text(encoding="utf-8"), args.measured)
        for name, file in texts.items()
    }
    head = " | ".join(f"{name}: KL | top-1 | perplexity" for name in texts)
    print(f"| size | bytes | bits of the file | {head} | seconds |\n| --- |" + " ---: |" * (3 + 3 * len(texts)))
    own = {name: measure.figures() for name, measure in measures.items()}
    print(row("original", None, {name: {f: getattr(own[name], f) for f in FIGURES} for name in texts}, 0.0), flush=True)
    how: dict[str, Any] = {"calibrate": args.calibration, "tokens": args.tokens, "cache": args.cache}
    how |= {"embeddings": not args.no_embeddings, "force": True}
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.sizes:
            path, packs, found = os.path.join(args.out or temporary, f"{size}.rac"), [], []
            for i in range(args.packs):
                start = time.perf_counter()
                done = rac.pack(args.folder, path, size=int(parse_size(size) * (1 - LESS * i)), **how)
                seconds, state = time.perf_counter() - start, rac.load_file(path, framework="pt")
                figures = {name: measure.figures(measure.load(state, path), path) for name, measure in measures.items()}
                found.append({name: {f: getattr(figures[name], f) for f in FIGURES} for name in texts})
                packs.append((done.stored, done.weights, seconds))
                print(row(size, packs[-1], found[-1], seconds), flush=True)
            if args.packs > 1:
                mean = {n: {f: sum(one[n][f] for one in found) / len(found) for f in FIGURES} for n in texts}
                stored = sum(p[0] for p in packs) // len(packs)
                print(row(f"{size}, mean", (stored, packs[0][1], 0.0), mean, sum(p[2] for p in packs) / len(packs)))


def row(name: str, pack: tuple[int, int, float] | None, figures: Any, seconds: float) -> str:
    """A row: of the original where there is no pack of (bytes, weights, seconds)."""
    size = "| " if pack is None else f"{pack[0]:,} | {8 * pack[0] / pack[1]:.3f}"
    cells = (f"{one['kl']:.4f} | {one['top1']:.2%} | {one['perplexity']:.3f}" for one in figures.values())
    return f"| {name} | {size} | {' | '.join(cells)} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
