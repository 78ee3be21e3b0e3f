r"""What choices of the encoder change: the same model and budget, packed again and again, measured on one text.

A variant is one of the calibrations that --text names, or several joined by +, which then count alike, and what else
is different:

  damp=D        share of the mean energy that every input is taken to have beyond what was seen
  strength=S    how far bits follow the sensitivity of a tensor
  trust=E       exponent of the sensitivities of a tensor's outputs
  diagonal=A    second moments drawn towards their diagonal: (1 - A) S + A diag(S)

  python tools/variants.py demo/smollm2-hf test.txt --cache DIR --text wiki=valid.txt --text bible=kjv.txt \
      --text own=self wiki bible "bible diagonal=0.2" "wiki damp=0.1" bible+own
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from rac.calibrate.evaluate import Measure
from rac.calibrate.layers import Layer, calibrate, joined
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.options import Budget
from rac.encode.pack import pack_source
from rac.encode.sources import open_source
from smollm2_bar import HEAD, row
from solve import solve


def shrunk(layers: Mapping[str, Layer], share: float) -> dict[str, Layer]:
    """Second moments drawn towards their diagonal."""

    def one(x: Layer) -> Layer:
        def second() -> np.ndarray:
            s = np.array(x.second)
            own = np.diag(s).copy()
            s *= np.float32(1 - share)
            s[np.diag_indices_from(s)] += np.float32(share) * own
            return s

        return Layer(second, x.sensitivity, x.transposed, x.finite)

    return {name: one(layer) for name, layer in layers.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("test", type=Path)
    parser.add_argument("variants", nargs="+", metavar="VARIANT")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="FILE may be self")
    parser.add_argument("--bits", type=float, default=3.05)
    parser.add_argument("--effort", default="default")
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--cache", type=Path, help="folder where calibrations are kept")
    args = parser.parse_args()
    texts = dict(pair.split("=", 1) for pair in args.text)

    def layers_of(name: str) -> Mapping[str, Layer]:
        text = None if texts[name] == "self" else Path(texts[name]).read_text(encoding="utf-8")
        return calibrate(args.folder, text, tokens=args.tokens, cache=args.cache)

    source = open_source(args.folder)
    groups = ties.find(source.tensors)
    measure = Measure(args.folder, args.test.read_text(encoding="utf-8"))
    print(HEAD, flush=True)
    for variant in args.variants:
        first, *changes = variant.split()
        names = first.split("+")
        found: Mapping[str, Layer] = joined([layers_of(name) for name in names])
        options = {k: float(v) for k, v in (change.split("=") for change in changes)}
        found = shrunk(found, options.pop("diagonal", 0.0))
        sample = rcp.Sample(**{k: options.pop(k) for k in ("damp", "strength", "trust") if k in options})
        if options:
            parser.error(f"unknown: {', '.join(options)}")
        recipe = rcp.calibrated(groups, found, (), args.effort, sample=sample)
        recipe = solve(groups, recipe, Budget(bits=args.bits), 2)
        with tempfile.TemporaryDirectory() as temporary:
            done = pack_source(source, os.path.join(temporary, "m.rac"), recipe=recipe, jobs=2)
            print(row(measure, variant, done), flush=True)


if __name__ == "__main__":
    main()
