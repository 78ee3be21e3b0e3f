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
from rac.cli.arguments import argument, command
from rac.cli.progress import Steps
from rac.cli.running import add_simulated, add_windows, offline, simulated, simulation
from rac.encode.allocate.budget import read_text
from rac.study.compare import Reading, compare

HELP = """\
Compare packed or quantised files of one model with their original: size, error, and with --text what they predict.

ORIGINAL is whatever can be packed; with --text the Hugging Face folder of a causal language model. FILE is a .rac,
.gguf or .safetensors file, or a folder. The SNR is that of the weights of all large matrices, embeddings and output
layer not counted; --snr adds that of the outputs of the linear layers on the text. With --activations and --kv every
FILE predicts with quantised activations; the original keeps its own."""


def add(p: argparse.ArgumentParser) -> None:
    """Add the command."""
    command(p, run, HELP)
    argument(p, "original ORIGINAL", "what they were made of")
    argument(p, "files FILE", "what to compare with it", nargs="*")
    argument(p, "--text FILE", "measure KL, top-1 agreement and perplexity on this text")
    add_windows(p)
    argument(p, "--snr", "the SNR of the layers' outputs on the text too: one more pass")
    add_simulated(p)
    benchmark.add(p)
    argument(p, "--json", "for programs")


def run(args: argparse.Namespace) -> int:
    """Compare, and print the rows as they come."""
    if args.recipes:
        return benchmark.run(args)
    if not args.files:
        raise ValueError("nothing to compare with: give a FILE, or --recipes")
    if args.snr and not args.text:
        raise ValueError("--snr measures on a text: give --text too")
    if simulated(args) and not args.text:
        raise ValueError("--activations and --kv are of predictions on a text: give --text too")
    offline()
    reading = Reading(read_text(args.text), args.tokens, args.context, args.snr) if args.text else None
    columns = [c for c in _COLUMNS if (reading or not c[3]) and (args.snr or c[0] != "weighted_snr")]
    names = {path: os.path.basename(os.path.normpath(path)) for path in (args.original, *args.files)}
    width = max(map(len, ("file", *names.values())))
    rows: list[dict[str, Any]] = []
    lines = [Steps()]

    def note(what: str, done: int, of: int) -> None:
        lines[-1](what, done, of)

    for row in compare(
        args.original, args.files, reading, note, [partial(simulation, args) if simulated(args) else None]
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
        line = f"{names[row.file]:<{width}}"
        for key, head, form, _ in columns:
            exact = key.endswith("snr") and len(rows) > 1 and not row.turned  # no error is not unknown
            none = "exact" if exact else "-"
            line += f"  {none if values[key] is None else format(values[key], form):>{max(len(head), 8)}}"
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
