r"""What choices of the encoder change: the same model and budget, packed again and again, measured on texts.

A variant is one of the calibrations that --text names, or several joined by +, which then count alike, and what else
is different:

  damp=D        share of the mean energy that every input is taken to have beyond what was seen
  strength=S    how far bits follow the sensitivity of a tensor
  trust=E       exponent of the sensitivities of a tensor's outputs
  diagonal=A    second moments drawn towards their diagonal: (1 - A) S + A diag(S)
  rows=N        sensitivities are means over N rows: those of a head, or of all heads
  fed=1         errors are fed back along rows too, where that promises to pay, as --effort max has it
  states=N      states of the trellis
  passes=N      over each matrix
  slopes=1      costs of tensors are what --slope says times what the calibration foretells

With --packs each variant is packed several times, a thousandth smaller each time, and a row is the mean.

  python tools/variants.py demo/smollm2-hf test.txt --cache DIR --text wiki=valid.txt --text bible=kjv.txt \
      --text own=self wiki bible "bible diagonal=0.2" "wiki damp=0.1" bible+own
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import rac
from rac.calibrate.evaluate import Figures, Measure
from rac.calibrate.layers import Layer, calibrate, joined
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.options import Budget
from rac.encode.pack import Summary, pack_source
from rac.encode.sources import open_source
from smollm2_bar import HEAD
from solve import solve

LESS = 0.001
"""Share of the bits by which each pack is smaller than the one before."""


def figures(measure: Measure, name: str, done: Summary) -> Figures:
    """What the model of a pack predicts."""
    path = done.paths[0]
    return measure.figures(measure.load(rac.load_file(path, framework="pt"), path), name)


def row(name: str, of: list[float]) -> str:
    """A row of bits, perplexity, KL and top-1."""
    quantised, whole, perplexity, kl, top = of
    return f"| {name} | {quantised:.4f} | {whole:.3f} | {perplexity:.3f} | {kl:.4f} | {top:.2%} |"


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

    return {name: one(layer) for name, layer in layers.items()} if share else dict(layers)


def alike(layers: Mapping[str, Layer], rows: int) -> dict[str, Layer]:
    """Sensitivities that are means over so many rows that follow each other."""

    def one(s: np.ndarray | None) -> np.ndarray | None:
        if s is None:
            return None
        return np.concatenate([np.full(len(some), some.mean()) for some in np.split(s, range(rows, len(s), rows))])

    return {name: replace(layer, sensitivity=one(layer.sensitivity)) for name, layer in layers.items()}


def times(layers: Mapping[str, Layer], slopes: Mapping[str, float], strength: float) -> dict[str, Layer]:
    """Costs times the slope of the first pattern that a name matches, in full where bits follow them by a strength."""

    def one(name: str, layer: Layer) -> Layer:
        slope = next((slope for pattern, slope in slopes.items() if fnmatch(name, pattern)), 1.0)
        s = layer.sensitivity
        return layer if s is None else replace(layer, sensitivity=s * slope ** (1 / strength))

    return {name: one(name, layer) for name, layer in layers.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("test", type=Path)
    parser.add_argument("--beside", type=Path, action="append", default=[], metavar="FILE", help="measured on too")
    parser.add_argument("variants", nargs="+", metavar="VARIANT")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="FILE may be self")
    parser.add_argument("--bits", type=float, default=3.05)
    parser.add_argument("--effort", default="default")
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--slope", action="append", default=[], metavar="PATTERN=X", help="for slopes=1")
    parser.add_argument("--packs", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder where calibrations are kept")
    args = parser.parse_args()
    texts = dict(pair.split("=", 1) for pair in args.text)
    fed = any("fed=1" in variant.split() for variant in args.variants)
    slopes = {pattern: float(x) for pattern, x in (one.rsplit("=", 1) for one in args.slope)}

    def layers_of(name: str) -> Mapping[str, Layer]:
        text = None if texts[name] == "self" else Path(texts[name]).read_text(encoding="utf-8")
        return calibrate(args.folder, text, tokens=args.tokens, cache=args.cache, outer=fed)

    source = open_source(args.folder)
    groups = ties.find(source.tensors)
    tests = {t.stem: Measure(args.folder, t.read_text(encoding="utf-8")) for t in (args.test, *args.beside)}
    print(HEAD, flush=True)
    for variant in args.variants:
        first, *changes = variant.split()
        names = first.split("+")
        found: Mapping[str, Layer] = joined([layers_of(name) for name in names])
        options = {k: float(v) for k, v in (change.split("=") for change in changes)}
        found = shrunk(found, options.pop("diagonal", 0.0))
        shares: dict[str, Any] = {k: options.pop(k) for k in ("damp", "strength", "trust") if k in options}
        sample = rcp.Sample(**shares, rows=bool(options.pop("fed", 0)))
        found = alike(found, int(rows)) if (rows := options.pop("rows", 0)) else found
        found = times(found, slopes, sample.strength) if options.pop("slopes", 0) else found
        effort: dict[str, Any] = {k: int(options.pop(k)) for k in ("states", "passes") if k in options}
        if options:
            parser.error(f"unknown: {', '.join(options)}")
        every: dict[str, list[list[float]]] = {test: [] for test in tests}
        for i in range(args.packs):
            recipe = replace(rcp.calibrated(groups, found, (), args.effort, sample=sample), **effort)
            recipe = solve(groups, recipe, Budget(bits=args.bits * (1 - LESS * i)), 2)
            with tempfile.TemporaryDirectory() as temporary:
                done = pack_source(source, os.path.join(temporary, "m.rac"), recipe=recipe, jobs=2)
                for test, measure in tests.items():
                    f = figures(measure, variant, done)
                    one = [done.quantised_bits, 8 * done.stored / done.weights, f.perplexity, f.kl, f.top1]
                    every[test].append(one)
                    number = f", {i + 1}" * (args.packs > 1) + f", {test}" * (len(tests) > 1)
                    print(row(variant + number, one), flush=True)
        for test, of in every.items() if args.packs > 1 else ():
            print(row(f"**{variant}**" + f", {test}" * (len(tests) > 1), list(np.mean(of, 0))), flush=True)


if __name__ == "__main__":
    main()
