"""Bits that the linear layers of a small encoder need for one output SNR, against int4 baselines in the same run.

The 12 linear layers of MiniLM's layers 0 and 5, float32, second moments of their inputs from 51,200 tokens of a text.
For each layer the scale is found at which the SNR of its output, tr W S W^T against tr E S E^T, is reached; bits are
real bytes of the records that `rac pack` would write, all counted. The baselines are plain implementations of int4 in
groups of 64 along the inputs with a scale and a zero point, counted as 4.5 bits.

  python tools/minilm_bar.py demo/minilm valid.txt
"""

from __future__ import annotations

import argparse
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataclasses import replace

import numpy as np

from rac.calibrate.layers import calibrate
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.quantise.tensor import code, encode, size_of
from rac.encode.sources import open_source

GROUP = 64


def snr(w: np.ndarray, dense: np.ndarray, second: np.ndarray) -> float:
    """Output SNR in dB."""
    e = (dense - w).astype(np.float64)
    return 10 * math.log10(float(((w @ second) * w).sum() / ((e @ second) * e).sum()))


def int4(x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Asymmetric int4 at given scale and zero point."""
    out: np.ndarray = (np.clip(np.rint(x / scale) + zero, 0, 15) - zero) * scale
    return out


def grid(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row of a group (m, GROUP)."""
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = np.maximum((high - low) / 15, 1e-12).astype(np.float16).astype(np.float64)
    return scale, np.rint(-low / scale)


def rtn(w: np.ndarray, group: int = GROUP) -> np.ndarray:
    """Round to nearest, int4."""
    return np.concatenate([int4(g, *grid(g)) for g in np.split(w, w.shape[1] // group, axis=1)], axis=1)


def nearest(w: np.ndarray, second: np.ndarray, group: int) -> tuple[float, np.ndarray]:
    """(bits, numbers) of a matrix so rounded, scale and zero point in 16 bits each; the second moment is not used."""
    return (4 + 32 / group) * w.size, rtn(w, group).astype(np.float32)


def gptq(w: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The same grid with errors fed forward (Frantar et al. 2022), in the order of the columns."""
    n = w.shape[1]
    damped = second + 0.01 * np.trace(second) / n * np.eye(n)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    w, out = w.copy(), np.empty_like(w)
    for j in range(n):
        if j % GROUP == 0:
            scale, zero = grid(w[:, j : j + GROUP])
        out[:, j] = int4(w[:, j : j + 1], scale, zero)[:, 0]
        w[:, j + 1 :] -= np.outer((w[:, j] - out[:, j]) / upper[j, j], upper[j, j + 1 :])
    return out


def rotation(n: int) -> np.ndarray:
    """A random orthogonal matrix."""
    q, r = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))
    return np.asarray(q * np.sign(np.diag(r)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--snr", type=float, default=28.6)
    parser.add_argument("--tokens", type=int, default=51200)
    parser.add_argument("--efforts", nargs="+", default=["fast", "default", "max"])
    args = parser.parse_args()
    with open(args.text, encoding="utf-8") as f:
        layers = calibrate(args.model, f.read(), tokens=args.tokens, context=512)
    source = open_source(args.model)
    groups = [
        g
        for g in ties.find(source.tensors)
        if g.tensor.name in layers and (".0." in g.tensor.name or ".5." in g.tensor.name)
    ]
    print(f"{len(groups)} layers, {sum(math.prod(g.tensor.shape) for g in groups):,} weights, goal {args.snr} dB")
    print("| method | bits per weight | mean SNR dB |\n| --- | ---: | ---: |")
    plain: dict[str, list[float]] = {"RTN int4 g64": [], "GPTQ int4 g64": [], "rotation + GPTQ int4 g64": []}
    for g in groups:
        w, s = rcp.matrix_of(g.tensor).astype(np.float64), layers[g.tensor.name].second.astype(np.float64)
        q = rotation(w.shape[1])
        plain["RTN int4 g64"].append(snr(w, rtn(w), s))
        plain["GPTQ int4 g64"].append(snr(w, gptq(w, s), s))
        plain["rotation + GPTQ int4 g64"].append(snr(w, gptq(w @ q, q.T @ s @ q) @ q.T, s))
    for name, found in plain.items():
        print(f"| {name} | 4.50 | {np.mean(found):.2f} |")
    for effort in args.efforts:
        recipe = rcp.calibrated(groups, layers, (), effort)
        size, got = 0, []
        for g in groups:
            name = g.tensor.name
            w, s = rcp.matrix_of(g.tensor).astype(np.float64), layers[name].second.astype(np.float64)
            low, high = -6.0, 1.0
            for _ in range(12):
                middle = (low + high) / 2
                tried = replace(recipe, scale=middle, aligned={name: recipe.aligned[name]})
                dense = code(g.tensor, tried).dense.view(np.float32).astype(np.float64)
                reached = snr(w, dense, s)
                low, high = (middle, high) if reached >= args.snr else (low, middle)
            size += size_of(encode(g, replace(tried, scale=low)), replace(tried, scale=low))
            got.append(reached)
        bits = 8 * size / sum(math.prod(g.tensor.shape) for g in groups)
        print(f"| rac, triangular, {effort} | {bits:.3f} | {np.mean(got):.2f} |", flush=True)


if __name__ == "__main__":
    main()
