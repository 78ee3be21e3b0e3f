"""What recovery is worth: a model packed without and with it at the same budgets, measured on texts it has not seen.

Files stay in FOLDER, with what was measured of them, so that an interrupted run goes on.

  man -P cat bash | col -bx > bash.txt
  python tools/recover_bar.py demo/smollm2-hf valid.txt FOLDER test.txt bash.txt --budgets 3.05 2.56 54MB
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import rac
from rac.calibrate.evaluate import Measure
from rac.machine import parse_size


def packed(args: argparse.Namespace, budget: str, steps: int) -> tuple[Path, dict[str, Any]]:
    """The file of a budget, and what its pack came to."""
    out = args.work / f"{args.name}{budget}-{steps}.rac"
    how: dict[str, Any] = {"bits": float(budget)} if budget[-1].isdigit() else {"size": parse_size(budget)}
    about = out.with_suffix(".json")
    if not about.exists():
        start = time.monotonic()
        done = rac.pack(
            args.model,
            out,
            embeddings=args.embeddings or "size" in how,
            calibrate=args.calibrate.split("+"),
            cache=str(args.cache or args.work / "cache"),
            recover=steps or None,
            effort=args.effort,
            rank=0,
            resume=not out.exists(),
            force=out.exists(),
            **how,
            note=lambda what, *of: print(what, *of, flush=True) if of[0] == 0 or of[0] % 20 == 0 else None,
        )
        found = {"bytes": done.stored, "bits": done.quantised_bits, "seconds": time.monotonic() - start}
        about.write_text(json.dumps(found))
    return out, json.loads(about.read_text())


def figures(args: argparse.Namespace, text: Path, every: list[Path]) -> dict[str, list[float]]:
    """KL, top-1 and perplexity of files on a text."""
    kept = args.work / f"{text.stem}.figures"
    found: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    measure: Measure | None = None
    for path in every:
        if path.name not in found:
            measure = measure or Measure(args.model, text.read_text(encoding="utf-8"))
            f = measure.figures(measure.load(rac.load_file(path, framework="pt"), path.name), path.name)
            found[path.name] = [f.kl, f.top1, f.perplexity]
            kept.write_text(json.dumps(found))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder of a causal language model")
    parser.add_argument("calibrate", help="a text, self, auto, or several of them with + between")
    parser.add_argument("work", type=Path, help="folder for files and figures")
    parser.add_argument("texts", type=Path, nargs="+", help="what is measured on")
    parser.add_argument("--budgets", nargs="+", default=["3.05", "2.56", "2.06"], help="bits, or sizes of whole files")
    parser.add_argument("--steps", type=int, nargs="+", default=[240])
    parser.add_argument("--effort", default="default", help="of the search; 1,024 states and two passes are max")
    parser.add_argument("--cache", type=Path, help="folder of calibrations (default: in the work folder)")
    parser.add_argument("--embeddings", action="store_true", help="quantise them too")
    parser.add_argument("--name", default="", help="begins the names of files: one for each calibration")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [(steps, *packed(args, budget, steps)) for budget in args.budgets for steps in (0, *args.steps)]
    print("\n| steps | bits | bytes | " + " | ".join(f"{t.stem}: KL, top-1, perplexity" for t in args.texts) + " |")
    print("| ---: |" + " ---: |" * (2 + len(args.texts)), flush=True)
    found = [figures(args, text, [path for _, path, _ in rows]) for text in args.texts]
    for steps, path, about in rows:
        each = (of[path.name] for of in found)
        cells = " | ".join(f"{kl:.4f}, {top1:.2%}, {perplexity:.3f}" for kl, top1, perplexity in each)
        print(f"| {steps} | {about['bits']:.3f} | {about['bytes']:,} | {cells} |")


if __name__ == "__main__":
    main()
