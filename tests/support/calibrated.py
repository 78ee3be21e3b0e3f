"""A calibrated pack of a small model, as a program: prints digests of the file and of a factor, and what was measured.

    python -m support.calibrated OUT.rac

Everything that it starts from is made of whole numbers, whose sums are exact in any order.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from rac.calibrate.layers import Layer
from rac.encode import ties
from rac.encode.align.choose import choose
from rac.encode.align.recipe import calibrated
from rac.encode.pack import pack_source
from rac.encode.quantise.tensor import code, snr
from rac.encode.sources import from_arrays
from rac.linalg.triangular import triangular

SEED = np.random.default_rng(7)


def weights(*shape):
    """Whole numbers over 64, about normal."""
    return (SEED.integers(-9, 10, (4, *shape)).sum(0) / 64).astype(np.float32)


def moment(n):
    """A second moment (n, n) of inputs of different size that follow each other."""
    x = SEED.integers(-2, 3, (2 * n, n)) * SEED.integers(1, 5, n)
    x[:, 1:] += x[:, :-1]
    return (x.astype(np.float64).T @ x.astype(np.float64)).astype(np.float32)


def sensitivity(n):
    return SEED.integers(1, 99, n) / 64


def main(out):
    wide, fused = moment(1024), [Layer(moment(128), sensitivity(64)) for _ in range(2)]
    tensors = {
        "wide.weight": weights(512, 1024),
        "level.weight": weights(64, 1024),
        "turned.weight": weights(256, 160),
        "experts.weight": weights(2, 64, 128),
        "unknown.weight": weights(160, 128),
        "sparse.weight": weights(192, 128) * SEED.integers(0, 2, (192, 128)).astype(np.float32),
        "sparse.turned.weight": weights(128, 192) * SEED.integers(0, 2, (128, 192)).astype(np.float32),
    }
    layers = {
        "wide.weight": Layer(wide, sensitivity(512)),
        "level.weight": Layer(wide, None),
        "turned.weight": Layer(moment(256), sensitivity(160), transposed=True),
        "experts.weight": Layer(moment(128), None, experts=fused),
        "sparse.weight": Layer(moment(128), sensitivity(192)),
        "sparse.turned.weight": Layer(moment(128), sensitivity(192), transposed=True),
    }
    source = from_arrays(tensors)
    groups = ties.find(source.tensors)
    recipe = calibrated(groups, layers, (), "fast")
    plain = choose(recipe, groups, 0, "identity", 3.0).aligned["level.weight"]
    recipe = replace(recipe, scale=-1.7, aligned={**recipe.aligned, "level.weight": plain})
    pack_source(source, out, recipe=recipe, jobs=1)
    print(hashlib.sha256(Path(out).read_bytes()).hexdigest())
    print(hashlib.sha256(triangular(wide).weight.tobytes()).hexdigest())
    for g in groups:
        print(g.tensor.name, snr(g.tensor, code(g.tensor, recipe).dense, recipe).hex())


if __name__ == "__main__":
    main(sys.argv[1])
