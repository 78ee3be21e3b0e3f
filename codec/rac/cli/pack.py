"""`rac pack`."""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from rac.calibrate.evaluate import check_text
from rac.cli.ranks import end, share
from rac.cli.terminal import (
    EFFORTS,
    PICKLES,
    Progress,
    Steps,
    argument,
    clock,
    command,
    fitted,
    number,
    say,
    size,
    tell,
)
from rac.container.output import write_whole
from rac.dequantise import Dequantised, stated_in
from rac.encode import workers
from rac.encode.align.recipe import Recipe
from rac.encode.allocate.budget import read_text
from rac.encode.asked import Asked
from rac.encode.encoded import Fidelity
from rac.encode.estimate import Estimate, estimate
from rac.encode.options import CONTEXT, DEVICES, GOALS, Hooks, Lossy, PackOptions, one_goal
from rac.encode.pack import PIPE, ByTrellis, Packer, Summary
from rac.encode.sources import Source, open_source, ready
from rac.encode.sources.safetensors import parse_json
from rac.errors import OutputError, SourceError
from rac.machine import parse_size, threads_of
from rac.study import grouped, role
from rac.study.compare import Reading, compare

HELP = """\
Pack a model into one .rac file: losslessly, or with --bits, --file-bits or --size to a budget in real bytes, or with
--snr or --kl to a quality.

SRC is a .safetensors file, a Hugging Face model folder (its small files travel as attachments), a .gguf file, one of
numpy (.npy, .npz), ONNX, Keras (.h5), Flax (.msgpack) or torch (docs/compatibility.md), or a
repository of the Hub, ORG/NAME[@REVISION], also written hf://ORG/NAME (docs/hub.md). A path that exists wins. Of a
repository nothing is kept: losslessly it is read by ranges, a shard at a time; with a budget it is downloaded to a
temporary folder beside the output.

The file gets its name only when it is whole; an interrupted pack goes on with --resume.

  rac pack model/                                                       every bit kept, in model.rac
  rac pack org/name                                                     the same of a repository, in name.rac
  rac pack model/ -o - | ssh host 'cat > model.rac'                     into a pipe
  rac pack model/ -o model.rac --bits 3                                 3 bits per weight, more where it matters
  rac pack model/ -o model.rac --kl 0.05 --calibrate text.txt           as small as that divergence allows
  rac pack weights.safetensors -o weights.rac --size 80MB               from the weights alone
  rac pack model/ -o folder --format hf                                 for from_pretrained of transformers
  rac pack model.rac -o folder --format hf                              the same of what is packed already

A folder for from_pretrained has ordinary safetensors files whose large matrices are records of the format; loading it
needs `import rac.runtime` first, and its layers stay compressed in memory (docs/loading.md)."""


