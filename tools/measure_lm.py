"""Perplexity, KL divergence per token and top-1 agreement of packed causal language models against their original.

The first TOKENS tokens of the text, in windows of CONTEXT; KL(original || packed) in nats over all positions,
perplexity over all positions but the last of each window.

  python tools/measure_lm.py MODEL_DIR test.txt a.rac b.rac ...
"""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import rac
from rac.decode.unpack import quantised, weights

HEAD = (
    "| model | bits of quantised tensors | bits of the file | perplexity | KL | top-1 |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)


class Measure:
    """The predictions of an original on a text, and rows of a table that compare packed files with them."""

    def __init__(self, model: str, text: str, tokens: int = 8192, context: int = 1024) -> None:
        self._model = model
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
        with open(text, encoding="utf-8") as f:
            ids = torch.tensor(tokenizer(f.read(), add_special_tokens=False).input_ids[:tokens])
        self._windows = list(ids[: len(ids) // context * context].split(context))
        self._original = self._predictions(None)

    def _predictions(self, state: dict[str, Any] | None) -> list[Any]:
        """Log-probabilities (context, vocabulary) of each window, in float16; of the original where `state` is None."""
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            self._model, dtype=torch.float32, local_files_only=True
        )
        if state is not None:
            found = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
            if found.unexpected_keys:
                raise SystemExit(f"not a file of this model: {found.unexpected_keys[:3]}")
            model.tie_weights()
        model.eval()
        with torch.no_grad():
            return [torch.log_softmax(model(w[None], use_cache=False).logits[0], -1).half() for w in self._windows]

    def row(self, path: str | None = None, name: str = "original") -> str:
        """A row of the table for an archive, or for the original."""
        got, rates = self._original, "- | -"
        if path is not None:
            with rac.open(path) as f:
                entries = [e for a in f.archives for e in a.index.entries]
            total = sum(weights(e) * (1 + len(e.aliases)) for e in entries)
            rates = f"{quantised(entries)[1]:.4f} | {8 * os.path.getsize(path) / max(1, total):.3f}"
            got = self._predictions(rac.load_file(path, framework="pt"))
        kl = top = loss = 0.0
        for window, p, q in zip(self._windows, self._original, got, strict=True):
            p, q = p.float(), q.float()
            kl += float((p.exp() * (p - q)).sum())
            top += float((p.argmax(-1) == q.argmax(-1)).sum())
            loss -= float(q[:-1].gather(1, window[1:, None]).sum())
        n = sum(map(len, self._windows))
        ppl = math.exp(loss / (n - len(self._windows)))
        return f"| {name} | {rates} | {ppl:.3f} | {kl / n:.4f} | {top / n:.2%} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder of the original")
    parser.add_argument("text")
    parser.add_argument("archives", nargs="*")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    measure = Measure(args.model, args.text, args.tokens, args.context)
    print(HEAD)
    print(measure.row(), flush=True)
    for path in args.archives:
        print(measure.row(path, os.path.basename(path)), flush=True)


if __name__ == "__main__":
    main()
