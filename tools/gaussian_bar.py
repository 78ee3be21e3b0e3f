"""Distance of real .rac files from the rate-distortion bound of a Gaussian.

Packs an N x N matrix of independent N(0, 1) numbers at each budget, reads it back, and prints the bits per weight of
the whole file, the error, and the distance to R(D) = 1/2 log2(1 / D).

  python tools/gaussian_bar.py                 4096 x 4096 at 2, 3 and 4 bits with 8, 32 and 256 states
  python tools/gaussian_bar.py --states 256 --side 2048 --lanes 16 --classes 1     tiles of that side, fewer lanes
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
from rac.encode.code.plan import CODER, Level
from rac.encode.options import Budget
from rac.encode.pack import pack_source
from rac.encode.sources import from_arrays
from solve import solve


def coder(args: argparse.Namespace) -> Level:
    """How the integers are coded: as in any file, but for what was asked for."""
    level = CODER
    if args.lanes:
        level = replace(level, lanes=args.lanes, fixed=True)
    if args.side:  # cut in so many parts along each side, however large the tiles are for those who read slices
        parts = max(1, args.n // args.side)
        level = replace(level, tile=args.side**2, density={1: 1, 2: 2e6, 4: 8e6, 8: 1e7}[parts] / args.n**2)
    if args.classes:
        level = replace(level, row_classes=args.classes, col_classes=args.classes)
    return level


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=4096, help="rows and columns (default: 4096)")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--states", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--side", type=int, help="rows and columns of a tile: -n or a half, a quarter, an eighth of it")
    parser.add_argument("--lanes", type=int, help="ANS lanes of a tile")
    parser.add_argument("--classes", type=int, help="classes of rows, and of columns, that have tables of their own")
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
                recipe = replace(recipe, coder=coder(args))
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