NAMES = ("aligned", "rtn", "gptq", "smoothquant", "quarot", "spinquant", "kurtail")
"""The first is the ordinary lossy pack."""
QUALITIES = {
    "small": (3.0, True, "about a fifth of a BF16 file"),
    "good": (4.0, True, "about a quarter of a BF16 file"),
    "best": (5.0, False, "embeddings and output layer exact; about a third of the others' bytes"),
}
"""Bits per weight, whether embeddings are quantised too, and what it means."""
GROUP = number("row", 1, "a number of columns")  # columns of a group; None: a row
NAMED = """\
Quantisation after papers, on grids of groups (docs/methods/). SRC is the folder of a causal language model;
embeddings and output layer stay lossless. `rac perplexity` and `rac compare` run the file, with quantised
activations too (--activations, --kv)."""
RANKS = """Each rank runs the same command with a number of its own, on any machine that sees SRC and the work folder;
any of them may die and be run again (docs/cluster.md). The bytes are those of one machine."""
RANKED = "which of the ranks this is, from 0 (default: 0)"
LEASED = "after so long without a sign of life others take over what a rank has begun (default: 60)"
RECIPE = """aligned (default: ours, by the budgets above), rtn (round to nearest), gptq, smoothquant, quarot, spinquant,
kurtail; with --bits 2 to 8 (default: 4) and --calibrate FILE"""
_NOT: dict[str, Any] = {
    **dict.fromkeys(
        ("quality", "file_bits", "size", "snr", "kl", "low_rank", "recover", "lanes", "slices", "shard_size", "report")
    ),
    **{name: [] for name in ("keep", "include", "exclude", "calibration")},
    **dict.fromkeys(("all_files", "no_backward", "resume", "dry_run"), False),
    "embeddings": True,
    "align": "auto",
    "context": CONTEXT,
    "device": "cpu",
    "effort": "default",
}
"""Arguments that a named method does not take, as they are where nobody gave them."""
LOSSY: dict[str, Any] = {
    **dict.fromkeys(("calibrate", "low_rank", "recover", "cache", "measure", "report")),
    **{name: [] for name in ("calibration", "keep")},
    "no_backward": False,
    "embeddings": True,
    "tokens": 40960,
    "context": CONTEXT,
    "device": "cpu",
    "effort": "default",
    "align": "auto",
}
"""Arguments that say nothing of a lossless pack, as they are where nobody gave them."""
_OF_NAMED = {"group": 128, "fixed_rate": False, "symmetric": False, "activations": 4, "steps": 100, "seed": 0}
"""Arguments of named methods, as they are where nobody gave them."""
BESIDE = ".packing.rac"  # ending of the file that is packed first where a folder is to be made
LOST = 0.01  # share of lost zeros from which on a tensor is named
ALARM = 10  # decibels of output signal to noise below which a layer is named
QUALITY = """a choice of the budgets below, said when it is made: small is --bits 3, good is --bits 4, best is --bits 5
--no-embeddings"""
OUTPUT = "the file to write (default: the name of SRC with .rac, in this folder); -: standard output, forward only"
OTHERS = dict.fromkeys(("vision tower", "projector"), "`--calibrate images/` does")
OTHERS["audio tower"] = "`--calibrate audio/` does"
ANY = "rac.calibrate does, where you run the model on inputs that use them"
"""What reaches parts of a model that a text does not."""
LEVEL = """effort: fast (for files that are written and read whole, and often: checkpoints, caches; exponents, one
table, tiles of whole rows), default (row and column classes), max (mantissa bits too; slow)"""
JOBS = """threads; more than 8 are processes where matrices are quantised (default: one per core, at most 8 where all is
lossless)"""
SLICES = """tiles so small that an eighth of any tensor is read with at most 64 KB (fine) or 1 MB (coarse) beyond 1.1
times its share, quantised ones up to 4 bits a weight (default: fine; coarse at --level max, with --lanes, and for
quantised tensors, which are smaller then; at --level fast tiles of whole rows, so that columns cost all of the
tensor)"""
CALIBRATE = """a text to calibrate on; for models that read more: a folder of pictures or of .wav files, a .jsonl of
pairs {"image", "text"}, a text of prompts for a pipeline of diffusers, one a line; self: the model writes one; auto
(default for the folder of a causal language model, or of a sentence encoder): the built-in mix of texts, and self of
a language model; none (default otherwise): the weights alone, which loses several times as much; may be given more
than once: a text unlike what the model will read does better together with self"""
CALIBRATION = """what rac.calibrate(module, batches).save(FILE) has written in Python: of images, audio, latents, any
forward; may be given more than once: one for each component of a pipeline"""
SEQUENCE = """tokens of a sequence, as many as the model has positions for at most (default: 1024; sentence
encoders: 16, 64 and 256); shorter ones take less memory"""
BACKWARD = """run forward only: a third to a half of the time, but how much outputs matter is not known then, and all
tokens count alike"""
DEVICE = """where blocks are calibrated, factors found, errors fed back and models recovered (default: cpu); another may
make other bytes, which the file says"""
CACHE = "where calibrations are kept, for resuming and for other budgets (default: ~/.cache/rac; none: nowhere)"
ALIGN = "coordinates of layers whose inputs are known (auto: triangular, or pca where its basis pays)"
RECOVER = """when all is quantised, train the gains of rows and norms, and biases, on the calibration text, and some of
the built-in mix where that is another, so many steps (auto: 240; none without a text and with --effort fast) until the
model predicts as the original does; the integers stay as they are (default: 0)"""
EMBEDDINGS = "quantise embeddings and output layers too (default), or keep them lossless"
RANK = "of a low-rank part in these layers (auto, the default: with --effort max what saves bits, else 0)"


