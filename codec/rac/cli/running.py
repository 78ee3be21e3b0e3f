"""What the commands that run a model have in common."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rac.provenance import Provenance

RESIDENT = "keep the weights decoded (dense, the default: fast) or as the file has them (compressed: small)"


def add_model(p: argparse.ArgumentParser) -> None:
    """The arguments that say which model, and how it is held."""
    p.add_argument("src", metavar="IN.rac", help="the archive of a Hugging Face folder, or one shard of a set")
    p.add_argument("--resident", choices=("dense", "compressed"), default="dense", help=RESIDENT)
    p.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1, mps")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: what the model says")
    p.add_argument(
        "--trust-remote-code", action="store_true", help="run the model code in the file; read it before (rac unpack)"
    )


def open_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer). ValueError for a data type or device that there is not."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is in the file
    from rac.frameworks import check_device
    from rac.runtime import load_model, load_tokenizer

    check_device(args.device)
    how = {"trust_remote_code": args.trust_remote_code}
    tokenizer = load_tokenizer(args.src, **how)
    start = time.monotonic()
    model = load_model(args.src, args.resident, None if args.device == "cpu" else args.device, args.dtype, **how)
    if sys.stderr.isatty():
        held = model.get_memory_footprint() / 1e6
        print(f"{args.src}: {held:.1f} MB of weights, loaded in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return model, tokenizer


def add_simulated(p: argparse.ArgumentParser) -> None:
    """The arguments that say which activations are quantised."""
    p.add_argument(
        "--activations",
        type=int,
        metavar="B",
        help="quantise the inputs of the linear layers of all blocks to B bits, a scale for each token (simulated)",
    )
    p.add_argument(
        "--kv",
        type=int,
        metavar="B",
        help="quantise keys and values to B bits, a range for each token and head; keys are rotated before where the "
        "file says so (simulated)",
    )
    p.add_argument(
        "--clip",
        type=float,
        metavar="R",
        help="share of the largest activation that the grid goes to (default: 0.9 below 8 bits if symmetric, else 1)",
    )
    p.add_argument(
        "--activation-grid",
        choices=("symmetric", "asymmetric"),
        default="symmetric",
        help="about zero (the default, as in QuaRot), or from the least to the largest of a token (SpinQuant)",
    )


def simulation(args: argparse.Namespace, model: Any, about: Provenance) -> AbstractContextManager[Any]:
    """What to enter so that a model computes with quantised activations; `about` is the provenance of its file."""
    from rac.runtime.simulate import simulated

    return simulated(
        model,
        args.activations,
        args.kv,
        clip=args.clip,
        rotate_keys=about.keys is not None,
        seed=about.keys,
        asymmetric=args.activation_grid == "asymmetric",
    )
