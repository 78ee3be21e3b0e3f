"""`rac pack`."""

from __future__ import annotations

import argparse
import glob
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

HELP = """\
Pack a model into one .rac file: losslessly, or with --bits, --file-bits or --size to a budget in real bytes.

SRC is a .safetensors file, a Hugging Face model folder (its small files travel as attachments) or a .gguf file.
The file gets its name only when it is whole; an interrupted pack goes on with --resume."""


def add(commands: Any) -> None:
    """Add the command."""
    p = commands.add_parser(
        "pack", help="pack a model", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("src", metavar="SRC", help="what to pack")
    p.add_argument("-o", "--output", required=True, metavar="OUT.rac", help="the file to write")
    p.add_argument(
        "--level", choices=("fast", "default", "max"), default="default",
        help="effort: fast (exponents, one table), default (row and column classes), max (mantissa bits too; slow)",
    )  # fmt: skip
    p.add_argument("-j", "--jobs", type=int, metavar="N", help="threads (default: one per core, at most 8)")
    p.add_argument("--include", action="append", default=[], metavar="PATTERN", help="take only these tensors")
    p.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these tensors out")
    p.add_argument("--lanes", type=int, metavar="N", help="ANS lanes per tile: more for GPUs, fewer for size")
    p.add_argument("--shard-size", metavar="SIZE", help="start a new shard after SIZE of dense bytes, e.g. 5GB")
    lossy = p.add_argument_group(
        "lossy packing", "Large float matrices are quantised; embeddings, norms and small tensors stay lossless."
    )
    lossy.add_argument("--bits", type=float, metavar="B", help="bits per weight of the quantised tensors, all counted")
    lossy.add_argument("--file-bits", type=float, metavar="B", help="bits per weight of the whole file")
    lossy.add_argument("--size", metavar="SIZE", help="size of the file, e.g. 80MB")
    lossy.add_argument(
        "--calibrate", default="none", metavar="FILE", help="a text to calibrate on; none (default): the weights alone"
    )  # fmt: skip
    lossy.add_argument("--tokens", type=int, default=40960, metavar="N", help="of that text (default: 40960)")
    lossy.add_argument(
        "--effort", choices=("fast", "default", "max"), default="default",
        help="trellis of 32 states, of 256, or of 256 searched twice",
    )  # fmt: skip
    lossy.add_argument("--keep", action="append", default=[], metavar="PATTERN", help="keep these tensors lossless")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted pack")
    p.add_argument("--force", action="store_true", help="replace an existing file")
    p.set_defaults(run=run, interrupted=_interrupted)


def run(args: argparse.Namespace) -> int:
    """Pack, and say what came of it."""
    from rac.cli.progress import Progress, parse_size, size
    from rac.encode.budget import Request
    from rac.encode.pack import pack_source, recipe_of
    from rac.encode.sources import open_source

    if args.jobs is not None and args.jobs < 1:
        raise ValueError("--jobs must be at least 1")
    try:
        shard_size = None if args.shard_size is None else parse_size(args.shard_size)
        whole = None if args.size is None else parse_size(args.size)
    except argparse.ArgumentTypeError as e:
        raise ValueError(str(e)) from None
    budget = any(v is not None for v in (args.bits, args.file_bits, whole))
    if not budget and (args.calibrate != "none" or args.keep):
        raise ValueError("--calibrate and --keep are for lossy packing: give --bits, --file-bits or --size too")
    source = open_source(args.src, args.include, args.exclude)
    start = time.monotonic()

    def note(what: str, done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"rac: {what}" + (f", {done} of {of}" if of else ""), file=sys.stderr)

    recipe = None
    if budget:
        request = Request(
            args.bits, args.file_bits, whole, args.calibrate, args.tokens, args.effort, tuple(args.keep)
        )  # fmt: skip
        recipe = recipe_of(
            source, args.src, args.output, request, level=args.level, jobs=args.jobs, force=args.force, note=note
        )
    with Progress("packing", sum(t.nbytes for t in source.tensors)) as progress:
        done = pack_source(
            source, args.output, level=args.level, jobs=args.jobs, lanes=args.lanes, shard_size=shard_size,
            resume=args.resume, force=args.force, progress=progress,
            settings={"include": args.include, "exclude": args.exclude}, recipe=recipe,
        )  # fmt: skip
    seconds = time.monotonic() - start
    if done.skipped:
        print(f"rac: not packed: {_some(done.skipped)}", file=sys.stderr)
    if args.resume:
        print(f"{done.resumed} of {done.tensors} tensors were finished already")
    bits = 8 * done.stored / max(1, done.weights)
    what = done.paths[0] if len(done.paths) == 1 else f"{len(done.paths)} shards, {done.paths[0]} ..."
    print(
        f"{what}: {done.tensors} tensors, {size(done.dense)} -> {size(done.stored)} "
        f"({done.stored / max(1, done.dense):.2%}, {bits:.3f} bits per weight, all bytes counted) "
        f"in {seconds:.1f} s, {size(done.dense / max(seconds, 1e-9))}/s"
    )
    if recipe:
        if recipe.unreached and args.calibrate != "none":
            print(
                f"rac: calibration did not reach {len(recipe.unreached)} tensors, which are quantised from the weights "
                f"alone: {_some(recipe.unreached)}",
                file=sys.stderr,
            )
        print(f"lossy: {done.quantised} tensors quantised at {done.quantised_bits:.4f} bits per weight, all counted")
    return 0


def _interrupted(args: argparse.Namespace) -> str:
    """What an interrupted pack has left; nothing where it had not begun to write."""
    shards = glob.escape(args.output.removesuffix(".rac")) + "-*-of-*.rac.part"
    left = os.path.exists(f"{args.output}.part") or glob.glob(shards)
    return "; the finished part is kept, run again with --resume" if left else ""


def _some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
