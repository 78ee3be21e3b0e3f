"""`rac perplexity`."""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rac.cli.running import add_model, add_simulated, open_model, simulation

HELP = """\
Perplexity of a packed causal language model on a text.

The text is cut into windows that do not overlap; each is predicted by itself, without special tokens, and all its
positions but the last count: the figures are those of `rac compare`, which computes in float32 (--dtype float32).

  rac perplexity m.rac --text test.txt
  rac perplexity m.rac --text test.txt --tokens 2048 --context 512 --resident compressed
  rac perplexity m.rac --text test.txt --activations 4 --kv 4

Needs rac-codec[transformers]."""


def add(commands: Any) -> None:
    """Add the command."""
    p = commands.add_parser(
        "perplexity",
        help="how well a packed model predicts a text",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(p)
    p.add_argument("--text", metavar="FILE", required=True, help="the text, UTF-8")
    p.add_argument("--tokens", type=int, default=8192, metavar="N", help="of that text (default: 8192)")
    p.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of one window (default: 1024)")
    add_simulated(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, and print one line."""
    from rac.cli.progress import Steps
    from rac.decode.archive import RacFile
    from rac.encode.allocate.budget import read_text
    from rac.models.predictions import check
    from rac.provenance import Provenance

    check(args.tokens, args.context)
    text = read_text(args.text)
    model, tokenizer = open_model(args)
    from rac.runtime.text import perplexity

    around: AbstractContextManager[Any] = nullcontext()
    if args.activations is not None or args.kv is not None:
        with RacFile(args.src) as f:
            around = simulation(args, model, Provenance.of(f.archives[0].header, args.src))
    start = time.monotonic()
    with Steps() as note, around:
        found, cut, context = perplexity(model, tokenizer, text, args.tokens, args.context, note)
    seconds, count = time.monotonic() - start, cut * context
    bits = "".join(f", {n}-bit {what}" for what, n in (("activations", args.activations), ("cache", args.kv)) if n)
    print(
        f"{args.src}: perplexity {found:.3f} on {count:,} tokens of {args.text} in windows of "
        f"{context:,} ({args.resident}, {str(model.dtype).removeprefix('torch.')}{bits}, "
        f"{count / max(seconds, 1e-9):.0f} tokens per second)"
    )
    return 0