def add(p: argparse.ArgumentParser) -> None:
    """Add the command."""
    command(p, run, HELP)
    p.set_defaults(left=_left)
    many: dict[str, Any] = {"action": "append", "default": []}
    argument(p, "src SRC", "what to pack; not needed with --finish", nargs="?")
    argument(p, "-o --output OUT.rac", OUTPUT)
    argument(p, "--level", LEVEL, choices=EFFORTS, default="default")
    argument(p, "-j --jobs N", JOBS, type=int)
    argument(p, "--include PATTERN", "take only these tensors", **many)
    argument(p, "--exclude PATTERN", "leave these tensors out", **many)
    argument(p, "--all-files", "take other files above 64 MB too")
    argument(p, "--allow-pickle-weights", PICKLES)
    argument(p, "--lanes N", "ANS lanes per tile: more for GPUs, fewer for size", type=int)
    argument(p, "--slices", SLICES, choices=("fine", "coarse"))
    argument(p, "--shard-size SIZE", "start a new shard after SIZE of dense bytes, e.g. 5GB")
    lossy = p.add_argument_group(
        "lossy packing", "Large float matrices are quantised, embeddings too; norms and small tensors stay lossless."
    )
    argument(lossy, "--quality small|good|best", QUALITY, choices=tuple(QUALITIES))
    argument(lossy, "--bits B", "bits per weight of the quantised tensors, embeddings and heads too", type=float)
    argument(lossy, "--file-bits B", "bits per weight of the whole file", type=float)
    argument(lossy, "--size SIZE", "size of the file, e.g. 80MB")
    argument(lossy, "--snr DB", "signal to noise of the layers' outputs (none: of the weights), mean in dB", type=float)
    argument(
        lossy,
        "--kl NATS",
        "divergence per token on the calibration text; auto: on a part of the mix kept for it",
        type=float,
    )
    argument(lossy, "--calibrate auto|FILE|DIR|self|none", CALIBRATE, action="append")
    argument(lossy, "--calibration FILE", CALIBRATION, **many)
    argument(lossy, "--tokens N", "of each of these texts (default: 40960)", type=int, default=40960)
    argument(lossy, "--context N", SEQUENCE, type=int, default=CONTEXT)
    argument(lossy, "--no-backward", BACKWARD)
    argument(lossy, "--device", DEVICE, choices=DEVICES, default="cpu")
    argument(lossy, "--cache DIR", CACHE)
    effort = "trellis of 32 states, 256 (default), or 1024 searched twice, calibrated errors fed back along rows too"
    argument(lossy, "--effort", effort, choices=EFFORTS, default="default")
    argument(lossy, "--align", ALIGN, choices=("auto", "triangular", "pca", "identity"), default="auto")
    argument(lossy, "--low-rank auto|N", RANK, type=number("auto", 0, "a number of 0 or more"))
    argument(lossy, "--recover STEPS|auto", RECOVER, type=_steps)
    exact: Any = {"action": argparse.BooleanOptionalAction, "default": True, "help": EMBEDDINGS}
    lossy.add_argument("--embeddings", **exact)
    about = "when done, KL and perplexity on this text, not the one above; auto: a part of the mix kept for it"
    argument(lossy, "--measure FILE|auto", about)
    argument(lossy, "--report FILE.json", "write what became of every tensor")
    argument(lossy, "--keep PATTERN", "keep these tensors lossless", **many)
    _add_named(p)
    _add_ranks(p)
    out = "what OUT is: one file (default), or a folder for from_pretrained of transformers"
    argument(p, "--format", out, choices=("rac", "hf"), default="rac")
    argument(p, "--dry-run", "write nothing: what would become of which tensors, size and time, from a sample")
    argument(p, "--resume", "go on with an interrupted pack")
    argument(p, "--force", "replace an existing file")
    argument(p, "--json", "print totals and tensors as one JSON value")


def _steps(given: str) -> str | int:
    """Type of --recover."""
    if given != "auto" and not given.isdecimal():
        raise argparse.ArgumentTypeError("must be auto or a number of steps")
    return given if given == "auto" else int(given)


def _add_named(p: argparse.ArgumentParser) -> None:
    """The arguments of named methods."""
    named = p.add_argument_group("named methods", NAMED)
    argument(named, "--recipe", RECIPE, choices=NAMES, default="aligned")
    argument(named, "--group N|row", "columns that share a scale (default: 128)", type=GROUP, default=128)
    argument(named, "--fixed-rate", "store the integers at their fixed rate, not entropy-coded")
    argument(named, "--symmetric", "grids about zero")
    about = "bits of activations and cache that spinquant learns for (default: 4)"
    argument(named, "--activations B", about, type=int, default=4)
    argument(named, "--steps N", "of what learns (default: 100)", type=int, default=100)
    argument(named, "--seed N", "of rotations (default: 0)", type=int, default=0)


