"""Make a BF16 safetensors file with the shapes of an 8-billion-weight model and the statistics of a small one's layers.

    python tools/shaped.py demo/smollm2-bf16/model-00001-of-00003.safetensors demo/8b-shaped.safetensors --size 2000

Every matrix takes after one of the small model, of the same role where that is there: the scales of rows and columns
are drawn from those of the real matrix, and what is left of a weight without them from its real distribution (65,536
quantiles), all independently. So histograms, classes of rows and columns and compressed sizes follow real layers;
dependences beyond these do not, and no codec here looks for any. The same input makes the same file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
SHAPES = {
    "attn_q": (4096, 4096),
    "attn_k": (1024, 4096),
    "attn_v": (1024, 4096),
    "attn_output": (4096, 4096),
    "ffn_gate": (14336, 4096),
    "ffn_up": (14336, 4096),
    "ffn_down": (4096, 14336),
}
ROWS = 512  # that are made at once
LEAST = 1 << 16  # weights of a matrix that is taken as a pattern


def matrices(path: Path) -> dict[str, F32]:
    """The BF16 matrices of a safetensors file, by name, less tables of embeddings."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] == "BF16" and len(entry["shape"]) == 2 and end - begin >= 2 * LEAST and "emb" not in name:
            words = np.fromfile(path, "<u2", (end - begin) // 2, offset=start + begin)
            out[name] = (words.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
    return out


class Pattern:
    """What a real matrix (R, C) gives: scales of its rows (R,) and columns (C,), quantiles (65536,) without them."""

    def __init__(self, w: F32) -> None:
        self.rows = np.sqrt((w * w).mean(1)) + np.float32(1e-12)
        left = w / self.rows[:, None]
        self.cols = np.sqrt((left * left).mean(0)) + np.float32(1e-12)
        left = np.sort((left / self.cols).ravel())
        self.quantiles = left[np.linspace(0, len(left) - 1, 1 << 16).astype(np.int64)]

    def draw(self, shape: tuple[int, int], rng: np.random.Generator) -> Iterator[NDArray[np.uint16]]:
        """BF16 words of a matrix like it, ROWS rows at a time."""
        rows, cols = rng.choice(self.rows, shape[0]), rng.choice(self.cols, shape[1])
        for r in range(0, shape[0], ROWS):
            scale = rows[r : r + ROWS, None]
            w = self.quantiles[rng.integers(0, 1 << 16, (len(scale), shape[1]), np.uint16)] * scale * cols
            bits = w.astype(np.float32, copy=False).view(np.uint32)
            yield ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype("<u2")


def plan(size: int) -> list[tuple[int, str]]:
    """(layer, role) of as many tensors as `size` bytes hold, one at least."""
    out: list[tuple[int, str]] = []
    left, layer = size, 0
    while left > 0:
        for role, (r, c) in SHAPES.items():
            if not out or 2 * r * c <= left:
                out.append((layer, role))
            left -= 2 * r * c
        layer += 1
    return out


def make(source: Path, out: Path, size: int) -> None:
    """Write the file, under its name only when it is whole."""
    real = matrices(source)
    if not real:
        raise SystemExit(f"{source} has no BF16 matrices to take after")
    names, header, at = sorted(real), dict[str, Any](), 0
    chosen = plan(size)
    for layer, role in chosen:
        rows, cols = SHAPES[role]
        entry = {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [at, at + 2 * rows * cols]}
        header[f"blk.{layer}.{role}.weight"] = entry
        at += 2 * rows * cols
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    part = out.with_name(out.name + ".part")
    with part.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for layer, role in chosen:
            alike = [n for n in names if role in n] or [n for n in names if re.search("ffn|mlp", n)] or names
            rng = np.random.default_rng([layer, *role.encode()])
            for words in Pattern(real[alike[layer % len(alike)]]).draw(SHAPES[role], rng):
                file.write(words.data)
    part.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FILE.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--size", type=int, default=250, metavar="MB", help="at most (default: 250; the bars: 2000)")
    args = parser.parse_args()
    make(args.source, args.out, args.size * 10**6)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
