r"""RTN, GPTQ, SmoothQuant and QuaRot of one causal language model: what it predicts on a text, with how long each took.

  python tools/methods_bar.py demo/smollm2-hf valid.txt test.txt original rtn gptq
  python tools/methods_bar.py demo/smollm2-hf valid.txt test.txt original rtn quarot-rtn quarot-gptq \
      --group row --symmetric --activations 4 --kv 4 --tokens 4096

A row is a method at --bits and --group; activations, keys and values are quantised where --activations and --kv say so,
keys rotated under quarot. KL is from the original with all its bits. Of `dense=FILE` the weights are those of a
safetensors file, in the names of the model: what another implementation has made.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from rac.encode import evaluate, layerwise, transforms
from rac.encode.smoothquant import choose
from rac.runtime.simulate import simulated

METHODS = ("original", "rtn", "gptq", "quarot-rtn", "quarot-gptq", "smooth-rtn", "dense=FILE")


class Bar:
    """A model, its texts, and the settings of all rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        evaluate.HOLD = 1 << 32  # the original runs once
        self.measure = evaluate.Measure(args.folder, args.test.read_text(encoding="utf-8"), args.tokens, args.context)
        text = args.calibration.read_text(encoding="utf-8")
        self.ids = layerwise.calibration_ids(os.fspath(args.folder), text, args.calibrate)
        self.own = {name: w.clone() for name, w in self.measure.model.state_dict().items()}

    def row(self, method: str) -> str:
        """A line of the table."""
        a = self.args
        if method == "original" and not a.activations and not a.kv:
            return self.line("original", self.measure.figures(), 0.0)
        start = time.monotonic()
        model = self.measure.load({name: w.clone() for name, w in self.own.items()}, method)
        note = self.made(model, method)
        took = time.monotonic() - start
        around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if a.activations or a.kv:
            around = simulated(
                model, a.activations, a.kv, clip=a.clip, rotate_keys=method.startswith("quarot"), seed=a.seed
            )
        with around:
            found = self.measure.figures(model, method)
        return self.line(f"{method}{note}", found, took)

    @staticmethod
    def line(name: str, found: evaluate.Figures, took: float) -> str:
        """Of the table."""
        return f"| {name} | {found.perplexity:.3f} | {found.kl:.4f} | {found.top1:.2%} | {took:.0f} |"

    def made(self, model: Any, method: str) -> str:
        """Do what a method does; returns what is to be said of it."""
        a = self.args
        how = {"symmetric": a.symmetric, "search": a.search}
        note = ""
        if method.startswith("dense="):
            from safetensors.torch import load_file

            state, theirs = model.state_dict(), load_file(method.partition("=")[2])
            for name, w in theirs.items():
                state[name].copy_(w)
            return f" ({len(theirs)} matrices)"
        ids = torch.from_numpy(self.ids)
        if method.startswith("quarot"):
            before = transforms.logits(model, ids[0, :64])
            p = transforms.parts(model)
            transforms.quarot(p, a.seed)
            transforms.require_same(before, p, ids[0, :64])
        if method.startswith("smooth"):
            p = transforms.parts(model)
            maxima = transforms.maxima(p, ids[:4].split(1))
            alpha, errors = choose(p, maxima, ids[:4].split(1), bits=a.bits, activations=a.activations)
            transforms.smooth(p, maxima, alpha)
            note = f" alpha {alpha:g} ({', '.join(f'{k:g}: {v:.4g}' for k, v in errors.items())})"
        if method.endswith("gptq"):
            layerwise.quantise_gptq(model, self.ids, a.bits, a.group, note=report, **how)
        elif method.endswith("rtn"):
            layerwise.quantise_rtn(model, a.bits, a.group, **how)
        return note


def report(what: str, done: int, of: int) -> None:
    """Progress, on standard error."""
    print(f"{what} {done} of {of}", file=sys.stderr, flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("methods", nargs="+", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=lambda g: None if g == "row" else int(g), default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--search", action="store_true", help="search the range of each group")
    parser.add_argument("--activations", type=int)
    parser.add_argument("--kv", type=int)
    parser.add_argument("--clip", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate", type=int, default=40960, help="tokens")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    bar = Bar(args)
    print("| method | perplexity | KL | top-1 | seconds to make |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
    for method in args.methods:
        print(bar.row(method), flush=True)


if __name__ == "__main__":
    main()