def _add_ranks(p: argparse.ArgumentParser) -> None:
    """The arguments of a pack that many ranks share."""
    ranks = p.add_argument_group("many ranks", RANKS)
    argument(ranks, "--work DIR|URL", "the folder of the job: a path that all ranks see, or a URL of fsspec")
    argument(ranks, "--rank N", RANKED, type=int)
    argument(ranks, "--world N", "how many ranks there are (default: 1)", type=int, default=1)
    argument(ranks, "--finish", "write OUT.rac: what no rank has done is done here")
    argument(ranks, "--lease SECONDS", LEASED, type=float, default=60.0)


def run(args: argparse.Namespace) -> int:
    """Pack, and say what came of it."""
    if args.work is None and (args.finish or args.world != 1 or args.rank is not None):
        both = "give --work too (a part of low rank: --low-rank)"
        raise ValueError(f"--finish, --world and --rank are for ranks that share a folder: {both}")
    if args.finish and not args.src:
        return _ended(args, None)
    if not args.src:
        raise ValueError(
            "SRC is an empty name" if args.src is not None else "name what is to be packed (see `rac pack --help`)"
        )
    if args.output is None:
        args.output = _usual(args.src, args.format)
    if args.recipe == NAMES[0]:
        if given := [
            f"--{name.replace('_', '-')}" for name, usual in _OF_NAMED.items() if getattr(args, name) != usual
        ]:
            raise ValueError(f"{', '.join(given)}: for named methods alone; give --recipe too")
        _preset(args)
    if args.work is not None:
        return _ranks(args)
    if args.output == PIPE:
        _check_pipe(args)
    return _folder(args) if args.format == "hf" and not args.dry_run else _file(args)


def _usual(src: str, form: str) -> str:
    """The name of the output where none is given: that of the source, in this folder."""
    named = src if os.path.lexists(src) else src.removeprefix("hf://").split("@")[0]  # of the Hub
    name = os.path.basename(os.path.normpath(os.path.abspath(named)))
    for ending in (".rac", ".safetensors", ".gguf"):
        name = name.removesuffix(ending)
    return name + (".rac" if form == "rac" else "-rac")


def _ranks(args: argparse.Namespace) -> int:
    """The share of a rank, or the end of a pack that many ranks share."""
    given = {"--format hf": args.format == "hf", "--resume": args.resume, "--dry-run": args.dry_run}
    given |= {"--recipe": args.recipe != NAMES[0], "--measure": args.measure, "--report": args.report}
    if wrong := [option for option, there in given.items() if there]:
        raise ValueError(f"--work does not go with {', '.join(wrong)}")
    _asked(args)  # says what does not go together
    asked = _given(args)
    return _ended(args, asked) if args.finish else share(args, asked)


def _ended(args: argparse.Namespace, asked: Asked | None) -> int:
    """Write the archive that ranks have made, and say what came of it."""
    start = time.monotonic()
    if args.output is None:
        args.output = "model.rac" if asked is None else _usual(args.src, args.format)
    done = end(args, asked)
    seconds = time.monotonic() - start
    _say(args, done, seconds)
    if done.fidelity:
        say(_by_role(done.fidelity))
        say(_weights(done))
    tell({"seconds": seconds, **report(done, None)})
    return 0


def _check_pipe(args: argparse.Namespace) -> None:
    """ValueError where what is asked for cannot go to standard output."""
    given = {"--format hf": args.format == "hf", "--resume": args.resume, "--shard-size": args.shard_size}
    given |= {"--recipe": args.recipe != NAMES[0], "--measure": args.measure}
    if wrong := [option for option, there in given.items() if there]:
        raise ValueError(f"-o - writes one file, forward: it does not go with {', '.join(wrong)}")
    if sys.__stdout__ is None:
        raise ValueError("-o -: standard output is closed")
    if sys.stdout.isatty():
        raise ValueError("-o - writes an archive to standard output: send it to a file or a program")


