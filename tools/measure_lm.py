"""Perplexity, KL divergence per token and top-1 agreement of packed causal language models against their original.

The first TOKENS tokens of the text, in windows of CONTEXT; KL(original || packed) in nats over all positions,
perplexity over all positions but the last of each window.

  python tools/measure_lm.py MODEL_DIR test.txt a.rac b.rac ...
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import rac
from rac.decode.unpack import quantised, weights


def predictions(path: str, state: dict[str, Any] | None, windows: list[Any]) -> list[Any]:
    """Log-probabilities (context, vocabulary) of each window, in float16; of the original where `state` is None."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    if state is not None:
        found = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        if found.unexpected_keys:
            raise SystemExit(f"not a file of this model: {found.unexpected_keys[:3]}")
        model.tie_weights()
    model.eval()
    with torch.no_grad():
        return [torch.log_softmax(model(w[None], use_cache=False).logits[0], -1).half() for w in windows]


def bits(path: str) -> tuple[float, float]:
    """Bits per weight of the quantised tensors, and of the whole file."""
    with rac.open(path) as f:
        entries = [e for a in f.archives for e in a.index.entries]
    total = sum(weights(e) * (1 + len(e.aliases)) for e in entries)
    return quantised(entries)[1], 8 * os.path.getsize(path) / max(1, total)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder of the original")
    parser.add_argument("text")
    parser.add_argument("archives", nargs="*")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    with open(args.text, encoding="utf-8") as f:
        ids = torch.tensor(tokenizer(f.read(), add_special_tokens=False).input_ids[: args.tokens])
    windows = list(ids[: len(ids) // args.context * args.context].split(args.context))
    original = predictions(args.model, None, windows)

    def row(name: str, got: list[Any], rates: str) -> None:
        kl = top = loss = 0.0
        for window, p, q in zip(windows, original, got, strict=True):
            p, q = p.float(), q.float()
            kl += float((p.exp() * (p - q)).sum())
            top += float((p.argmax(-1) == q.argmax(-1)).sum())
            loss -= float(q[:-1].gather(1, window[1:, None]).sum())
        n = len(windows) * args.context
        ppl = math.exp(loss / (n - len(windows)))
        print(f"| {name} | {rates} | {ppl:.3f} | {kl / n:.4f} | {top / n:.2%} |", flush=True)

    print("| model | bits of quantised tensors | bits of the file | perplexity | KL | top-1 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    row("original", original, "- | -")
    for path in args.archives:
        quantised, whole = bits(path)
        state = rac.load_file(path, framework="pt")
        row(os.path.basename(path), predictions(args.model, state, windows), f"{quantised:.4f} | {whole:.3f}")
        del state
        sys.stdout.flush()


if __name__ == "__main__":
    main()
