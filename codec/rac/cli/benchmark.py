"""`rac compare --recipes`: all named methods on one model, in one table and one plot."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from functools import partial
from typing import Any

from rac.cli.recipe import group_of
from rac.cli.running import simulation
from rac.container.output import write_whole

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
    b.add_argument(
        "--seeds", default="0", metavar="A,B", help="of rotations: recipes that draw come once for each (default: 0)"
    )
    b.add_argument("--effort", choices=("fast", "default", "max"), default="default", help="of the aligned recipe")
    b.add_argument("--out", metavar="DIR", help="where the files go, and points.json, the list of them")
    b.add_argument(
        "--reuse", action="store_true", help="take files that DIR has from an earlier run with the same settings"
    )
    b.add_argument("--plot", metavar="FILE.svg", help="bits of a quantised weight against KL")


def run(args: argparse.Namespace) -> int:
    """Make, measure, print."""
    from rac.cli.progress import Steps
    from rac.encode.allocate.budget import read_text
    from rac.methods.named import Method
    from rac.study.benchmark import ALL, points
    from rac.study.compare import Within, compare

    if args.files or not args.text or not args.out:
        raise ValueError("--recipes takes --text and --out, and no FILE")
    recipes = list(ALL) if args.recipes == "all" else args.recipes.split(",")
    bits, seeds = _whole("--bits", args.bits, 2, 8), _whole("--seeds", args.seeds, 0, 2**32 - 1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is read from disk
    text = read_text(args.text)
    method = Method(
        "rtn",
        4,
        args.group,
        True,
        args.calibrate,
        args.calibration_tokens,
        args.activations or 4,
        seeds[0],
        args.symmetric,
        args.steps,
    )
    quantised = args.activations is not None or args.kv is not None
    made = []
    with Steps() as note:
        for point in points(
            args.original, args.out, recipes, bits, method, note, seeds=seeds, effort=args.effort, reuse=args.reuse
        ):
            made.append(point)
            note(f"{point.path}: {point.coded:.3f} bits per quantised weight, {point.seconds:.0f} s", 0, 0)
    within: list[Within | None] = [None, *([partial(simulation, args)] if quantised else [])]
    rows: list[dict[str, Any]] = []
    with Steps() as note:
        found = compare(
            args.original,
            [point.path for point in made],
            text,
            tokens=args.tokens,
            context=args.context,
            note=note,
            within=within,
        )
        rows.append({"recipe": "original", **dataclasses.asdict(next(found))})
        if not args.json:
            _print_head(args, rows[0])
        for point in made:
            rows.append(dataclasses.asdict(point))
            for of, row in zip(("", "_quantised"), itertools.islice(found, len(within)), strict=False):
                rows[-1] |= {f"kl{of}": row.kl, f"perplexity{of}": row.perplexity}
            if not args.json:
                _print(rows[-1])
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_spread(rows[1:])
    if args.plot:
        _plot(args.plot, rows[1:], "kl_quantised" if quantised else "kl")
    return 0


def _whole(option: str, given: str, low: int, high: int) -> list[int]:
    """Different whole numbers between commas."""
    found = [int(n) for n in given.split(",") if n.isdecimal() and low <= int(n) <= high]
    if len(set(found)) != len(given.split(",")):
        raise ValueError(f"{option} are different whole numbers from {low} to {high}, not {given!r}")
    return found


def _print_head(args: argparse.Namespace, original: dict[str, Any]) -> None:
    names = ["recipe", "bits", "seed", "coded", "fixed rate", "file, bytes", "seconds", "KL, nats", "perplexity"]
    if args.activations is not None or args.kv is not None:
        of = f"A{args.activations or 16}KV{args.kv or 16}"
        names += [f"KL, {of}", f"perplexity, {of}"]
    print("| " + " | ".join(names) + " |\n| --- |" + " ---: |" * (len(names) - 1))
    row = ["original", "", "", "", "", f"{original['size']:,}", "", "", f"{original['perplexity']:.3f}"]
    print("| " + " | ".join(row + [""] * (len(names) - len(row))) + " |", flush=True)


def _print(row: dict[str, Any]) -> None:
    fixed = "" if row["fixed"] is None else f"{row['fixed']:.3f}"
    out = [
        row["recipe"],
        str(row["bits"]),
        str(row["seed"]),
        f"{row['coded']:.3f}",
        fixed,
        f"{row['size']:,}",
        f"{row['seconds']:.0f}",
        f"{row['kl']:.4f}",
        f"{row['perplexity']:.3f}",
    ]
    if "kl_quantised" in row:
        out += [f"{row['kl_quantised']:.4f}", f"{row['perplexity_quantised']:.3f}"]
    print("| " + " | ".join(out) + " |", flush=True)


def _print_spread(rows: list[dict[str, Any]]) -> None:
    """The mean of several seeds, and from where to where they go."""
    for _, group in itertools.groupby(sorted(rows, key=_kind), _kind):
        seeds = list(group)
        if len(seeds) == 1:
            continue
        out = [seeds[0]["recipe"], str(seeds[0]["bits"]), f"mean of {len(seeds)}", *[""] * 4]
        for name, digits in (("kl", 4), ("perplexity", 3), ("kl_quantised", 4), ("perplexity_quantised", 3)):
            if found := [row[name] for row in seeds if name in row]:
                mean = sum(found) / len(found)
                out.append(f"{mean:.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})")
        print("| " + " | ".join(out) + " |", flush=True)


def _kind(row: dict[str, Any]) -> tuple[str, int]:
    return row["recipe"], -row["bits"]


def _plot(path: str, rows: list[dict[str, Any]], kl: str) -> None:
    from rac.study.analyze.svg import lines

    series = []
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    for name in names:
        series.append((f"s{names.index(name)}", sorted((r["coded"], r[kl]) for r in rows if r["recipe"] == name)))
    drawn = lines(series, "bits of a quantised weight, all counted", "KL, nats", log=True, height=300)
    style = "text{font:10px sans-serif}.grid{stroke:#ddd}.axis{stroke:#777}.line{fill:none;stroke-width:1.7}"
    style += "".join(f".s{i}{{stroke:{_COLOURS[i % len(_COLOURS)]}}}" for i in range(len(names)))
    key = "".join(
        f'<text x="320" y="{24 + 13 * i}" fill="{_COLOURS[i % len(_COLOURS)]}">{name}</text>'
        for i, name in enumerate(names)
    )
    key += '<text x="42" y="20">KL, nats</text>'
    body = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="800" ', 1)
    body = body.replace("</svg>", f"<style>{style}</style>{key}</svg>")
    write_whole(path, body)
    print(f"plot {path}", file=sys.stderr)