def _folder(args: argparse.Namespace) -> int:
    """Pack to a file beside the folder, and write that as a folder; of an archive only the latter."""
    from rac.runtime.folder import SHARD, replaceable, write_folder  # needs torch

    shard = SHARD if args.shard_size is None else parse_size(args.shard_size)
    made = None
    if not args.src.endswith(".rac"):
        source = open_source(args.src, args.include, args.exclude, pickles=args.allow_pickle_weights)
        _loadable(args, source)
        replaceable(os.path.realpath(args.output), args.force, [a.name for a in source.attachments])
        made = args.output.rstrip(os.sep) + BESIDE
        _file(argparse.Namespace(**vars(args) | {"output": made, "shard_size": None}))
    try:
        with Progress("writing", os.path.getsize(made or args.src)) as progress:
            done = write_folder(made or args.src, args.output, force=args.force, shard=shard, progress=progress)
    finally:
        if made and os.path.exists(made):
            os.unlink(made)
    say(f"{args.output}: {done.tensors} tensors, {done.records} of them compressed, {size(done.size)} in all files")
    tell({"folder": args.output, "tensors": done.tensors, "records": done.records, "size": done.size})
    return 0


def _loadable(args: argparse.Namespace, source: Source) -> None:
    """SourceError for what makes no folder for from_pretrained, before the work."""
    if not any(a.name == "config.json" for a in source.attachments):
        raise SourceError("holds no config.json: --format hf takes the folder of a model", file=args.src)
    if _of_records(source, args.src):
        raise SourceError("is such a folder already: its weights are records of an archive", file=args.src)


def _of_records(source: Source, where: str) -> bool:
    """Whether weights of a folder are records of an archive already, as --format hf writes them."""
    for config in (a for a in source.attachments if a.name == "config.json"):
        with suppress(SourceError):  # any file of that name can be packed
            return stated_in(parse_json(config.read(), config.name, where)).get("quant_method") == "rac"
    return False


def _file(args: argparse.Namespace) -> int:
    """Pack to a file or to shards."""
    if args.recipe != NAMES[0]:
        return _named(args)
    options, request = _asked(args)
    how: Any = {"include": args.include, "exclude": args.exclude, "all_files": args.all_files}
    how["pickles"] = args.allow_pickle_weights
    if args.dry_run:
        if request and request.calibration.remark and not args.quiet:
            print(request.calibration.remark, file=sys.stderr)
        source = open_source(args.src, dequantise=request is not None, **how)
        return _estimate(args, estimate(source, options, request))
    with Steps() as steps:
        opened = ready(args.src, args.output, lossy=request is not None, note=steps, **how)
        with opened as (src, source):
            if src != args.src:  # downloaded: now there is a configuration that says how to calibrate
                args.src = src
                options, request = _asked(args)
            return _packed(args, source, options, request)


def _packed(args: argparse.Namespace, source: Source, options: PackOptions, request: Lossy | None) -> int:
    """Pack an open source, and say what came of it."""
    start = time.monotonic()

    def layer(f: Fidelity) -> None:
        progress.line(f"{f.bits:7.3f} bits {f.snr:7.2f} dB {f.seconds:6.1f} s  {f.name}")

    if _of_records(source, args.src):
        what = "its weights are records of an archive already (--format hf), and are copied as they are"
        print(f"rac: {args.src}: {what}; that archive is smaller", file=sys.stderr)
    hooks = Hooks(lambda *what: progress(*what), lambda *what: steps(*what), layer)
    with Packer(source, args.output, options, hooks) as packer:
        with Steps() as steps:
            found = packer.allocate(args.src, request) if request else None
        with Progress("packing", sum(t.nbytes for t in source.tensors)) as progress:
            done = packer.write(ByTrellis(found, packer.kept) if found else None)
    seconds = time.monotonic() - start
    _say(args, done, seconds)
    if source.dequantised:
        say(f"dequantised: {_numbers(source)}")
    if found and request:
        _say_lossy(args, done, found, request)
    if args.format == "rac":  # a folder is told of when it is there
        tell({"seconds": seconds, **report(done, found)})
    return 0


