r"""What a learned orthogonal transform of the inputs saves, and what it costs: bits per weight at equal output error.

  python tools/learn_axis.py demo/smollm2-hf --text valid.txt --layers 0 15 29

`triangular` (feedback in the coordinates of the model) is at --bits; all others at its output error. `cost` is U itself
at 16 bits per element, of one matrix for each weight; `net` what remains of what is saved.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rac.calibrate.layers import calibrate
from rac.encode.align.recipe import matrix_of
from rac.encode.sources import open_source
from rac.methods.rotations import compare_axes, learn_axis


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--names", nargs="+", default=["q_proj", "v_proj", "o_proj", "up_proj"])
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--block", type=int, nargs="+", default=[0, 64], help="0: one block")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cache", type=Path, help="folder where calibrations are kept")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    found = calibrate(args.model, text, tokens=args.tokens, fisher=False, cache=args.cache)
    tensors = {t.name: t for t in open_source(args.model).tensors}
    print("| weight | block | original | hadamard | pca | triangular | learned | cost | net | s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for i in args.layers:
        for name in (n for n in tensors if n.startswith(f"model.layers.{i}.") and n.split(".")[-2] in args.names):
            t = tensors[name]
            w, second = matrix_of(t), found[name].second
            for block in args.block:
                began = time.perf_counter()
                axis = learn_axis(w, second, bits=args.bits, block=block or None, steps=args.steps)
                seconds = time.perf_counter() - began
                bits = compare_axes(w, second, axis.u, bits=args.bits)
                cost = axis.cost_bits / w.size
                columns = ("original", "hadamard", "pca", "triangular", "learned")
                shown = " | ".join(f"{bits[c]:.3f}" for c in columns)
                net = axis.bits_saved / w.size - cost
                short = f"{i} {name.split('.')[-2]} {w.shape[0]} x {w.shape[1]}"
                print(
                    f"| {short} | {block or w.shape[1]} | {shown} | {cost:.3f} | {net:.3f} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
