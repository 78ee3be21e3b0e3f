"""Whole files of a model at given sizes: KL, top-1 and perplexity on several texts, packs of nearly one size averaged.

Packs of one size scatter by a few percent in KL, so each size is packed several times, a thousandth smaller each time,
and the last row of a size is their mean. The calibration is made once (`--cache`). Texts are measured one after the
other: what the original predicts on one is held.

  python tools/whole_file_bar.py demo/smollm2-hf valid.txt --text wikitext=test.txt --text manual=zstd.1.txt --packs 3
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import rac
from rac.calibrate.evaluate import Measure
from rac.machine import parse_size

LESS = 0.001
"""Share of a size by which each pack of it is smaller than the one before."""


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
    parser.add_argument("--out", help="folder where the files stay, a name for each")
    parser.add_argument("--no-embeddings", action="store_true", help="embeddings stay lossless")
    args = parser.parse_args()
    if args.out:
        os.makedirs(args.out, exist_ok=True)
    texts = dict(one.split("=", 1) for one in args.text)
    how: dict[str, Any] = {"calibrate": args.calibration, "tokens": args.tokens, "cache": args.cache}
    how |= {"embeddings": not args.no_embeddings, "force": True}
    with tempfile.TemporaryDirectory() as temporary:
        packs: dict[str, list[tuple[str, tuple[int, int, float]]]] = {size: [] for size in args.sizes}
        for size in args.sizes:
            for i in range(args.packs):
                path = os.path.join(args.out or temporary, f"{size}-{i + 1}.rac" if i else f"{size}.rac")
                start = time.perf_counter()
                done = rac.pack(args.folder, path, size=int(parse_size(size) * (1 - LESS * i)), **how)
                packs[size].append((path, (done.stored, done.weights, time.perf_counter() - start)))
                print(f"{path}: {done.stored:,} bytes", flush=True)
        paths = [path for each in packs.values() for path, _ in each]
        found = {name: measured(args.folder, Path(file), args.measured, paths) for name, file in texts.items()}
    head = " | ".join(f"{name}: KL | top-1 | perplexity" for name in texts)
    print(f"\n| size | bytes | bits of the file | {head} | seconds |\n| --- |" + " ---: |" * (3 + 3 * len(texts)))
    print(row("original", None, {n: f[""] for n, f in found.items()}, 0.0))
    for size, each in packs.items():
        for path, about in each:
            print(row(size, about, {n: f[path] for n, f in found.items()}, about[2]))
        if args.packs > 1:
            mean = {n: {key: sum(f[p][key] for p, _ in each) / len(each) for key in f[""]} for n, f in found.items()}
            stored, seconds = (sum(about[k] for _, about in each) / len(each) for k in (0, 2))
            print(row(f"{size}, mean", (int(stored), each[0][1][1], 0.0), mean, seconds))


def measured(folder: Path, text: Path, tokens: int, paths: list[str]) -> dict[str, dict[str, float]]:
    """Figures on a text of the original, "", and of files; what that holds is gone before the next text's."""
    measure = Measure(folder, text.read_text(encoding="utf-8"), tokens)
    found = {"": asdict(measure.figures())}
    for path in paths:
        state = rac.load_file(path, framework="pt")
        found[path] = asdict(measure.figures(measure.load(state, path), path))
        print(f"{path}: measured on {text.name}", flush=True)
    return found


def row(name: str, pack: tuple[int, int, float] | None, figures: Any, seconds: float) -> str:
    """A row: of the original where there is no pack of (bytes, weights, seconds)."""
    size = "| " if pack is None else f"{pack[0]:,} | {8 * pack[0] / pack[1]:.3f}"
    cells = (f"{one['kl']:.4f} | {one['top1']:.2%} | {one['perplexity']:.3f}" for one in figures.values())
    return f"| {name} | {size} | {' | '.join(cells)} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