def _preset(args: argparse.Namespace) -> None:
    """Put what --quality means into the arguments, and say it."""
    if args.quality is None:
        return
    if given := [f"--{g.replace('_', '-')}" for g in GOALS if getattr(args, g) is not None]:
        raise ValueError(f"--quality is a choice of a budget: it does not go with {', '.join(given)}")
    args.bits, args.embeddings, about = QUALITIES[args.quality]
    if not args.quiet:
        how = f"--bits {args.bits:g}" + ("" if args.embeddings else " --no-embeddings")
        print(f"rac: --quality {args.quality} is {how}: {about}", file=sys.stderr)


def _estimate(args: argparse.Namespace, found: Estimate) -> int:
    """Print what the pack would come to."""
    rows = sorted(found.parts, key=lambda p: -p.dense)
    for p in rows if args.verbose else rows[:20]:
        there = "?" if p.size is None else f"{size(p.size)} ({8 * p.size / max(1, p.weights):.2f} bits per weight)"
        shape = "x".join(map(str, p.shape)) or "scalar"
        say(f"{p.how:<9}  {p.dtype:<8} {shape:<16} {p.tensors:5,} tensors  {size(p.dense):>9} -> about {there}")
    if len(rows) > 20 and not args.verbose:
        say(f"... and {len(rows) - 20} more shapes (-v shows them)")
    size_of = "not known before the model is run"
    if found.size is not None:
        bits = 8 * found.size / max(1, found.weights)
        size_of = f"{size(found.size)} ({found.size / max(1, found.dense):.1%}, {bits:.2f} bits per weight)"
    part = f", {clock(found.calibration)} of it calibration" if found.calibration else ""
    say(
        f"{args.output}: {size(found.dense)} -> about {size_of}, in about {clock(found.seconds)}{part}; "
        f"estimated from {size(found.sampled)} that were packed in memory, nothing was written"
    )
    tell(asdict(found))
    return 0


def _asked(args: argparse.Namespace) -> tuple[PackOptions, Lossy | None]:
    """What the arguments ask for; None: a lossless pack."""
    if args.jobs is not None and args.jobs < 1:
        raise ValueError("--jobs must be at least 1")
    asked = _given(args)
    goals = {f"--{name.replace('_', '-')}": getattr(asked, name) for name in GOALS}
    if asked.lossy:
        one_goal(goals)
    elif given := [_option(name) for name, usual in LOSSY.items() if getattr(args, name) not in (usual, ["none"])]:
        raise ValueError(f"{', '.join(given)}: for lossy packing; give one of {', '.join(goals)} too")
    _ready(args)
    jobs = threads_of(args.jobs, most=None if asked.lossy else workers.THREADS)
    many = asked.lossy and jobs > workers.THREADS
    options = asked.options(jobs=jobs, resume=args.resume, force=args.force, processes=many)
    request = asked.request(args.src, cache(args.cache))
    if request and not request.calibration.texts and (args.context != CONTEXT or args.no_backward):
        raise ValueError("--context and --no-backward say how a model reads a text: give one with --calibrate")
    return options, request


def _given(args: argparse.Namespace) -> Asked:
    """What decides about bytes among the arguments."""
    sizes = {name: parse_size(v) for name in ("size", "shard_size") if (v := getattr(args, name)) is not None}
    more = {"pickles": args.allow_pickle_weights, "backward": not args.no_backward, "rank": args.low_rank, **sizes}
    more |= {"calibration": args.calibration or None}
    more |= {"calibrate": "none"} if args.calibrate == ["none"] else {}
    return Asked.of({k: v for k, v in (vars(args) | more).items() if v is not None})


def _ready(args: argparse.Namespace) -> None:
    """Look at what is read and written after the pack, before the long work."""
    if args.measure and args.measure != "auto":
        read_text(args.measure)
    if args.measure and os.path.exists(args.src):  # of a repository: when it is here
        check_text(args.src, read_text(args.measure))
    if args.report and not os.path.isdir(os.path.dirname(os.path.abspath(args.report))):
        raise OutputError("the folder of the report is not there", file=args.report)


