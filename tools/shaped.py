"""Make a BF16 safetensors file with the shapes of an 8-billion-weight model and the statistics of a small one's layers.

    python tools/shaped.py demo/smollm2-bf16/model-00001-of-00003.safetensors demo/8b-shaped.safetensors --size 2000
    python tools/shaped.py PATTERN.safetensors FOLDER --size 16000 --shards 4     # a model folder, as the Hub has it
    python tools/shaped.py PATTERN.safetensors OUT.safetensors --size 0 --one 8000 --tiny 100000

Every matrix takes after one of the small model, of the same role where that is there: the scales of rows and columns
are drawn from those of the real matrix, and what is left of a weight without them from its real distribution (65,536
quantiles), all independently. So histograms, classes of rows and columns and compressed sizes follow real layers;
dependences beyond these do not, and no codec here looks for any. The same input makes the same file. Behind the
matrices of the model come, where they are asked for, one of any size and many vectors of 16 to 1,024 weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
WIDE = 16384  # columns of the one matrix
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


@dataclass(frozen=True)
class Made:
    """A tensor that is made: its name, the role and number of the matrix that it takes after, its shape."""

    name: str
    role: str
    layer: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return 2 * int(np.prod(self.shape))


def plan(size: int) -> list[Made]:
    """As many matrices of the model as `size` bytes hold, one at least."""
    out: list[Made] = []
    left, layer = size, 0
    while left > 0:
        for role, (r, c) in SHAPES.items():
            if not out or 2 * r * c <= left:
                out.append(Made(f"blk.{layer}.{role}.weight", role, layer, (r, c)))
            left -= 2 * r * c
        layer += 1
    return out


def more(one: int, tiny: int) -> list[Made]:
    """A matrix of `one` bytes, about, and `tiny` vectors."""
    out = [Made("one.weight", "ffn_up", 0, (one // (2 * WIDE), WIDE))] if one else []
    vectors = range(tiny)
    return out + [Made(f"blk.{i // 100}.tiny.{i % 100}.bias", "ffn_up", i, (16 << i % 7,)) for i in vectors]


class Real:
    """The matrices to take after, and what was found of each."""

    def __init__(self, path: Path) -> None:
        """SystemExit where the file has none."""
        self._real, self._patterns = matrices(path), dict[str, Pattern]()
        if not self._real:
            raise SystemExit(f"{path} has no BF16 matrices to take after")

    def words(self, t: Made) -> Iterator[NDArray[np.uint16]]:
        """The words of a tensor, some rows at a time."""
        names = sorted(self._real)
        alike = [n for n in names if t.role in n] or [n for n in names if re.search("ffn|mlp", n)] or names
        name = alike[t.layer % len(alike)]
        if name not in self._patterns:
            self._patterns[name] = Pattern(self._real[name])
        rng = np.random.default_rng([t.layer, *t.role.encode()])
        rows, cols = t.shape if len(t.shape) == 2 else (1, *t.shape)
        return self._patterns[name].draw((rows, cols), rng)


def write(real: Real, out: Path, tensors: Sequence[Made]) -> str:
    """Write a file, under its name only when it is whole; its SHA-256."""
    header, at = dict[str, Any](), 0
    for t in tensors:
        header[t.name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [at, at + t.size]}
        at += t.size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    part, digest = out.with_name(out.name + ".part"), hashlib.sha256()
    with part.open("wb") as file:
        pieces: Iterator[Any] = chain([len(head).to_bytes(8, "little") + head], *map(real.words, tensors))
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
    part.replace(out)
    return digest.hexdigest()


def folder(real: Real, out: Path, tensors: Sequence[Made], shards: int) -> dict[str, str]:
    """Write a model folder of as many files; the SHA-256 of each by its name."""
    out.mkdir(parents=True, exist_ok=True)
    cuts = [i * len(tensors) // shards for i in range(shards + 1)]
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": tensors[cuts[i] : cuts[i + 1]] for i in range(shards)}
    where = {t.name: file for file, of in files.items() for t in of}
    index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text('{"model_type": "shaped"}\n')
    return {file: write(real, out / file, of) for file, of in files.items()}


def turned(path: Path, out: Path, number: int) -> dict[str, str]:
    """Write a file like another one, whose tensors have the same rows from another one on; what is in it, by name.

    To make them takes no time: for sizes at which nothing else is left to see.
    """
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    renamed = {f"turned.{number}.{name}": entry for name, entry in header.items() if name != "__metadata__"}
    head = json.dumps(renamed).encode()
    part = out.with_name(out.name + ".part")
    with part.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in renamed.values():
            begin, end = entry["data_offsets"]
            words = np.fromfile(path, "<u2", (end - begin) // 2, offset=start + begin).reshape(entry["shape"])
            first = 101 * number % len(words)
            file.write(words[first:].data)
            file.write(words[:first].data)
    part.replace(out)
    return dict.fromkeys(renamed, out.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FILE.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="or, with --shards, a folder")
    parser.add_argument("--size", type=int, default=250, metavar="MB", help="at most (default: 250; the bars: 2000)")
    parser.add_argument("--one", type=int, default=0, metavar="MB", help="and one matrix of this size")
    parser.add_argument("--tiny", type=int, default=0, metavar="N", help="and so many vectors")
    parser.add_argument("--shards", type=int, default=0, metavar="N", help="a folder of so many files")
    args = parser.parse_args()
    tensors = plan(args.size * 10**6) + more(args.one * 10**6, args.tiny)
    if not 0 <= args.shards <= len(tensors) or not tensors:
        raise SystemExit(f"{len(tensors)} tensors are made: no {args.shards} files of them")
    if args.shards:
        folder(Real(args.source), args.out, tensors, args.shards)
    else:
        write(Real(args.source), args.out, tensors)
    print(f"{args.out}: {len(tensors)} tensors, {sum(t.size for t in tensors)} bytes")


if __name__ == "__main__":
    main()
