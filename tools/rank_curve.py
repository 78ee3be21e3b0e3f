"""What low-rank parts and PCA bases cost or save: bytes of real records, objects included, at equal output error.

For three layers of an encoder (MiniLM) the bits per weight with a part of each rank, at the output error that rank 0
has at 2, 3 and 4 bits, and the rank that `choose_rank` takes; then, for the layers that share the input of layer 0's
attention, triangular alignment, PCA with and without the bytes of its basis, and identity, also at equal error. The
error is tr(E S E^T), S the second moment of a layer's inputs, with the damping that the packer uses.

  python tools/rank_curve.py demo/minilm TEXT
"""

from __future__ import annotations

import argparse
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rac.calibrate.layers import calibrate
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.align.choose import choose
from rac.encode.align.recipe import Recipe
from rac.encode.options import ALIGNMENTS, Budget
from rac.encode.quantise.tensor import encode_with_words, size_of
from rac.encode.sources import open_source
from rac.linalg.triangular import damped
from solve import solve

LAYERS = ("0.attention.self.query", "0.intermediate.dense", "5.output.dense")
SHARING = ("0.attention.self.query", "0.attention.self.key", "0.attention.self.value")


def measure(groups: Sequence[ties.Group], recipe: Recipe) -> tuple[int, float, int]:
    """(bytes, output error, bytes of bases among them)."""
    size, error, bases = 0, 0.0, 0
    for g in groups:
        a = recipe.aligned[g.tensor.name]
        assert a.layer is not None  # noqa: S101
        coded, words = encode_with_words(g, recipe)
        e = words.view(np.float32).astype(np.float64) - rcp.matrix_of(g.tensor)
        error += float(np.vdot(e @ damped(a.layer.second, a.damp), e))
        size += size_of(coded, recipe)
        if a.basis is not None and a.basis.first == g.tensor.name:
            bases += a.basis.object.encoded.size
    return size, error, bases


def at_error(groups: Sequence[ties.Group], recipe: Recipe, goal: float) -> tuple[float, float]:
    """(bytes, bytes of bases) where the error is `goal`: between two scales close by, since steps of bytes are 64."""
    scale = recipe.scale
    _, error, _ = measure(groups, replace(recipe, scale=scale))
    scale += 0.5 * math.log2(goal / error)
    at = [measure(groups, replace(recipe, scale=scale + d)) for d in (-0.02, 0.02)]
    (a, x, bases), (b, y, _) = at
    return a + (b - a) * math.log(goal / x) / math.log(y / x), bases


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=25600)
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16])
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--effort", default="default")
    args = parser.parse_args()
    with open(args.text, encoding="utf-8") as f:
        layers = calibrate(args.model, f.read(), tokens=args.tokens, context=512)
    groups = {g.tensor.name: g for g in ties.find(open_source(args.model).tensors)}

    print(f"| layer | bits | {' | '.join(f'rank {r}' for r in args.ranks)} | chosen |")
    print(f"| --- | ---: |{' ---: |' * (len(args.ranks) + 1)}")
    for layer in LAYERS:
        mine = [groups[f"encoder.layer.{layer}.weight"]]
        t = mine[0].tensor
        plain = rcp.calibrated(mine, layers, (), args.effort)
        for bits in args.bits:
            start = solve(mine, plain, Budget(bits=bits), 1)
            goal = measure(mine, start)[1]
            chosen = choose(start, mine, None, "triangular", bits).aligned[t.name].rank
            found = []
            for rank in args.ranks:
                recipe = choose(start, mine, rank, "triangular", bits)
                found.append(8 * at_error(mine, recipe, goal)[0] / math.prod(t.shape))
            cells = [f"{found[0]:.4f}", *(f"{x - found[0]:+.4f}" for x in found[1:])]
            print(f"| {layer} | {bits:g} | {' | '.join(cells)} | {chosen} |", flush=True)

    print("\n| bits | triangular | pca | pca without its basis | identity |\n| ---: | ---: | ---: | ---: | ---: |")
    mine = [groups[f"encoder.layer.{layer}.weight"] for layer in SHARING]
    weights = sum(math.prod(g.tensor.shape) for g in mine)
    plain = rcp.calibrated(mine, layers, (), args.effort)
    for bits in args.bits:
        start = solve(mine, plain, Budget(bits=bits), 1)
        goal = measure(mine, start)[1]
        sizes = {a: at_error(mine, choose(start, mine, 0, a, bits), goal) for a in ALIGNMENTS[1:]}
        rate = {a: 8 * size / weights for a, (size, _) in sizes.items()}
        bare = rate["pca"] - 8 * sizes["pca"][1] / weights
        print(
            f"| {bits:g} | {rate['triangular']:.4f} | {rate['pca']:.4f} | {bare:.4f} | {rate['identity']:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
