"""`rac analyze`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from rac.cli.pack import cache
from rac.cli.running import offline
from rac.cli.terminal import Steps, argument, command
from rac.container.output import write_whole
from rac.encode.allocate.budget import read_text
from rac.errors import OutputError
from rac.study.analyze import picture
from rac.study.analyze.bases import NAMES, read_rotations
from rac.study.analyze.measures import FIGURES
from rac.study.analyze.model import Asked, analyze
from rac.study.analyze.report import html

HELP = """\
What bases do to the weights of a model: as they are, rotated by Hadamard matrices, by learned rotations, in the
principal directions of the inputs, and by triangular alignment. For every large matrix its kurtosis, outliers, ranks,
energies and entropy, and the bits that the coder of the format takes in each basis at equal error of the outputs.

MODEL is whatever can be packed; with --text a Hugging Face folder, which reads half of the tokens for the bases and
half to judge them. Without --text error is that of the weights, and there are no bases that follow the inputs.

  rac analyze model/ --text text.txt --html report.html
  rac analyze model/ --text text.txt --json report.json --png report.png --layers "*.mlp.*"
  rac analyze model/ --text text.txt --rotation spinquant=m.rac"""


def add(p: argparse.ArgumentParser) -> None:
    """Add the command."""
    command(p, run, HELP)
    argument(p, "src MODEL", "what to measure")
    argument(p, "--text FILE", "a text for the inputs of the layers")
    argument(p, "--tokens N", "of that text (default: 16384)", type=int, default=16384)
    argument(p, "--seen", "judge errors by the text that the bases come from, all of it")
    argument(p, "--html FILE", "write a report for people: one page, nothing else needed")
    argument(p, "--json FILE", "write it for programs (docs/analyze.md)")
    argument(p, "--png FILE", "write a picture; needs rac-codec[plot]")
    argument(p, "--layers PATTERN", "only matrices whose names match (default: all)", default="*")
    learned = "learned rotations: a file of rac pack --recipe spinquant or kurtail; may be given more than once"
    argument(p, "--rotation NAME=FILE", learned, action="append", default=[])
    rate = "of the original basis, about: its error is that of all (default: 4)"
    argument(p, "--bits B", rate, type=float, default=4.0)
    argument(p, "--cache DIR", "where calibrations are kept (default: ~/.cache/rac; none: nowhere)")
    argument(p, "-j --jobs N", "matrices at a time (default: one per core, at most 8)", type=int)


def run(args: argparse.Namespace) -> int:
    """Measure, write what was asked for, and print the means."""
    if args.jobs is not None and args.jobs < 1:
        raise ValueError("--jobs must be at least 1")
    offline()
    text = None if args.text is None else read_text(args.text)
    rotations = tuple(read_rotations(path, name) for name, path in map(_named, args.rotation))
    if len({r.name for r in rotations}) < len(rotations):
        raise ValueError("--rotation: two have one name")
    for path in filter(None, (args.html, args.json, args.png)):
        if not os.path.isdir(folder := os.path.dirname(os.path.abspath(path))):  # before minutes of work, not after
            raise OutputError("no such folder", file=folder)
    if args.png:
        picture.require()
    asked = Asked(args.tokens, args.layers, rotations, args.bits, args.seen, cache(args.cache), args.jobs)
    with Steps() as note:
        report = analyze(args.src, text, asked, note)
    if args.json:
        write_whole(args.json, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if args.html:
        write_whole(args.html, html(report))
    if args.png:
        write_whole(args.png, picture.png(report))
    print(_table(report))
    return 0


def _named(given: str) -> tuple[str, str]:
    name, _, path = given.rpartition("=")
    name = name or os.path.splitext(os.path.basename(path))[0]
    if name in NAMES:
        raise ValueError(f"--rotation: {name!r} is the name of another basis")
    return name, path


def _table(report: Mapping[str, Any]) -> str:
    """Means by basis, and where alignment takes fewer bits."""
    about, names = report["about"], {b["id"]: b["name"] for b in report["bases"]}
    columns = [(key, head, form) for key, _, head, form in FIGURES if head]
    width = max(map(len, names.values()))
    lines = [" " * width + "".join(f"  {head:>9}" for _, head, _ in columns)]
    for key, name in names.items():
        m = report["model"][key]
        cells = ("-" if m[c] is None else format(m[c], form) for c, _, form in columns)
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>9}" for cell in cells))
    for c in report["counts"]:
        fewer = f"{c['fewer']} of {c['matrices']} matrices, {c['blocks_fewer']} of {c['blocks']} layers"
        lines.append(f"{names[c['aligned']]} below {names[c['rotated']]}: {fewer}")
    error = "weights (no text: no aligned bases)"
    if about["tokens"]:
        error = f"outputs on {about['tokens']:,} tokens{', seen' * about['seen']}"
    some = "" if about["matrices"] == about["of"] else f" of {about['of']}"
    lines.append(
        f"{about['matrices']}{some} matrices, {about['weights']:,} weights; bits at equal error of the {error}; "
        f"{about['seconds']['all']:.0f} s, {about['seconds']['calibration']:.0f} of them calibration"
    )
    if unknown := about["unreached"]:
        lines.append(f"no inputs are known of {len(unknown)} matrices: {', '.join(unknown[:3])} ...")
    return "\n".join(lines)
