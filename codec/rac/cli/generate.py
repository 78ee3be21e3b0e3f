"""`rac generate`."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from rac.cli.running import add_model, open_model

HELP = """\
Let a model write, straight from the archive: the simplest proof that it is whole and runs.

The prompt is taken as it is, without a chat template, and continued greedily (the same text every time) unless
--sample is given. The text goes to standard output, the speed to standard error.

  rac generate m.rac "The capital of France is" --tokens 20
  rac generate m.rac "Once upon a time" --resident compressed    weights stay compressed in memory
  rac generate m.rac "Once upon a time" --sample --seed 7

Needs rac-codec[transformers]."""


def add(commands: Any) -> None:
    """Add the command."""
    p = commands.add_parser(
        "generate",
        help="let a packed model write",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(p)
    p.add_argument("prompt", metavar="PROMPT", help="what the text begins with")
    p.add_argument("--tokens", type=int, default=64, metavar="N", help="write so many at most (default: 64)")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--greedy", action="store_true", help="always the likeliest token (the default)")
    how.add_argument("--sample", action="store_true", help="draw tokens, as the model's generation settings say")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of --sample (default: 0)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate, and print the text as it comes."""
    if args.tokens < 1:
        raise ValueError("--tokens must be at least 1")
    if not args.prompt:
        raise ValueError("the prompt is empty")
    model, tokenizer = open_model(args)

    from rac.runtime.text import generate

    sys.stdout.write(args.prompt)
    sys.stdout.flush()
    start = time.monotonic()
    ids = generate(model, tokenizer, args.prompt, args.tokens, args.seed if args.sample else None, stream=True)
    seconds = time.monotonic() - start
    print(f"{len(ids)} tokens in {seconds:.1f} s, {len(ids) / max(seconds, 1e-9):.1f} per second", file=sys.stderr)
    return 0