def _say(args: argparse.Namespace, done: Summary, seconds: float) -> None:
    """Print what any pack came to."""
    if done.skipped:
        more = "" if all(n.endswith("/") for n in done.skipped) else "; --all-files takes files above 64 MB"
        print(f"rac: not packed: {_some(done.skipped)}{more}", file=sys.stderr)
    if done.lost:
        print(f"rac: {args.src} does not come back as it was: {done.lost}", file=sys.stderr)
    if args.resume:
        say(f"{done.resumed} of {done.tensors} tensors were finished already")
    bits = 8 * done.stored / max(1, done.weights)
    first = done.paths[0].removesuffix(BESIDE) if args.format == "hf" else done.paths[0]
    what = first if len(done.paths) == 1 else f"{len(done.paths)} shards, {first} ..."
    say(
        f"{what}: {done.tensors} tensors, {size(done.dense)} -> {size(done.stored)} "
        f"({done.stored / max(1, done.dense):.2%}, {bits:.3f} bits per weight, all bytes counted) "
        f"in {seconds:.1f} s, {size(done.dense / max(seconds, 1e-9))}/s"
    )


def _numbers(source: Source) -> str:
    """What the weights of a source were, and as what they were packed."""
    made = [t for t in source.tensors if isinstance(t.data, Dequantised)]
    kinds = ", ".join(sorted({t.dtype for t in made}))
    what = f"{len(made)} tensors read as {kinds}; stored were {_some(source.dequantised)}"
    return f"{what}; config.json states no quantisation now" if source.kind == "hf" else what


def _say_lossy(args: argparse.Namespace, done: Summary, found: Recipe, request: Lossy) -> None:
    """Print what a lossy pack came to, and write and measure what was asked for."""
    what = "text does not reach" if request.calibration.texts and found.parts else "calibration does not reach"
    for part, names in grouped(found.unreached, lambda name: found.parts.get(name, "the rest")).items():
        these = f"{part}: {len(names)} tensors, which are quantised from the weights alone: {_some(names)}"
        print(f"rac: {what}: {these}; {OTHERS.get(part, ANY)}", file=sys.stderr)
    if done.fidelity:
        say(_by_role(done.fidelity))
    say(_weights(done))
    if done.quantised:
        say(f"lossy: {done.quantised} tensors quantised at {done.quantised_bits:.4f} bits per weight, all counted")
    else:
        say("lossy: nothing; what the budget allows is more than lossless coding takes")
    if low := [f"{f.name} ({f.snr:.1f} dB)" for f in done.fidelity if f.snr < ALARM]:
        print(f"rac: {len(low)} layers keep less than {ALARM} dB of their output: {_some(low)}", file=sys.stderr)
    if lost := [f for f in done.fidelity if f.zeros >= LOST * math.prod(f.shape)]:
        share = sum(f.zeros for f in lost) / sum(math.prod(f.shape) for f in lost)
        these = f"{len(lost)} tensors ({share:.1%} of their weights)"
        print(
            f"rac: zeros come back as small numbers in {these}, too few to be kept: {_some([f.name for f in lost])}",
            file=sys.stderr,
        )
    if args.report:
        write_whole(args.report, json.dumps(report(done, found), indent=1) + "\n")
    if args.measure:
        measure(args.src, done.paths[0], args.measure)


def _weights(done: Summary) -> str:
    """How many weights are quantised, and why the others are not."""
    quantised = done.weights - sum(one.weights for one in done.lossless)
    kept = "; ".join(f"{one.weights:,} in {len(one.names)} {one.why}" for one in done.lossless)
    share = quantised / max(1, done.weights)
    return f"weights: {quantised:,} of {done.weights:,} quantised ({share:.2%}); lossless: {kept or 'none'}"


def _by_role(layers: Sequence[Fidelity]) -> str:
    """A table with one line per role."""
    roles = grouped(layers, lambda f: role(f.name))
    names = dict(zip(roles, fitted(roles, beside=66), strict=True))
    width = max(map(len, ("role", *names.values())))
    lines = [f"{'role':<{width}}  tensors       weights  bits/w  SNR dB   least  rank  outliers"]
    for name, found in roles.items():
        weights = sum(math.prod(f.shape) for f in found)
        bits = 8 * sum(f.size for f in found) / weights
        mean, least = sum(f.snr for f in found) / len(found), min(f.snr for f in found)
        ranks = sorted({f.rank for f in found})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        lines.append(
            f"{names[name]:<{width}}  {len(found):7,} {weights:13,} {bits:7.3f} {mean:7.2f} {least:7.2f} {rank:>5} "
            f"{sum(f.outliers for f in found):9,}"
        )
    return "\n".join(lines)


