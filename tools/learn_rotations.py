r"""Rotations of a causal language model, learned and kept in a file; and what quantised activations cost with them.

  python tools/learn_rotations.py demo/smollm2-hf --method spinquant --text valid.txt --out R.safetensors \
      --test test.txt

--test prints the loss of the original weights with quantised activations and cache on another text, in the coordinates
of the model, in those of QuaRot (the start), and in those that were learned. Weights are not quantised.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

from rac.calibrate.text import sequences, text_ids
from rac.errors import RacError
from rac.methods import rotations, transforms
from rac.methods.rotations.spinquant import start


def ids_of(model: Path, text: Path, tokens: int, context: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    found = text_ids(str(model), text.read_text(encoding="utf-8"), tokens)
    return sequences(found.ids, tokens, context, found.front)


def losses(p: transforms.Parts, found: rotations.Rotations, ids: Any, how: rotations.Simulated, seed: int) -> None:
    """Print the table of --test."""
    r1, r2 = (r.detach().numpy() for r in start(p, seed))
    plain = rotations.loss_of(p, ids, rotations.Simulated(16, 16))
    rows = {
        "nothing quantised": plain,
        "no rotation": rotations.loss_of(p, ids, how, r3=False),
        "Hadamard": rotations.loss_of(p, ids, how, rotations.Rotations(r1, r2, seed)),
        found.about["method"]: rotations.loss_of(p, ids, how, found),
    }
    print(f"| {ids.size} tokens, A{how.activations} KV{how.cache} | loss, nats | above | perplexity |")
    print("| --- | ---: | ---: | ---: |")
    for name, loss in rows.items():
        print(f"| {name} | {loss:.4f} | {loss - plain:.4f} | {np.exp(loss):.2f} |", flush=True)


def main() -> int:
    """Learn, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("--method", choices=("spinquant", "kurtail"), required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load", action="store_true", help="take what --out holds, learn nothing")
    parser.add_argument("--test", type=Path, help="measure on that text, too")
    parser.add_argument("--tokens", type=int, default=16384, help="of --text, at most")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, help="sequences (spinquant, 2), vectors (kurtail, 2048)")
    parser.add_argument(
        "--lr",
        type=float,
        help="longest step (spinquant, 1.5 at 16,384 tokens of a step, with their root at others; kurtail, 1)",
    )
    parser.add_argument("--activations", type=int, default=4, help="bits")
    parser.add_argument("--cache", type=int, default=4, help="bits of keys and values")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-tokens", type=int, default=4096)
    args = parser.parse_args()
    given = {k: v for k, v in (("batch", args.batch), ("lr", args.lr)) if v is not None}
    began = time.perf_counter()

    def note(what: str, done: int, of: int) -> None:
        print(f"\r{done}/{of} {what} {time.perf_counter() - began:.0f} s", end="", file=sys.stderr, flush=True)

    try:
        ids = ids_of(args.model, args.text, args.tokens, args.context)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        p = transforms.parts(model)
        transforms.fuse_norms(p)
        how = rotations.Simulated(args.activations, args.cache)
        if args.load:
            found = rotations.load(args.out)
        elif args.method == "spinquant":
            found = rotations.spinquant(p, ids, steps=args.steps, how=how, seed=args.seed, note=note, **given)
        else:
            found = rotations.kurtail(p, ids, steps=args.steps, seed=args.seed, note=note, **given)
        print(file=sys.stderr)
        if not args.load:
            rotations.save(found, args.out)
        print(json.dumps(found.about, indent=1))
        if args.test:
            losses(p, found, ids_of(args.model, args.test, args.test_tokens, args.context), how, args.seed)
        head = torch.from_numpy(ids[:1])
        before = transforms.logits(model, head)
        rotations.fuse(p, found)
        print(f"logits differ by {transforms.require_same(before, p, head):.1e} of the largest")
    except (RacError, OSError) as e:
        print(f"\n{e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
