"""`rac generate` and `rac perplexity`: commands that run a model, and the arguments that they share with others."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rac.cli.terminal import Steps, argument, command, say, tell
from rac.decode.archive import RacFile
from rac.encode.allocate.budget import read_text
from rac.frameworks import check_device
from rac.models.predictions import check
from rac.provenance import Provenance

GENERATE = """\
Let a model write, straight from the archive: the simplest proof that it is whole and runs.

The prompt is taken as it is, without a chat template, and continued greedily (the same text every time) unless
--sample is given. The text goes to standard output, the speed to standard error.

  rac generate m.rac "The capital of France is" --tokens 20
  rac generate m.rac "Once upon a time" --resident compressed    weights stay compressed in memory
  rac generate m.rac "Once upon a time" --resident codes         quantised weights as int8 codes
  rac generate m.rac "Once upon a time" --memory 8GB             weights stay in the file, read when needed
  rac generate https://host/m.rac "Once" --memory 8GB            the same by range requests; also hf://ORG/NAME/m.rac
  rac generate m.rac "Once upon a time" --sample --seed 7

Needs rac-codec[transformers]."""
PERPLEXITY = """\
Perplexity of a packed causal language model on a text.

The text is cut into windows that do not overlap; each is predicted by itself, without special tokens, and all its
positions but the last count: the figures are those of `rac compare`, which computes in float32 (--dtype float32).

  rac perplexity m.rac --text test.txt
  rac perplexity m.rac --text test.txt --tokens 2048 --context 512 --resident compressed
  rac perplexity m.rac --text test.txt --activations 4 --kv 4

