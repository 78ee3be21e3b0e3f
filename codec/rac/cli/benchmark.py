"""`rac compare --recipes`: all named methods on one model, in one table and one plot."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from functools import partial
from typing import Any

from rac.cli.recipe import group_of
from rac.cli.running import simulation
from rac.errors import OutputError

_HEAD = ("recipe", "bits", "coded", "fixed rate", "file, bytes", "KL, nats", "perplexity", "seconds")
_COLOURS = ("#888888", "#1b6ca8", "#2a9d8f", "#e9a23b", "#c8553d", "#7b4fa6", "#111111")


def add(p: argparse.ArgumentParser) -> None:
    """The arguments of the benchmark."""
    b = p.add_argument_group(
        "benchmark", "Pack ORIGINAL by named methods (rac pack --recipe) and compare what comes of it; no FILE then."
    )
    b.add_argument("--recipes", metavar="A,B|all", help="rtn, gptq, smoothquant, quarot, spinquant, kurtail, aligned")
    b.add_argument("--bits", default="2,3,4", metavar="B,C", help="whole numbers from 2 to 8 (default: 2,3,4)")
    b.add_argument("--calibrate", metavar="FILE", help="text to calibrate on")
    b.add_argument("--calibration-tokens", type=int, default=40960, metavar="N", help="of it (default: 40960)")
    b.add_argument("--group", type=group_of, default=128, metavar="N|row", help="columns that share a scale")
    b.add_argument("--symmetric", action="store_true", help="grids about zero")
    b.add_argument("--steps", type=int, default=100, metavar="N", help="of what learns (default: 100)")
    b.add_argument("--seed", type=int, default=0, metavar="N", help="of rotations (default: 0)")
    b.add_argument("--effort", choices=("fast", "default", "max"), default="default", help="of the aligned recipe")
    b.add_argument("--out", metavar="DIR", help="where the files go (with --recipes)")
    b.add_argument("--plot", metavar="FILE.svg", help="bits of a quantised weight against KL")


def run(args: argparse.Namespace) -> int:
    """Make, measure, print."""
    from rac.cli.progress import Steps
    from rac.encode.benchmark import ALL, points
    from rac.encode.budget import read_text
    from rac.encode.compare import compare
    from rac.encode.methods import Method

    if args.files or not args.text or not args.out:
        raise ValueError("--recipes takes --text and --out, and no FILE")
    recipes = list(ALL) if args.recipes == "all" else args.recipes.split(",")
    bits = [int(b) for b in args.bits.split(",") if b.isdecimal() and 2 <= int(b) <= 8]
    if len(bits) != len(args.bits.split(",")):
        raise ValueError(f"--bits are whole numbers from 2 to 8, not {args.bits!r}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is read from disk
    text = read_text(args.text)
    method = Method(
        "rtn", 4, args.group, True, args.calibrate, args.calibration_tokens, args.activations or 4, args.seed,
        args.symmetric, args.steps,
    )  # fmt: skip
    quantised = args.activations is not None or args.kv is not None
    within = partial(simulation, args) if quantised else None
    rows: list[dict[str, Any]] = []
    if not args.json:
        print("| " + " | ".join(_HEAD) + " |\n|" + " --- |" * 2 + " ---: |" * (len(_HEAD) - 2))
    made = points(args.original, args.out, recipes, bits, method, _note(), args.effort, cache=args.out)
    for point in made:
        with Steps() as note:
            found = compare(
                args.original, [point.path], text, tokens=args.tokens, context=args.context, note=note, within=within
            )  # fmt: skip
            row = list(found)
        if not rows:
            rows.append({"recipe": "original", **dataclasses.asdict(row[0])})
            if not args.json:
                print(f"| original | | | | {row[0].size:,} | | {row[0].perplexity:.3f} | |", flush=True)
        rows.append(dataclasses.asdict(point) | {"kl": row[1].kl, "perplexity": row[1].perplexity})
        fixed = "" if point.fixed is None else f"{point.fixed:.3f}"
        if not args.json:
            print(
                f"| {point.recipe} | {point.bits} | {point.coded:.3f} | {fixed} | {point.size:,} | {row[1].kl:.4f} "
                f"| {row[1].perplexity:.3f} | {point.seconds:.0f} |",
                flush=True,
            )
    if args.json:
        print(json.dumps(rows, indent=1))
    if args.plot:
        _plot(args.plot, rows[1:])
    return 0


def _note() -> Any:
    from rac.cli.progress import Steps

    return Steps()


def _plot(path: str, rows: list[dict[str, Any]]) -> None:
    from rac.encode.analyze.svg import lines

    series = []
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    for name in names:
        series.append((f"s{names.index(name)}", sorted((r["coded"], r["kl"]) for r in rows if r["recipe"] == name)))
    drawn = lines(series, "bits of a quantised weight, all counted", "KL, nats", log=True, height=300)
    style = "text{font:10px sans-serif}.grid{stroke:#ddd}.axis{stroke:#777}.line{fill:none;stroke-width:1.7}"
    style += "".join(f".s{i}{{stroke:{_COLOURS[i % len(_COLOURS)]}}}" for i in range(len(names)))
    key = "".join(
        f'<text x="320" y="{24 + 13 * i}" fill="{_COLOURS[i % len(_COLOURS)]}">{name}</text>'
        for i, name in enumerate(names)
    )
    body = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="800" ', 1)
    body = body.replace("</svg>", f"<style>{style}</style>{key}</svg>")
    try:
        with open(path, "w", encoding="utf-8") as f:
            f.write(body)
    except OSError as e:
        raise OutputError(f"cannot be written: {e.strerror}", file=path) from e
    print(f"plot {path}", file=sys.stderr)
