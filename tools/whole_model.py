"""A whole model, embedding included: file bytes against perplexity at several sizes.

The GGUF points, where rows of tools/gguf_bar.py are given, flatter them: their perplexity is that of the quantised
linear layers with the embedding in BF16, their size counts the embedding as Q6_K, as llama.cpp quantises it.

  python tools/whole_model.py demo/smollm2-hf valid.txt test.txt --cache DIR --gguf ROWS --plot FILE.svg
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import rac
from rac.calibrate.evaluate import Measure
from rac.encode.align.recipe import quantisable
from rac.encode.sources import Source, open_source
from rac.encode.sources.tables import is_table

Q6_K = 6.5625
"""Bits per weight."""


def rest(source: Source) -> tuple[int, float]:
    """Weights that gguf_bar quantises, and bytes of everything else with embeddings as Q6_K."""
    linear = sum(math.prod(t.shape) for t in source.tensors if quantisable(t))
    size = 0.0
    for t in source.tensors:
        if not quantisable(t):
            embedding = is_table(t)
            size += math.prod(t.shape) * Q6_K / 8 if embedding else t.nbytes
    return linear, size + sum(len(file.read()) for file in source.attachments)


def plot(path: Path, ours: list[tuple[float, float]], theirs: list[tuple[str, float, float]], own: float) -> None:
    """Perplexity over size, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "rac"
    from matplotlib import pyplot as plt

    figure: Any
    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.plot(*zip(*ours, strict=True), "o-", label="RAC, whole file")
    shown = [row for row in theirs if row[2] < 2.5 * own]
    if shown:
        axes.plot([x for _, x, _ in shown], [y for _, _, y in shown], "x", color="tab:red", label="GGUF types")
    for name, x, y in shown:
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
    axes.axhline(own, color="gray", linewidth=0.8, linestyle="--", label="original (BF16)")
    axes.set_xlabel("file, MB")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.legend()
    axes.grid(visible=True, which="both", linewidth=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("test", type=Path)
    parser.add_argument("--file-bits", type=float, nargs="+", default=[2.3, 2.7, 3.2, 3.8, 4.6])
    parser.add_argument("--cache", help="folder where the calibration is kept")
    parser.add_argument("--gguf", type=Path, help="rows that tools/gguf_bar.py has kept")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    measure = Measure(args.folder, args.test.read_text(encoding="utf-8"))
    own = measure.figures().perplexity
    print("| file | bytes | bits of the file | perplexity | KL |\n| --- | ---: | ---: | ---: | ---: |")
    print(f"| original | | 16 | {own:.3f} | 0 |", flush=True)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, "m.rac")
        for bits in args.file_bits:
            done = rac.pack(
                args.folder,
                path,
                file_bits=bits,
                calibrate=args.calibration,
                cache=args.cache,
                force=True,
            )
            found = measure.figures(measure.load(rac.load_file(path, framework="pt"), path), path)
            ours.append((done.stored / 1e6, found.perplexity))
            rate = 8 * done.stored / done.weights
            print(f"| rac | {done.stored:,} | {rate:.3f} | {found.perplexity:.3f} | {found.kl:.4f} |", flush=True)
    if args.gguf:
        linear, size = rest(open_source(args.folder))
        for row in map(json.loads, args.gguf.read_text().splitlines()):
            if not row["name"].startswith("rac"):
                total = size + linear * row["bits"] / 8
                theirs.append((row["name"], total / 1e6, row["perplexity"]))
                print(f"| {row['name']} | {int(total):,} | | {row['perplexity']:.3f} | {row['kl']:.4f} |")
    if args.plot:
        plot(args.plot, sorted(ours), sorted(theirs, key=lambda r: r[1]), own)


if __name__ == "__main__":
    main()
