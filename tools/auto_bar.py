"""`--calibrate auto` against text of the very kind that is measured, and against the model's own text alone.

Each --kind names a text to measure on and one of the same kind to calibrate on. Every way to calibrate makes one pack,
its embedding lossless, which is measured on all of them; the bar is 1.25 times the better of in-domain and `self`, for
each kind.

  export MANWIDTH=80 MANOPT="--no-hyphenation --no-justification"
  man -P cat bash | col -bx > bash.txt
  for page in curl gpg systemd.unit find git-config less lsof git-log; do
      man -P cat $page | col -bx | head -c 45000; done > manuals.txt
  python tools/auto_bar.py demo/smollm2-hf --kind wikitext test.txt valid.txt --kind manual bash.txt manuals.txt
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import rac
from rac.calibrate.evaluate import Figures, Measure

BAR = 1.25


def packed(args: argparse.Namespace, texts: Sequence[str], path: str) -> float:
    """Pack the model, calibrated on the texts, and say how; the bits of the quantised tensors."""
    start = time.perf_counter()
    done = rac.pack(
        args.folder,
        path,
        bits=args.bits,
        embeddings=False,
        calibrate=texts,
        tokens=args.tokens,
        cache=args.cache,
        force=True,
        effort=args.effort,
        jobs=args.jobs,
    )
    print(f"packed on {' and '.join(texts)} in {time.perf_counter() - start:.0f} s", flush=True)
    return done.quantised_bits


def main() -> None:
    """Print the table, and whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Hugging Face folder of the original")
    parser.add_argument("--kind", nargs=3, action="append", required=True, metavar=("NAME", "TEST", "TRAIN"))
    parser.add_argument("--bits", type=float, default=3.05)
    parser.add_argument("--tokens", type=int, default=40960, help="of each text to calibrate on")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cache", help="folder where calibrations are kept")
    parser.add_argument("--ways", nargs="+", help="which rows to make (default: all, and the bar)")
    args = parser.parse_args()
    kinds = {name: (test, train) for name, test, train in args.kind}
    ways = {
        **{name: [train] for name, (_, train) in kinds.items()},
        "self": ["self"],
        "auto": ["auto"],
        "none": ["none"],
    }
    ways = {way: texts for way, texts in ways.items() if way in (args.ways or ways)}
    measures = {name: Measure(args.folder, Path(test).read_text(encoding="utf-8")) for name, (test, _) in kinds.items()}
    found: dict[tuple[str, str], Figures] = {}
    lines = []
    for way, texts in ways.items():
        with tempfile.TemporaryDirectory() as temporary:
            path = os.path.join(temporary, "m.rac")
            bits = packed(args, texts, path)
            weights = rac.load_file(path, framework="pt")
        for name, measure in measures.items():
            found[way, name] = measure.figures(measure.load(weights, way), way)
        cells = (f"{f.kl:.4f} | {f.top1:.2%} | {f.perplexity:.3f}" for f in (found[way, name] for name in kinds))
        lines.append(f"| {way} | {bits:.3f} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    print("\n| calibrated on | bits | " + " | ".join(f"{n}: KL, nats | top-1 | perplexity" for n in kinds) + " |")
    print("| --- | ---: |" + " ---: | ---: | ---: |" * len(kinds) + "\n" + "\n".join(lines) + "\n")
    for name in kinds if not args.ways else ():
        best = min(found[way, name].kl for way in (name, "self"))
        ratio = found["auto", name].kl / best
        print(f"{name}: auto {ratio:.2f} times the better of in-domain and self: {'met' if ratio <= BAR else 'MISSED'}")


if __name__ == "__main__":
    main()
