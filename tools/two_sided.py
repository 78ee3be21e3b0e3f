"""What feedback along rows too is worth, with second moments of output gradients from many tokens.

The loss of errors E of a matrix is near tr(G E S E'), S the second moment of its inputs and G that of the gradients at
its outputs: columns are fed back through a factor of S (`rac.linalg.triangular.triangular`), rows through one of G
(`rows`, which draws G towards its diagonal by a share). Matrices that match a pattern of --layers get both, with a
trellis of --states, fewer than others, since every survivor carries what its errors feed; "none" is the same pack
without, "states" the same with as many states for these matrices. G stays in the folder WORK. Each row is the mean of
--packs packs, a thousandth smaller one after the other, on each text that is measured.

  python tools/two_sided.py demo/smollm2-hf valid.txt WORK --text test.txt --text bash.txt --cache DIR none states 0.2
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate.endings import Predictions
from rac.calibrate.evaluate import Measure, load_original
from rac.calibrate.layers import calibrate
from rac.calibrate.moments import Collector
from rac.calibrate.tables import Tables
from rac.calibrate.text import sequences, text_ids
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.options import Budget
from rac.encode.pack import pack_source
from rac.encode.quantise import tensor as quantiser
from rac.encode.quantise import trellis as lossy
from rac.encode.sources import open_source
from rac.linalg.triangular import Rows, rows
from smollm2_bar import HEAD
from solve import solve
from variants import LESS, figures, row

CONTEXT = 1024


def gradients(args: argparse.Namespace, text: str) -> dict[str, NDArray[np.float64]]:
    """Second moments (out, out) of the gradients at the outputs of matrices, by name; labels are drawn."""
    path = args.work / f"gradients-{args.tokens}.npz"
    if not path.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        model: Any = load_original(args.folder)[1].requires_grad_(False)
        every = text_ids(str(args.folder), text, args.tokens)
        ids = torch.from_numpy(sequences(every.ids, args.tokens, CONTEXT, every.front))
        total: dict[str, Any] = {}

        def add(name: str, gradient: Any) -> None:
            g = gradient.reshape(-1, gradient.shape[-1])
            total[name] = total.get(name, 0) + g.T @ g

        def watch(_: Any, __: Any, out: Any, name: str) -> None:
            out.register_hook(partial(add, name))

        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and any(fnmatch(name, p) for p in args.layers):
                module.register_forward_hook(partial(watch, name=f"{name}.weight"))
        model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_(True))
        end, tables = Predictions(ids.shape[1]), Tables(Collector({}, outputs=True), {}, {})
        for i, one in enumerate(ids):
            end.backward(model(one[None], use_cache=False), i, 0, tables)
            if (i + 1) % 10 == 0:
                print(f"{(i + 1) * CONTEXT:,} of {ids.numel():,} tokens", flush=True)
        np.savez(path, **{name: g.double().numpy() / ids.numel() for name, g in total.items()})
    with np.load(path) as found:
        return {name: found[name] for name in found.files}


class Both:
    """Quantises matrices with errors fed back along rows too, in the place of `rac.encode.quantise.tensor.code`."""

    def __init__(self, below: Mapping[str, Rows], fed: bool, states: int) -> None:
        self._below, self._fed, self._states, self._code = below, fed, states, quantiser.code

    def __enter__(self) -> None:
        quantiser.code = self  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        quantiser.code = self._code

    def __call__(self, t: Any, recipe: rcp.Recipe) -> quantiser.Coded:
        """A matrix, quantised."""
        if t.name not in self._below:
            return self._code(t, recipe)
        a, effort = recipe.aligned[t.name], replace(recipe.effort, states=self._states)
        feed = self._below[t.name].feed if self._fed else None
        w = rcp.matrix_of(t)
        q = lossy.quantise(w, t.dtype, a.base + recipe.scale, a.scales, effort, a.columns(), feed)
        return quantiser.Coded(q, t.dtype, ())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("variants", nargs="+", metavar="none|states|SHRINK")
    parser.add_argument("--text", type=Path, action="append", required=True, metavar="FILE", help="measured on")
    parser.add_argument("--tokens", type=int, default=204_800, help="that gradients are taken of")
    parser.add_argument("--layers", nargs="+", default=["*q_proj", "*k_proj", "*o_proj", "*down_proj"])
    parser.add_argument("--states", type=int, default=quantiser.SHAPED, help="of the trellis of these")
    parser.add_argument("--bits", type=float, default=3.05)
    parser.add_argument("--packs", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="folder where calibrations are kept")
    args = parser.parse_args()
    own = args.calibration.read_text(encoding="utf-8")
    second = gradients(args, own)
    layers = calibrate(args.folder, own, cache=args.cache)
    source = open_source(args.folder)
    groups = ties.find(source.tensors)
    measures = {t.stem: Measure(args.folder, t.read_text(encoding="utf-8")) for t in args.text}
    print(HEAD, flush=True)
    for variant in args.variants:
        fed = variant not in ("none", "states")
        below = {} if variant == "none" else {n: rows(g, float(variant) if fed else 1.0) for n, g in second.items()}
        costs = {n: replace(layers[n], sensitivity=np.square(r.weight)) for n, r in below.items() if fed}
        found = {**layers, **costs}
        every: dict[str, list[list[float]]] = {text: [] for text in measures}
        for i in range(args.packs):
            recipe = rcp.calibrated(groups, found, (), "default")
            with Both(below, fed, args.states), tempfile.TemporaryDirectory() as temporary:
                recipe = solve(groups, recipe, Budget(bits=args.bits * (1 - LESS * i)), 2)
                done = pack_source(source, os.path.join(temporary, "m.rac"), recipe=recipe, jobs=2)
                for text, measure in measures.items():
                    f = figures(measure, variant, done)
                    one = [done.quantised_bits, 8 * done.stored / done.weights, f.perplexity, f.kl, f.top1]
                    every[text].append(one)
                    print(row(f"{variant}, {i + 1}, {text}", one), flush=True)
        for text, rows_of in every.items():
            print(row(f"**{variant}**, {text}", list(np.mean(rows_of, 0))), flush=True)


if __name__ == "__main__":
    main()
