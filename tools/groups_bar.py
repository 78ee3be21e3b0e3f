"""What matrices on a grid take in an archive, at a fixed rate and coded, and how fast they come out of it.

    python tools/groups_bar.py MODEL_DIR --include 'model.layers.[0-4].*' --bits 2 3 4 --group 64 128 0

`--group 0` is one scale for each row. Bits per weight count every byte of the quantised tensors. Times are seconds of
the CPU, the best of `--repeat`, on one thread, checksums on; the peers are safetensors.numpy and rac's own lossless
archive, giving the same dense tensors out of the page cache.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

import rac
from rac.encode.align.recipe import matrix_of, quantisable
from rac.encode.pack import pack_source
from rac.encode.sources import open_source
from rac.methods.grouped import pack_grouped
from rac.stages.groups import Grouped, spread, storable


def nearest(w: NDArray[np.float32], bits: int, group: int) -> Grouped:
    """Round `w` (R, C) to the nearest of 2**bits values between the ends of each group."""
    (rows, cols), most = w.shape, (1 << bits) - 1
    n = -(-cols // group)
    each = np.pad(w, ((0, 0), (0, n * group - cols))).reshape(rows, n, group)
    low, high = np.minimum(each.min(2), 0), np.maximum(each.max(2), 0)
    scales = storable((high - low) / most)
    zeros = np.clip(np.rint(-low / scales), 0, most).astype(np.uint8)
    codes = np.rint(w / spread(scales, group, cols)) + spread(zeros, group, cols)
    return Grouped(np.clip(codes, 0, most).astype(np.uint8), scales, zeros, group, bits)


def best(work: Callable[[], Any], repeat: int) -> float:
    """Seconds of the fastest."""
    found = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sizes and speeds of groups/1.")
    parser.add_argument("model", help="a Hugging Face folder or a safetensors file")
    parser.add_argument("--include", nargs="*", default=[], help="patterns of tensors")
    parser.add_argument("--bits", nargs="*", type=int, default=[2, 3, 4])
    parser.add_argument("--group", nargs="*", type=int, default=[64, 128, 0])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    source = open_source(args.model, args.include)
    source = type(source)("memory", source.tensors, (), {})
    matrices = {t.name: matrix_of(t) for t in source.tensors if quantisable(t)}
    weights = sum(w.size for w in matrices.values())
    print(f"{len(matrices)} matrices, {weights:,} weights; a row for each group of columns, 0: the whole row")
    print("bits  group  coder  bits/w  pack s  load GB/s  of safetensors  of lossless")
    with tempfile.TemporaryDirectory() as folder:
        path, peer, whole = Path(folder) / "m.rac", Path(folder) / "m.safetensors", Path(folder) / "whole.rac"
        pack_source(source, whole, jobs=1)
        rac.unpack(whole, peer)
        own = best(lambda: rac.load_file(whole, threads=1), args.repeat)  # numpy knows bfloat16 from here on
        others = best(lambda: safetensors.numpy.load_file(peer), args.repeat)
        for bits in args.bits:
            for group in args.group:
                given = {n: nearest(w, bits, min(group, w.shape[1]) or w.shape[1]) for n, w in matrices.items()}
                for entropy in (True, False):
                    start = time.process_time()
                    done = pack_grouped(source, given, path, entropy, force=True, jobs=1)
                    pack = time.process_time() - start
                    load = best(lambda: rac.load_file(path, threads=1), args.repeat)
                    print(
                        f"{bits:4}  {group:5}  {'coded' if entropy else 'fixed'}  {done.quantised_bits:6.3f}  "
                        f"{pack:6.2f}  {done.dense / load / 1e9:9.2f}  {others / load:14.2f}  {own / load:11.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
