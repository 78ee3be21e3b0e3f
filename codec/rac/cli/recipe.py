"""`rac pack --recipe`: the named methods of rotation and rounding."""

from __future__ import annotations

import argparse
import time
from typing import Any

NAMES = ("aligned", "rtn", "gptq", "smoothquant", "quarot", "spinquant", "kurtail")
"""The first is the ordinary lossy pack."""
_NOT: dict[str, Any] = {
    "file_bits": None,
    "size": None,
    "snr": None,
    "kl": None,
    "rank": None,
    "align": "auto",
    "embeddings": False,
    "effort": "default",
    "keep": [],
    "include": [],
    "exclude": [],
    "lanes": None,
    "slices": None,
    "shard_size": None,
    "resume": False,
    "report": None,
}
"""Arguments that a named method does not take, as they are where nobody gave them."""


def add(p: argparse.ArgumentParser) -> None:
    """The arguments of named methods."""
    named = p.add_argument_group(
        "named methods",
        "Quantisation after papers, on grids of groups (docs/methods/). SRC is the folder of a causal language model;\n"
        "embeddings and output layer stay lossless. `rac perplexity` and `rac compare` run the file, with quantised\n"
        "activations too (--activations, --kv).",
    )
    named.add_argument(
        "--recipe",
        choices=NAMES,
        default="aligned",
        help="aligned (default: ours, by the budgets above), rtn (round to nearest), gptq, smoothquant, quarot, "
        "spinquant, kurtail; with --bits 2 to 8 (default: 4) and --calibrate FILE",
    )
    named.add_argument(
        "--group", type=group_of, default=128, metavar="N|row", help="columns that share a scale (default: 128)"
    )
    named.add_argument(
        "--fixed-rate", action="store_true", help="store the integers at their fixed rate, not entropy-coded"
    )
    named.add_argument("--symmetric", action="store_true", help="grids about zero")
    named.add_argument(
        "--activations",
        type=int,
        default=4,
        metavar="B",
        help="bits of activations and cache that spinquant learns for (default: 4)",
    )
    named.add_argument("--steps", type=int, default=100, metavar="N", help="of what learns (default: 100)")
    named.add_argument("--seed", type=int, default=0, metavar="N", help="of rotations (default: 0)")


def group_of(given: str) -> int | None:
    """Columns of a group; None: a row."""
    if given == "row":
        return None
    if not given.isdecimal() or not int(given):
        raise argparse.ArgumentTypeError("must be row or a number of columns")
    return int(given)


def run(args: argparse.Namespace) -> int:
    """Pack by a named method, and say what came of it."""
    from rac.cli.fidelity import by_role
    from rac.cli.progress import Steps, size
    from rac.machine import threads_of
    from rac.methods.named import Method, pack_method

    for name, usual in _NOT.items():
        if getattr(args, name) != usual:
            raise ValueError(f"--recipe {args.recipe} does not take --{name.replace('_', '-')}")
    bits = 4 if args.bits is None else args.bits
    if bits != int(bits) or not 2 <= bits <= 8:
        raise ValueError(f"--recipe {args.recipe} takes whole --bits from 2 to 8, not {bits:g}")
    texts = [t for t in args.calibrate or () if t != "none"]
    if len(texts) > 1 or texts == ["self"]:
        raise ValueError(f"--recipe {args.recipe} calibrates on one text file")
    method = Method(
        args.recipe,
        int(bits),
        args.group,
        not args.fixed_rate,
        texts[0] if texts else None,
        args.tokens,
        args.activations,
        args.seed,
        args.symmetric,
        args.steps,
    )
    start = time.monotonic()
    with Steps() as note:
        done = pack_method(
            args.src, args.output, method, level=args.level, jobs=threads_of(args.jobs), force=args.force, note=note
        )
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
