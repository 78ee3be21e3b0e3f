"""Quantised versions of a model: what they shrink to losslessly, and what a pack to 3 bits loses beside the original's.

python tools/quantised_bar.py TRAIN.txt TEST.txt [--source FOLDER] [--schemes fp8,mxfp4,nvfp4] [--tokens N] [--bits B]

Makes each version by tools/quantised_models.py in a scratch folder. KL is of each pack from the model that it was made
of, on TEST; the calibration is on TRAIN, embeddings stay lossless.
Exit code 1 where a bar is missed: FP8 at most 83 % of its bytes, KL at most
1.1 times that of packing the original.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import quantised_models
import rac
from rac.encode.sources import Extent, open_source
from rac.study.compare import Reading, compare

LOSSLESS, FURTHER = {"fp8": 0.83}, 1.1


def tensors(folder: Path) -> int:
    """Bytes of the stored tensors that are codes and scales."""
    every = open_source(folder).tensors
    kept = {t.name for t in open_source(folder, dequantise=True).tensors if isinstance(t.data, Extent)}
    return sum(t.nbytes for t in every if t.name not in kept)


def lossless(folder: Path, out: Path) -> float:
    """Share of their bytes that codes and scales take in a lossless pack of the folder."""
    kept = {t.name for t in open_source(folder, dequantise=True).tensors if isinstance(t.data, Extent)}
    rac.pack(folder, out, force=True)
    with rac.open(out) as f:
        stored = sum(e.size for a in f.archives for e in a.index.entries if e.dtype and not kept & {*e.names})
    return stored / tensors(folder)


def main() -> int:
    """Print a row for each version."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("train")
    p.add_argument("test")
    p.add_argument("--source", default="demo/smollm2-hf")
    p.add_argument("--schemes", default="fp8,mxfp4,nvfp4")
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--bits", type=float, default=3.0)
    p.add_argument("--effort", default="fast")
    args = p.parse_args()
    missed, first = [], 0.0
    print(f"{'version':<10} lossless  bits/w      KL  of the original's  seconds", flush=True)
    with tempfile.TemporaryDirectory(prefix="rac-quantised-") as scratch:
        for scheme in ("original", *args.schemes.split(",")):
            start, here = time.monotonic(), Path(scratch, scheme)
            folder = Path(args.source)
            ratio = ""
            if scheme != "original":
                folder = quantised_models.make(scheme, folder, here)
                share = lossless(folder, Path(scratch, "whole.rac"))
                ratio = f"{share:.2%}"
                if share > LOSSLESS.get(scheme, 1):
                    missed.append(f"{scheme} takes {ratio}, {LOSSLESS[scheme]:.0%} is the bar")
            out = Path(scratch, f"{scheme}.rac")
            asked = {"bits": args.bits, "calibrate": args.train, "tokens": args.tokens, "effort": args.effort}
            asked["embeddings"] = False
            done = rac.pack(folder, out, **asked)
            text = Path(args.test).read_text(encoding="utf-8")
            *_, row = compare(folder, [out], Reading(text, args.tokens))
            kl = row.kl or 0.0
            first = first or kl
            print(
                f"{scheme:<10} {ratio:>8} {done.quantised_bits:7.3f} {kl:7.4f} {kl / first:18.3f} "
                f"{time.monotonic() - start:8.0f}",
                flush=True,
            )
            if kl > FURTHER * first:
                missed.append(f"{scheme}: KL is {kl / first:.3f} times that of the original, {FURTHER} is the bar")
    print("\n".join(missed) or "all bars are met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
