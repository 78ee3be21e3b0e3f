"""`rac compare`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from functools import partial
from typing import Any

from rac.cli import benchmark
from rac.cli.running import add_simulated, simulation

HELP = """\
Compare packed or quantised files of one model with their original: size, error, and with --text what they predict.

ORIGINAL is whatever can be packed; with --text the Hugging Face folder of a causal language model. FILE is a .rac,
.gguf or .safetensors file, or a folder. The SNR is that of the weights of all large matrices, embeddings and output
layer not counted; --snr adds that of the outputs of the linear layers on the text. With --activations and --kv every
FILE predicts with quantised activations; the original keeps its own."""


def add(commands: Any) -> None:
    """Add the command."""
    p = commands.add_parser(
        "compare",
        help="compare files with their original",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("original", metavar="ORIGINAL", help="what they were made of")
    p.add_argument("files", metavar="FILE", nargs="*", help="what to compare with it")
    p.add_argument("--text", metavar="FILE", help="measure KL, top-1 agreement and perplexity on this text")
    p.add_argument("--tokens", type=int, default=8192, metavar="N", help="of that text (default: 8192)")
    p.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of one window (default: 1024)")
    p.add_argument("--snr", action="store_true", help="the SNR of the layers' outputs on the text too: one more pass")
    add_simulated(p)
    benchmark.add(p)
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, and print the rows as they come."""
    from rac.cli.progress import Steps
    from rac.encode.allocate.budget import read_text
    from rac.study.compare import compare

    if args.recipes:
        return benchmark.run(args)
    if not args.files:
        raise ValueError("nothing to compare with: give a FILE, or --recipes")
    if args.snr and not args.text:
        raise ValueError("--snr measures on a text: give --text too")
    quantised = args.activations is not None or args.kv is not None
    if quantised and not args.text:
        raise ValueError("--activations and --kv are of predictions on a text: give --text too")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is read from disk
    text = None if args.text is None else read_text(args.text)
    columns = [c for c in _COLUMNS if text is not None or not c[3]]
    columns = [c for c in columns if args.snr or c[0] != "weighted_snr"]
    files = [args.original, *args.files]
    width = max(len("file"), *(len(_name(f)) for f in files))
    rows = []
    lines = [Steps()]
    for row in compare(
        args.original,
        args.files,
        text,
        tokens=args.tokens,
        context=args.context,
        snr=args.snr,
        note=lambda what, done, of: lines[-1](what, done, of),
        within=[partial(simulation, args) if quantised else None],
    ):
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
        lines.append(Steps())
        values = dataclasses.asdict(row)
        rows.append({key: values[key] for key in ("file", *(c[0] for c in columns))})
        if args.json:
            continue
        if len(rows) == 1:
            print(f"{'file':<{width}}" + "".join(f"  {head:>{max(len(head), 8)}}" for _, head, _, _ in columns))
        line = f"{_name(row.file):<{width}}"
        for key, head, form, _ in columns:
            v = values[key]
            exact = key.endswith("snr") and len(rows) > 1 and not row.turned  # no error is not unknown
            cell = ("exact" if exact else "-") if v is None else format(v, form)
            line += f"  {cell:>{max(len(head), 8)}}"
        print(line, flush=True)
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    return 0


_COLUMNS = (
    ("size", "         bytes", ",", False),
    ("bits", "bits per weight", ".3f", False),
    ("quantised_bits", "of quantised", ".4f", False),
    ("snr", "SNR, dB", ".2f", False),
    ("weighted_snr", "output SNR, dB", ".2f", True),
    ("kl", "KL, nats", ".5f", True),
    ("top1", "top-1", ".2%", True),
    ("perplexity", "perplexity", ".3f", True),
)
"""Field of a row, heading, format, whether it needs a text."""


def _name(path: str) -> str:
    """The last part of a path."""
    return os.path.basename(os.path.normpath(path))
