"""`rac pack --recipe`: the named methods of rotation and rounding."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

from rac.cli.arguments import argument, number
from rac.cli.fidelity import by_role
from rac.cli.progress import Steps, size
from rac.machine import threads_of
from rac.methods.recipes import Method, pack_method

NAMES = ("aligned", "rtn", "gptq", "smoothquant", "quarot", "spinquant", "kurtail")
"""The first is the ordinary lossy pack."""
GROUP = number("row", 1, "a number of columns")
"""Columns of a group; None: a row."""
NAMED = """\
Quantisation after papers, on grids of groups (docs/methods/). SRC is the folder of a causal language model;
embeddings and output layer stay lossless. `rac perplexity` and `rac compare` run the file, with quantised
activations too (--activations, --kv)."""
RECIPE = """aligned (default: ours, by the budgets above), rtn (round to nearest), gptq, smoothquant, quarot, spinquant,
kurtail; with --bits 2 to 8 (default: 4) and --calibrate FILE"""
_NOT: dict[str, Any] = {
    **dict.fromkeys(("file_bits", "size", "snr", "kl", "rank", "lanes", "slices", "shard_size", "report")),
    **{name: [] for name in ("keep", "include", "exclude")},
    **dict.fromkeys(("embeddings", "resume"), False),
    "align": "auto",
    "effort": "default",
}
"""Arguments that a named method does not take, as they are where nobody gave them."""


def add(p: argparse.ArgumentParser) -> None:
    """The arguments of named methods."""
    named = p.add_argument_group("named methods", NAMED)
    argument(named, "--recipe", RECIPE, choices=NAMES, default="aligned")
    argument(named, "--group N|row", "columns that share a scale (default: 128)", type=GROUP, default=128)
    argument(named, "--fixed-rate", "store the integers at their fixed rate, not entropy-coded")
    argument(named, "--symmetric", "grids about zero")
    about = "bits of activations and cache that spinquant learns for (default: 4)"
    argument(named, "--activations B", about, type=int, default=4)
    argument(named, "--steps N", "of what learns (default: 100)", type=int, default=100)
    argument(named, "--seed N", "of rotations (default: 0)", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Pack by a named method, and say what came of it."""
    for name, usual in _NOT.items():
        if getattr(args, name) != usual:
            raise ValueError(f"--recipe {args.recipe} does not take --{name.replace('_', '-')}")
    bits = 4 if args.bits is None else args.bits
    if bits != int(bits) or not 2 <= bits <= 8:
        raise ValueError(f"--recipe {args.recipe} takes whole --bits from 2 to 8, not {bits:g}")
    texts = [t for t in args.calibrate or () if t != "none"]
    if len(texts) > 1 or texts == ["self"]:
        raise ValueError(f"--recipe {args.recipe} calibrates on one text file")
    method = Method(args.recipe, int(bits), args.group, not args.fixed_rate, texts[0] if texts else None, args.tokens)
    method = replace(method, activations=args.activations, seed=args.seed, symmetric=args.symmetric, steps=args.steps)
    start, options = time.monotonic(), {"level": args.level, "jobs": threads_of(args.jobs), "force": args.force}
    with Steps() as note:
        done = pack_method(args.src, args.output, method, note=note, **options)
    seconds = time.monotonic() - start
    weights = 8 * done.stored / max(1, done.weights)
    print(by_role(done.fidelity))
    print(
        f"{args.output}: {args.recipe}, {done.quantised} tensors quantised at {done.quantised_bits:.4f} bits per "
        f"weight, all counted; the file {size(done.stored)}, {weights:.3f} bits per weight, in {seconds:.1f} s"
    )
    if args.measure:
        from rac.cli.pack import measure

        measure(args.src, args.output, args.measure)
    return 0
