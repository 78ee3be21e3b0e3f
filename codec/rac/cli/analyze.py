"""`rac analyze`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from rac.container.output import write_whole
from rac.errors import OutputError

HELP = """\
What bases do to the weights of a model: as they are, rotated by Hadamard matrices, by learned rotations, in the
principal directions of the inputs, and by triangular alignment. For every large matrix its kurtosis, outliers, ranks,
energies and entropy, and the bits that the coder of the format takes in each basis at equal error of the outputs.

MODEL is whatever can be packed; with --text a Hugging Face folder, which reads half of the tokens for the bases and
half to judge them. Without --text error is that of the weights, and there are no bases that follow the inputs.

  rac analyze model/ --text text.txt --html report.html
  rac analyze model/ --text text.txt --json report.json --png report.png --layers "*.mlp.*"
  rac analyze model/ --text text.txt --rotation spinquant=m.rac"""


def add(commands: Any) -> None:
    """Add the command."""
    p = commands.add_parser(
        "analyze",
        help="what rotation and alignment do to the weights of a model",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("src", metavar="MODEL", help="what to measure")
    p.add_argument("--text", metavar="FILE", help="a text for the inputs of the layers")
    p.add_argument("--tokens", type=int, default=16384, metavar="N", help="of that text (default: 16384)")
    p.add_argument("--seen", action="store_true", help="judge errors by the text that the bases come from, all of it")
    p.add_argument("--html", metavar="FILE", help="write a report for people: one page, nothing else needed")
    p.add_argument("--json", metavar="FILE", help="write it for programs (docs/analyze.md)")
    p.add_argument("--png", metavar="FILE", help="write a picture; needs rac-codec[plot]")
    p.add_argument("--layers", default="*", metavar="PATTERN", help="only matrices whose names match (default: all)")
    p.add_argument(
        "--rotation",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="learned rotations: a file of rac pack --recipe spinquant or kurtail; may be given more than once",
    )
    p.add_argument(
        "--bits",
        type=float,
        default=4.0,
        metavar="B",
        help="of the original basis, about: its error is that of all (default: 4)",
    )
    p.add_argument("--cache", metavar="DIR", help="where calibrations are kept (default: ~/.cache/rac; none: nowhere)")
    p.add_argument("-j", "--jobs", type=int, metavar="N", help="matrices at a time (default: one per core, at most 8)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, write what was asked for, and print the means."""
    from rac.cli.pack import _cache
    from rac.cli.progress import Steps
    from rac.encode.allocate.budget import read_text
    from rac.study.analyze import analyze, html, read_rotations

    if args.jobs is not None and args.jobs < 1:
        raise ValueError("--jobs must be at least 1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is read from disk
    text = None if args.text is None else read_text(args.text)
    rotations = [read_rotations(path, name) for name, path in map(_named, args.rotation)]
    if len({r.name for r in rotations}) < len(rotations):
        raise ValueError("--rotation: two have one name")
    wanted = [path for path in (args.html, args.json, args.png) if path]
    for path in wanted:
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):  # before minutes of work, not after
            raise OutputError("no such folder", file=os.path.dirname(os.path.abspath(path)))
    if args.png:
        from rac.study.analyze import picture

        picture.require()
    with Steps() as note:
        report = analyze(
            args.src,
            text,
            tokens=args.tokens,
            layers=args.layers,
            rotations=rotations,
            rate=args.bits,
            seen=args.seen,
            cache=_cache(args.cache),
            jobs=args.jobs,
            note=note,
        )
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
    from rac.study.analyze.bases import NAMES

    if name in NAMES:
        raise ValueError(f"--rotation: {name!r} is the name of another basis")
    return name, path


_COLUMNS = (
    ("bits", "bits", ".3f"),
    ("kurtosis", "kurtosis", ".2f"),
    ("kurtosis_rows", "of rows", ".2f"),
    ("outlier", "max/rms", ".1f"),
    ("effective_rank", "eff. rank", ".0f"),
    ("stable_rank", "stable", ".1f"),
    ("top10", "top 10%", ".1%"),
    ("gini", "Gini", ".3f"),
    ("entropy", "entropy", ".3f"),
)


def _table(report: Mapping[str, Any]) -> str:
    """Means by basis, and where alignment takes fewer bits."""
    about, names = report["about"], {b["id"]: b["name"] for b in report["bases"]}
    width = max(map(len, names.values()))
    lines = [" " * width + "".join(f"  {head:>9}" for _, head, _ in _COLUMNS)]
    for key, name in names.items():
        m = report["model"][key]
        cells = ("-" if m[c] is None else format(m[c], form) for c, _, form in _COLUMNS)
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>9}" for cell in cells))
    for c in report["counts"]:
        lines.append(
            f"{names[c['aligned']]} below {names[c['rotated']]}: {c['fewer']} of {c['matrices']} matrices, "
            f"{c['blocks_fewer']} of {c['blocks']} layers"
        )
    error = (
        f"outputs on {about['tokens']:,} tokens{', seen' * about['seen']}"
        if about["tokens"]
        else "weights (no text: no aligned bases)"
    )
    some = "" if about["matrices"] == about["of"] else f" of {about['of']}"
    lines.append(
        f"{about['matrices']}{some} matrices, {about['weights']:,} weights; bits at equal error of the {error}; "
        f"{about['seconds']['all']:.0f} s, {about['seconds']['calibration']:.0f} of them calibration"
    )
    if about["unreached"]:
        lines.append(
            f"no inputs are known of {len(about['unreached'])} matrices: {', '.join(about['unreached'][:3])} ..."
        )
    return "\n".join(lines)
