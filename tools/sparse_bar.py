"""Matrices that are no Gaussians beside one that is, at one budget: bits and error of each, and what became of zeros.

Packs each with a dense Gaussian of the same size, so that the common scale has to share the bits, reads the file back,
and prints bits per weight of both records, outliers, signal to noise, and how many zeros of the source are something
else now. "alone" is the same matrix at the same budget with nothing beside it.

  python tools/sparse_bar.py                   1024 x 1024 at 4 bits
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

import rac
from rac.container.access import FileAccess
from rac.container.reader import Archive
from rac.encode.options import Budget, Hooks, Lossy, PackOptions
from rac.encode.pack import ByTrellis, Packer
from rac.encode.sources import from_arrays

F32 = NDArray[np.float32]
Make = Callable[[np.random.Generator, int], NDArray[np.float64]]


def two_of_four(r: np.random.Generator, n: int) -> NDArray[np.float64]:
    """A Gaussian with the two smallest of every four weights of a row 0."""
    w = r.standard_normal((n * n // 4, 4))
    np.put_along_axis(w, np.argsort(np.abs(w), 1)[:, :2], 0, 1)
    return w.reshape(n, n)


def thinned(share: float) -> Make:
    """A Gaussian of which that share is 0, anywhere."""
    return lambda r, n: np.asarray(np.where(r.random((n, n)) < share, 0.0, r.standard_normal((n, n))))


def decay(r: np.random.Generator, n: int) -> NDArray[np.float64]:
    """A matrix that falls off from its diagonal, as decays of linear attention do."""
    return np.asarray(r.standard_normal((n, n)) * 2.0 ** -np.abs(np.arange(n)[:, None] - np.arange(n)))


MATRICES: dict[str, Make] = {
    "Gaussian": lambda r, n: r.standard_normal((n, n)),
    "2:4": two_of_four,
    "half 0": thinned(0.5),
    "80 % 0": thinned(0.8),
    "90 % 0": thinned(0.9),
    "Laplace": lambda r, n: r.laplace(size=(n, n)),
    "Student t(2)": lambda r, n: r.standard_t(2, (n, n)),
    "Cauchy": lambda r, n: r.standard_cauchy((n, n)),
    "log-normal rows": lambda r, n: np.exp(2 * r.standard_normal((n, 1))) * r.standard_normal((n, n)),
    "decay": decay,
    "three values": lambda r, n: r.integers(-1, 2, (n, n)).astype(np.float64),
    "one value": lambda r, n: np.full((n, n), 0.3),
}


def packed(arrays: dict[str, F32], path: str, bits: float) -> tuple[dict[str, float], dict[str, int], dict[str, F32]]:
    """Bits per weight of each record, outliers (-1: lossless), and what comes back."""
    with Packer(from_arrays(arrays), path, PackOptions(force=True), Hooks()) as packer:
        done = packer.write(ByTrellis(packer.allocate("", Lossy(Budget(bits=bits))), packer.kept))
    archive = Archive(FileAccess(path))
    size = {e.name: 8 * e.size / math.prod(e.shape) for e in archive.index.entries}
    archive.close()
    return size, dict.fromkeys(arrays, -1) | {f.name: f.outliers for f in done.fidelity}, rac.load_file(path)


def noise(w: F32, back: F32) -> str:
    """Signal to noise in dB."""
    error = float(((back.astype(np.float64) - w) ** 2).sum())
    return f"{10 * math.log10(float((w.astype(np.float64) ** 2).sum()) / error):.2f}" if error else "exact"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=1024, help="rows and columns, a multiple of 4 (default: 1024)")
    parser.add_argument("--bits", type=float, default=4.0)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((args.n, args.n)).astype(np.float32)
    print(
        "| matrix | bits | SNR, dB | outliers | zeros lost | bits of the Gaussian | SNR, dB | alone: bits | SNR, dB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.rac")
        for name, make in MATRICES.items():
            w = make(rng, args.n).astype(np.float32)
            size, outliers, back = packed({"w": w, "dense": dense}, path, args.bits)
            lost = np.count_nonzero(back["w"][w == 0])
            alone, _, single = packed({"w": w}, path, args.bits)
            far = "lossless" if outliers["w"] < 0 else f"{outliers['w']:,}"
            print(
                f"| {name} | {size['w']:.3f} | {noise(w, back['w'])} | {far} | {lost} of {np.count_nonzero(w == 0):,} "
                f"| {size['dense']:.3f} | {noise(dense, back['dense'])} | {alone['w']:.3f} | {noise(w, single['w'])} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
