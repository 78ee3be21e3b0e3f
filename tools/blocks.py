"""What second moments of their own are worth to the experts of one weight: real layers stacked as if they were experts.

The matrices of one role in consecutive layers are stacked to one weight (experts, out, in), or (experts, in, out), and
quantised at equal bits: with the mean of their second moments for all, and with each its own. Printed is the loss
tr(G E S E^T), summed over the experts (G: their output sensitivities on the diagonal), of the one against the other,
and what that is in bits: half a log2.

  python tools/blocks.py demo/smollm2-hf TEXT --cache DIR
"""

from __future__ import annotations

import argparse
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.layers import Layer, calibrate
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.options import Budget
from rac.encode.quantise.tensor import code
from rac.encode.sources import from_arrays, open_source
from solve import solve

ROLES = ("mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj")


def loss(w: NDArray[np.float32], each: Sequence[Layer], shared: bool, bits: float, turned: bool) -> float:
    """Of a weight (E, out, in) at `bits`, by the second moments of each, whichever the packer knew."""
    mean: NDArray[np.float32] = np.asarray(np.mean([one.second for one in each], 0), np.float32)
    known = [Layer(mean if shared else one.second, one.sensitivity, turned) for one in each]
    sensitivity = [one.sensitivity for one in each if one.sensitivity is not None]
    stored = np.ascontiguousarray(w.swapaxes(1, 2)) if turned else w
    groups = ties.find(from_arrays({"w": stored}).tensors)
    layer = Layer(mean, np.concatenate(sensitivity), turned, True, known)
    recipe = rcp.calibrated(groups, {"w": layer}, (), "default")
    solved = solve(groups, recipe, Budget(bits=bits), 2)
    e = code(groups[0].tensor, solved).dense.view(np.float32).reshape(stored.shape) - stored
    e = (e.swapaxes(1, 2) if turned else e).astype(np.float64)
    return sum(
        float((g[:, None] * e[i] * (e[i] @ np.asarray(one.second, np.float64))).sum())
        for i, (one, g) in enumerate(zip(each, sensitivity, strict=True))
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--cache")
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--layers", type=int, nargs=2, default=[12, 18], metavar=("FIRST", "BEHIND"))
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    args = parser.parse_args()
    with open(args.text, encoding="utf-8") as f:
        layers = calibrate(args.model, f.read(), tokens=args.tokens, cache=args.cache)
    tensors = {t.name: t for t in open_source(args.model).tensors}
    print("| weight | stored | bits | loss, own / shared | worth, bits |")
    print("| --- | --- | ---: | ---: | ---: |")
    for role in ROLES:
        names = [f"model.layers.{i}.{role}.weight" for i in range(*args.layers)]
        w = np.stack([rcp.matrix_of(tensors[name]) for name in names])
        each = [layers[name] for name in names]
        for turned in (False, True):
            for bits in args.bits:
                ratio = loss(w, each, False, bits, turned) / loss(w, each, True, bits, turned)
                stored = "in, out" if turned else "out, in"
                print(
                    f"| {role} x {len(names)} | {stored} | {bits:g} | {ratio:.3f} | {-0.5 * math.log2(ratio):.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
