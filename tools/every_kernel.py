"""Whole models decoded by every set of kernels that runs here, and by none: the same bytes as their source.

    python tools/every_kernel.py demo/minilm-bf16.safetensors demo/minilm-f32.safetensors demo/smollm2-hf demo/s3.rac
    python tools/every_kernel.py --without demo/minilm-bf16.safetensors    # and without kernels: numba or numpy
    python tools/every_kernel.py --most 256 demo/8b-shaped.safetensors     # the first tensors, of so many MB together

A safetensors file, or a folder of them, is packed at each level; a .rac file, which has no source here, is compared
with what the first set makes of it. Kernels for aarch64 are compiled across and run in an emulator
(tests/support/arm.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import rac
from support import kernels  # type: ignore[import-untyped]

LEVELS = ("fast", "default", "max")
TYPES = {"BF16": ml_dtypes.bfloat16, "F16": "<f2", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}


def digest(tensors: Mapping[str, Any]) -> str:
    """Of names, data types, shapes and bytes, whatever the order."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        a = np.ascontiguousarray(tensors[name])
        h.update(f"{name} {a.dtype} {a.shape}\n".encode())
        h.update(a.reshape(-1).view(np.uint8).data)
    return h.hexdigest()[:16]


def source(path: Path, most: int) -> dict[str, Any]:
    """The tensors of safetensors files, mapped, without safetensors or rac; the first of up to `most` bytes."""
    out: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        size = int.from_bytes(file.open("rb").read(8), "little")
        header = json.loads(file.open("rb").read(8 + size)[8:])
        data = np.memmap(file, np.uint8, "r", 8 + size)
        for name, of in header.items():
            if name == "__metadata__":
                continue
            begin, end = of["data_offsets"]
            if (most := most - (end - begin)) < 0:
                return out
            out[name] = data[begin:end].view(TYPES[of["dtype"]]).reshape(of["shape"])
    return out


def compare(what: str, archive: Path, expected: str, without: bool) -> bool:
    """An archive under every set of kernels; whether all find the same. `expected`: "" is what the first finds."""
    good = True
    for cpu in (*kernels.here(), *([None] if without else [])):
        start = time.perf_counter()
        with kernels.using(cpu):
            tensors = rac.load_file(archive)
            by, took = cpu or "without kernels", time.perf_counter() - start
        found, weights = digest(tensors), sum(a.size for a in tensors.values())
        expected = expected or found
        good &= found == expected
        same = "the same" if found == expected else f"NOT {expected}"
        print(f"| {what} | {weights / 1e6:.1f} M | {by} | {took:.1f} | {found} | {same} |", flush=True)
    return good


def main() -> int:
    """Print a table; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--without", action="store_true", help="also without C kernels")
    parser.add_argument("--most", type=float, default=float("inf"), help="MB of a file that are taken")
    parser.add_argument("--level", action="append", choices=LEVELS, help="one level alone, or some")
    args = parser.parse_args()
    print("| file | weights | decoded by | seconds | SHA-256 | against the source |")
    print("| --- | ---: | --- | ---: | --- | --- |")
    good = True
    for path in args.files:
        if path.suffix == ".rac":
            good &= compare(path.name, path, "", args.without)
            continue
        tensors = source(path, int(min(args.most * 1e6, 1 << 62)))
        expected = digest(tensors)
        for level in args.level or LEVELS:
            with tempfile.TemporaryDirectory() as folder:
                archive = Path(folder) / "packed.rac"
                rac.pack(tensors, archive, level=level)
                good &= compare(f"{path.name}, {level}", archive, expected, args.without)
    return not good


if __name__ == "__main__":
    sys.exit(main())