Needs rac-codec[transformers]."""
RESIDENT = """keep the weights decoded (dense, the default), as the file has them (compressed: small, slow), quantised
ones as int8 (codes: half of 16 bits, fast), or in the file (disk: for what does not fit)"""
MEMORY = """weights stay in the file (--resident disk), and the process grows by so much at most, the text included:
8GB, 500MB, 2GiB; libraries are not counted (default: a quarter of the machine's)"""
KV = """quantise keys and values to B bits, a range for each token and head; keys are rotated before where the file says
so (simulated)"""
CLIP = "share of the largest activation that the grid goes to (default: 0.9 below 8 bits if symmetric, else 1)"
GRID = "about zero (the default, as in QuaRot), or from the least to the largest of a token (SpinQuant)"


def add_generate(p: argparse.ArgumentParser) -> None:
    """Add `rac generate`."""
    command(p, generate, GENERATE)
    _add_model(p)
    argument(p, "prompt PROMPT", "what the text begins with")
    argument(p, "--tokens N", "write so many at most (default: 64)", type=int, default=64)
    how = p.add_mutually_exclusive_group()
    argument(how, "--greedy", "always the likeliest token (the default)")
    argument(how, "--sample", "draw tokens, as the model's generation settings say")
    argument(p, "--seed N", "of --sample (default: 0)", type=int, default=0)
    argument(p, "--json", "the text and its token ids as one JSON value, when it is whole")


def generate(args: argparse.Namespace) -> int:
    """Generate, and print the text as it comes."""
    if args.tokens < 1:
        raise ValueError("--tokens must be at least 1")
    if not args.prompt:
        raise ValueError("the prompt is empty")
    model, tokenizer = _open_model(args, quick=True)

    from rac.runtime.memory import closing
    from rac.runtime.text import causal, generate

    causal(model)
    if not args.json:
        sys.stdout.write(args.prompt)
        sys.stdout.flush()
    start = time.monotonic()
    seed = args.seed if args.sample else None
    with closing(model):
        ids = generate(model, tokenizer, args.prompt, args.tokens, seed, stream=not args.json)
    seconds = time.monotonic() - start
    if not args.quiet:
        rate = len(ids) / max(seconds, 1e-9)
        print(f"{len(ids)} tokens in {seconds:.1f} s, {rate:.1f} per second", file=sys.stderr)
    tell({"prompt": args.prompt, "text": tokenizer.decode(ids), "ids": list(map(int, ids)), "seconds": seconds})
    return 0


def add_perplexity(p: argparse.ArgumentParser) -> None:
    """Add `rac perplexity`."""
    command(p, perplexity, PERPLEXITY)
    _add_model(p)
    argument(p, "--text FILE|auto", "the text, UTF-8; auto: a part of the built-in mix", required=True)
    add_windows(p)
    add_simulated(p)
    argument(p, "--json", "for programs")


def perplexity(args: argparse.Namespace) -> int:
    """Measure, and print one line."""
    check(args.tokens, args.context)
    text = read_text(args.text)
    model, tokenizer = _open_model(args)
    from rac.runtime.memory import closing
    from rac.runtime.text import perplexity

    around: AbstractContextManager[Any] = nullcontext()
    if simulated(args):
        with RacFile(args.src) as f:
            around = simulation(args, model, Provenance.of(f.archives[0].header, args.src))
    start = time.monotonic()
    with closing(model), Steps() as note, around:
        found, cut, context = perplexity(model, tokenizer, text, args.tokens, args.context, note)
    seconds, count = time.monotonic() - start, cut * context
    bits = "".join(f", {n}-bit {what}" for what, n in (("activations", args.activations), ("cache", args.kv)) if n)
    say(
        f"{args.src}: perplexity {found:.3f} on {count:,} tokens of {args.text} in windows of "
        f"{context:,} ({args.resident}, {str(model.dtype).removeprefix('torch.')}{bits}, "
        f"{count / max(seconds, 1e-9):.0f} tokens per second)"
    )
    tell({"file": args.src, "perplexity": found, "tokens": count, "context": context, "seconds": seconds})
    return 0


def _add_model(p: Any) -> None:
    """Which model, and how it is held."""
    argument(p, "src IN.rac", "the archive of a Hugging Face folder, or one shard of a set")
    argument(p, "--resident", RESIDENT, choices=("dense", "compressed", "codes", "disk"), default="dense")
    argument(p, "--memory SIZE", MEMORY)
    argument(p, "--device NAME", "cpu (default), cuda, cuda:1, mps", default="cpu")
    argument(p, "--dtype", "default: what the model says", choices=("float32", "bfloat16", "float16"))
    argument(p, "--trust-remote-code", "run the model code in the file; read it before (rac unpack)")


def _open_model(args: argparse.Namespace, quick: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer). ValueError for a data type or device that there is not.

    `quick`: a model on the CPU has the data type and the layout of weights that run best there, which is said.
    """
    if os.path.exists(args.src):  # else it may be one of the Hub
        offline()
    disk = args.memory is not None or args.resident == "disk"
    if disk or args.resident == "compressed":  # threads of torch that wait leave the processors to those that decode
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rac.runtime import load_model, load_tokenizer
    from rac.runtime.memory import bound
    from rac.runtime.model import dtype_of
    from rac.runtime.replace import residency
    from rac.runtime.running import dtype_for, run_as

    check_device(args.device)
    how = {"trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(args.src, **how)
    start, dtype = time.monotonic(), args.dtype
    device = None if args.device == "cpu" else args.device
    if quick := quick and device is None:
        with RacFile(args.src) as f:
            stated = dtype_of(f)
        dtype = dtype or dtype_for("disk" if disk else args.resident, stated)
    model = load_model(args.src, args.resident, device, dtype, memory=args.memory, **how)
    if disk:
        bound(model)
    args.resident = "disk" if disk else args.resident
    if args.verbose or ((disk or sys.stderr.isatty()) and not args.quiet):
        held = f"{model.get_memory_footprint() / 1e6:.1f} MB of weights"
        if args.resident != "dense":
            held = str(residency(model))
        print(f"{args.src}: {held}; loaded in {time.monotonic() - start:.1f} s", file=sys.stderr)
    if quick:
        said = run_as(model, args.resident, stated)
        if not args.quiet:
            print(f"{args.src}: {said}", file=sys.stderr)
    return model, tokenizer


def offline() -> None:
    """Keep transformers from asking its hub: all is on disk, or in the file."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def add_windows(p: Any) -> None:
    """How much of a text is predicted, and in windows of what length."""
    argument(p, "--tokens N", "of that text (default: 8192)", type=int, default=8192)
    argument(p, "--context N", "tokens of one window (default: 1024)", type=int, default=1024)


def add_simulated(p: Any) -> None:
    """Which activations are quantised."""
    about = "quantise the inputs of the linear layers of all blocks to B bits, a scale for each token (simulated)"
    argument(p, "--activations B", about, type=int)
    argument(p, "--kv B", KV, type=int)
    argument(p, "--clip R", CLIP, type=float)
    argument(p, "--activation-grid", GRID, choices=("symmetric", "asymmetric"), default="symmetric")


def simulated(args: argparse.Namespace) -> bool:
    """Whether any activations are to be quantised."""
    return args.activations is not None or args.kv is not None


def simulation(args: argparse.Namespace, model: Any, about: Provenance) -> AbstractContextManager[Any]:
    """What to enter so that a model computes with quantised activations; `about` is the provenance of its file."""
    from rac.runtime import simulate

    how: dict[str, Any] = {"clip": args.clip, "rotate_keys": about.keys is not None, "seed": about.keys}
    asymmetric = args.activation_grid == "asymmetric"
    return simulate.simulated(model, args.activations, args.kv, asymmetric=asymmetric, **how)
