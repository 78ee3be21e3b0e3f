"""`rac compare`: files against their original; with --recipes all named methods on one model."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from rac.cli.pack import GROUP
from rac.cli.running import add_simulated, add_windows, offline, simulated, simulation
from rac.cli.terminal import EFFORTS, PICKLES, Steps, argument, command
from rac.container.output import write_whole
from rac.encode.allocate.budget import read_text
from rac.study.analyze.svg import Axes, lines
from rac.study.compare import Reading, Within, compare

if TYPE_CHECKING:
    from rac.study.benchmark import Plan

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
    argument(
        p,
        "--text FILE|auto",
        "measure KL, top-1 agreement and perplexity on this text; auto: a part of the built-in mix",
    )
    add_windows(p)
    argument(p, "--snr", "the SNR of the layers' outputs on the text too: one more pass")
    add_simulated(p)
    _add_benchmark(p)
    argument(p, "--allow-pickle-weights", PICKLES)
    argument(p, "--json", "for programs")


def run(args: argparse.Namespace) -> int:
    """Compare, and print the rows as they come."""
    if args.recipes:
        return _benchmark(args)
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

    within = [partial(simulation, args) if simulated(args) else None]
    for row in compare(args.original, args.files, reading, note, within, args.allow_pickle_weights):
        if sys.stderr.isatty() and not args.quiet:
            sys.stderr.write("\r\x1b[K")
        lines.append(Steps())
        values = dataclasses.asdict(row)
        rows.append({key: values[key] for key in ("file", *(c[0] for c in columns))})
        if args.json or args.quiet:
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
    if reading is None and not args.quiet and any(row["quantised_bits"] is not None for row in rows[1:]):
        print(f"rac: {BY_WEIGHTS}", file=sys.stderr)
    return 0


BY_WEIGHTS = (
    "the SNR of weights does not rank lossy files: a calibrated one has more error in its weights and predicts better; "
    "--text FILE, or --text auto for a part of the built-in mix, measures what they predict"
)
_COLUMNS = (
    ("size", "         bytes", ",", False),
    ("bits", "bits of the file", ".3f", False),
    ("quantised_bits", "of quantised", ".4f", False),
    ("snr", "SNR, dB", ".2f", False),
    ("weighted_snr", "output SNR, dB", ".2f", True),
    ("kl", "KL, nats", ".5f", True),
    ("top1", "top-1", ".2%", True),
    ("perplexity", "perplexity", ".3f", True),
)
"""Field of a row, heading, format, whether it needs a text."""


_COLOURS = ("#888888", "#1b6ca8", "#2a9d8f", "#e9a23b", "#c8553d", "#7b4fa6", "#111111")
_FIELDS = {
    "recipe": ("recipe", ""),
    "bits": ("bits", ""),
    "seed": ("seed", ""),
    "coded": ("coded", ".3f"),
    "fixed": ("fixed rate", ".3f"),
    "size": ("file, bytes", ","),
    "seconds": ("seconds", ".0f"),
    "kl": ("KL, nats", ".4f"),
    "perplexity": ("perplexity", ".3f"),
}
"""Heading and format of the fields of a row."""
_QUANTISED = {"kl_quantised": ("KL, {}", ".4f"), "perplexity_quantised": ("perplexity, {}", ".3f")}


def _add_benchmark(p: argparse.ArgumentParser) -> None:
    """The arguments of the benchmark."""
    b = p.add_argument_group(
        "benchmark", "Pack ORIGINAL by named methods (rac pack --recipe) and compare what comes of it; no FILE then."
    )
    argument(b, "--recipes A,B|all", "rtn, gptq, smoothquant, quarot, spinquant, kurtail, aligned")
    argument(b, "--bits B,C", "whole numbers from 2 to 8 (default: 2,3,4)", default="2,3,4")
    argument(b, "--calibrate FILE", "text to calibrate on")
    argument(b, "--calibration-tokens N", "of it (default: 40960)", type=int, default=40960)
    argument(b, "--group N|row", "columns that share a scale", type=GROUP, default=128)
    argument(b, "--symmetric", "grids about zero")
    argument(b, "--steps N", "of what learns (default: 100)", type=int, default=100)
    argument(b, "--seeds A,B", "of rotations: recipes that draw come once for each (default: 0)", default="0")
    argument(b, "--effort", "of the aligned recipe", choices=EFFORTS, default="default")
    argument(b, "--out DIR", "where the files go, and points.json, the list of them")
    argument(b, "--reuse", "take files that DIR has from an earlier run with the same settings")
    argument(b, "--plot FILE.svg", "bits of a quantised weight against KL")


def _benchmark(args: argparse.Namespace) -> int:
    """Make, measure, print."""
    if args.files or not args.text or not args.out:
        raise ValueError("--recipes takes --text and --out, and no FILE")
    plan = _plan(args)
    offline()
    reading = Reading(read_text(args.text), args.tokens, args.context)
    made = []
    with Steps() as note:
        from rac.study.benchmark import points

        for point in points(args.original, args.out, plan, note):
            made.append(point)
            note(f"{point.path}: {point.coded:.3f} bits per quantised weight, {point.seconds:.0f} s", 0, 0)
    within: list[Within | None] = [None, *([partial(simulation, args)] if simulated(args) else [])]
    say = (lambda _: None) if args.json else _lines_of(args)
    with Steps() as note:
        found = compare(args.original, [point.path for point in made], reading, note, within)
        rows = [{"recipe": "original", **dataclasses.asdict(next(found))}]
        say({key: rows[0][key] for key in ("recipe", "size", "perplexity")})
        for point in made:
            rows.append(dataclasses.asdict(point))
            for of, row in zip(("", "_quantised"), itertools.islice(found, len(within)), strict=False):
                rows[-1] |= {f"kl{of}": row.kl, f"perplexity{of}": row.perplexity}
            say(rows[-1])
    if args.json:
        print(json.dumps(rows, indent=1))
    for mean in _spread(rows[1:]):
        say(mean)
    if args.plot:
        _plot(args.plot, rows[1:], "kl_quantised" if simulated(args) else "kl")
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    """What is to be made."""
    from rac.methods.named import Method  # imports torch
    from rac.study.benchmark import ALL, Plan

    recipes = ALL if args.recipes == "all" else tuple(args.recipes.split(","))
    bits, seeds = _whole("--bits", args.bits, 2, 8), _whole("--seeds", args.seeds, 0, 2**32 - 1)
    made = Method("rtn", 4, args.group, text=args.calibrate, tokens=args.calibration_tokens, steps=args.steps)
    method = dataclasses.replace(made, activations=args.activations or 4, seed=seeds[0], symmetric=args.symmetric)
    return Plan(recipes, bits, method, seeds, args.effort, args.reuse)


def _whole(option: str, given: str, low: int, high: int) -> tuple[int, ...]:
    """Different whole numbers between commas."""
    found = tuple(int(n) for n in given.split(",") if n.isdecimal() and low <= int(n) <= high)
    if len(set(found)) != len(given.split(",")):
        raise ValueError(f"{option} are different whole numbers from {low} to {high}, not {given!r}")
    return found


def _lines_of(args: argparse.Namespace) -> Any:
    """Print the head of a table; returns what prints a row of it, whose texts stay as they are."""
    columns = _FIELDS | (_QUANTISED if simulated(args) else {})

    def say(row: dict[str, Any]) -> None:
        cells = ((row.get(key), form) for key, (_, form) in columns.items())
        said = ("" if v is None else v if isinstance(v, str) else format(v, form) for v, form in cells)
        print("| " + " | ".join(said) + " |", flush=True)

    say({key: head.format(f"A{args.activations or 16}KV{args.kv or 16}") for key, (head, _) in columns.items()})
    print("| --- |" + " ---: |" * (len(columns) - 1))
    return say


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of texts: the mean of several seeds, and from where to where they go."""

    def kind(row: dict[str, Any]) -> tuple[str, int]:
        return row["recipe"], -row["bits"]

    out = []
    for (recipe, bits), group in itertools.groupby(sorted(rows, key=kind), kind):
        seeds = list(group)
        if len(seeds) == 1:
            continue
        out.append({"recipe": recipe, "bits": -bits, "seed": f"mean of {len(seeds)}"})
        for name, (_, form) in (_FIELDS | _QUANTISED).items():
            if name.startswith(("kl", "perplexity")) and name in seeds[0]:
                found = [row[name] for row in seeds]
                mean, low, high = (format(v, form) for v in (sum(found) / len(found), min(found), max(found)))
                out[-1][name] = f"{mean} ({low} to {high})"
    return out


def _plot(path: str, rows: list[dict[str, Any]], kl: str) -> None:
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(names))]
    series = [
        (f"s{i}", sorted((r["coded"], r[kl]) for r in rows if r["recipe"] == name)) for i, name in enumerate(names)
    ]
    drawn = lines(series, Axes("bits of a quantised weight, all counted", "KL, nats", log=True, height=300))
    style = "text{font:10px sans-serif}.grid{stroke:#ddd}.axis{stroke:#777}.line{fill:none;stroke-width:1.7}"
    style += "".join(f".s{i}{{stroke:{colour}}}" for i, colour in enumerate(colours))
    key = "".join(f'<text x="320" y="{24 + 13 * i}" fill="{colours[i]}">{name}</text>' for i, name in enumerate(names))
    key += '<text x="42" y="20">KL, nats</text>'
    body = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="800" ', 1)
    write_whole(path, body.replace("</svg>", f"<style>{style}</style>{key}</svg>"))
    print(f"plot {path}", file=sys.stderr)
