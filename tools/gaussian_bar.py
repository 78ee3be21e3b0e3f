"""Distance of real .rac files from the rate-distortion bound of a Gaussian.

Packs an N x N matrix of independent N(0, 1) numbers at each budget, reads it back, and prints the bits per weight of
the whole file, the error, and the distance to R(D) = 1/2 log2(1 / D).

  python tools/gaussian_bar.py                 4096 x 4096 at 2, 3 and 4 bits with 8, 32 and 256 states
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from dataclasses import replace

import numpy as np

import rac
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.options import Budget
from rac.encode.pack import pack_source
from rac.encode.sources import from_arrays
from solve import solve


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=4096, help="rows and columns (default: 4096)")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--states", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--passes", type=int, default=2)
    args = parser.parse_args()
    w = np.random.default_rng(0).standard_normal((args.n, args.n), np.float32)
    source = from_arrays({"w": w})
    groups = ties.find(source.tensors)
    print("| states | bits per weight | error D | distance from R(D) | pack s | load M weights/s |")
    print("|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "gaussian.rac")
        for states in args.states:
            for bits in args.bits:
                start = time.perf_counter()
                recipe = replace(rcp.data_free(groups, (), "default"), states=states, passes=args.passes)
                recipe = solve(groups, recipe, Budget(bits=bits), 2)
                pack_source(source, path, recipe=recipe, force=True)
                packed = time.perf_counter()
                dense = rac.load_file(path)["w"]
                loaded = time.perf_counter()
                d = float(((dense - w).astype(np.float64) ** 2).mean())
                rate = 8 * os.path.getsize(path) / w.size
                print(
                    f"| {states} | {rate:.4f} | {d:.6f} | {rate - 0.5 * math.log2(1 / d):.4f} | {packed - start:.1f} "
                    f"| {w.size / 1e6 / (loaded - packed):.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