def report(done: Summary, recipe: Recipe | None) -> dict[str, Any]:
    """Totals of a pack, and the fidelity of each quantised tensor; infinite ratios are None."""
    tensors = [
        asdict(f) | {"bits": f.bits, "role": role(f.name), "snr": f.snr if math.isfinite(f.snr) else None}
        for f in done.fidelity
    ]
    totals = {
        "files": done.paths,
        "size": done.stored,
        "dense": done.dense,
        "weights": done.weights,
        "file_bits": 8 * done.stored / max(1, done.weights),
        "quantised": done.quantised,
        "quantised_bits": done.quantised_bits,
        "lossless": [asdict(one) for one in done.lossless],
        "resumed": done.resumed,
        "skipped": done.skipped,
        "dequantised": done.dequantised,
    }
    if recipe is None:
        return totals
    return totals | {
        "states": recipe.states,
        "passes": recipe.passes,
        "scale": recipe.scale,
        "about": dict(recipe.about),
        "unreached": recipe.unreached,
        "alarms": [f.name for f in done.fidelity if f.snr < ALARM],
        "tensors": tensors,
    }


def measure(src: str, path: str, text: str) -> None:
    """Print what the packed model predicts on a text, beside the original."""
    with Steps() as note:
        own, row = compare(src, [path], Reading(read_text(text)), note)
    say(
        f"on {text}: KL {row.kl:.4f} nats, top-1 {row.top1:.2%}, perplexity {row.perplexity:.3f} "
        f"(original {own.perplexity:.3f})"
    )


def cache(given: str | None) -> str | None:
    """The folder of calibrations that `--cache` means; None: nowhere."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "rac")
    return None if given == "none" else given or default


def _left(args: argparse.Namespace) -> str:
    """What an interrupted pack has left; nothing where it had not begun to write."""
    out = args.output.rstrip(os.sep) + BESIDE if args.format == "hf" else os.path.realpath(args.output)
    shards = glob.escape(out.removesuffix(".rac")) + "-*-of-*.rac.part"
    left = os.path.exists(f"{out}.part") or glob.glob(shards)
    return "; the finished part is kept, run again with --resume" if left else ""


def _option(name: str) -> str:
    """How an argument is given that is not as it is where nobody gives it."""
    return "--no-embeddings" if name == "embeddings" else f"--{name.replace('_', '-')}"


def _some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _named(args: argparse.Namespace) -> int:
    """Pack by a named method, and say what came of it."""
    for name, usual in _NOT.items():
        if getattr(args, name) != usual:
            raise ValueError(f"--recipe {args.recipe} does not take {_option(name)}")
    bits = 4 if args.bits is None else args.bits
    if not 2 <= bits <= 8 or bits != int(bits):
        raise ValueError(f"--recipe {args.recipe} takes whole --bits from 2 to 8, not {bits:g}")
    _ready(args)
    texts = [t for t in args.calibrate or () if t != "none"]
    if texts and args.recipe == "rtn":
        print("rac: --recipe rtn rounds the weights alone, and reads no text", file=sys.stderr)
    if len(texts) > 1:
        raise ValueError(f"--recipe {args.recipe} calibrates on one text file")
    from rac.methods.named import Method, pack_method  # imports torch

    method = Method(args.recipe, int(bits), args.group, not args.fixed_rate, texts[0] if texts else None, args.tokens)
    method = replace(method, activations=args.activations, seed=args.seed, symmetric=args.symmetric, steps=args.steps)
    start, options = time.monotonic(), {"level": args.level, "jobs": threads_of(args.jobs), "force": args.force}
    with Steps() as note:
        done = pack_method(args.src, args.output, method, note=note, **options)
    seconds = time.monotonic() - start
    weights = 8 * done.stored / max(1, done.weights)
    say(_by_role(done.fidelity))
    say(
        f"{args.output}: {args.recipe}, {done.quantised} tensors quantised at {done.quantised_bits:.4f} bits per "
        f"weight, all counted; the file {size(done.stored)}, {weights:.3f} bits per weight, in {seconds:.1f} s"
    )
    if args.measure:
        measure(args.src, args.output, args.measure)
    if args.format == "rac":
        layers = [asdict(f) | {"bits": f.bits, "snr": f.snr if math.isfinite(f.snr) else None} for f in done.fidelity]
        tell({"seconds": seconds, "recipe": args.recipe, **report(done, None), "tensors": layers})
    return 0
