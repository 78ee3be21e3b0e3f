"""Pack every input of tests/promises/sizes.csv, print the sizes as a table, and fail where one is another than written.

    python tools/sizes.py [NAME ...]      all rows, or those of the inputs named
    python tools/sizes.py --write         the same, and write what was found into sizes.csv

A row is one input and the options of `rac pack`; `by` says who checks it: `test` rows are checked by `make test` too.

MiniLM and SmolLM2 come out of packages (demo.py, check_models.py) and lie in demo/: MiniLM as F32, as BF16 and as the
folder it comes in; SmolLM2 as GGUF, as the first of the three shards of check_models.py, and whole, as
demo/smollm2-hf/model.safetensors (smollm2_bar.py). "golden inputs": every good golden file is read, and its tensors
are saved again, sizes added up. "made weights": matrices of integers that follow from splitmix64, below.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import rac
from demo import DEMO, convert, fetch
from rac.cli import main as rac_main

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "promises" / "sizes.csv"
GOLDEN = ROOT / "format_spec" / "golden" / "good"
MODELS = {
    "MiniLM BF16": "minilm-bf16.safetensors",
    "MiniLM F32": "minilm-f32.safetensors",
    "MiniLM folder": "minilm",
    "SmolLM2 BF16": "smollm2-bf16/model-00001-of-00003.safetensors",
    "SmolLM2 whole": "smollm2-hf/model.safetensors",
    "SmolLM2 GGUF": "smollm2.gguf",
}


@dataclass(frozen=True)
class Row:
    """One input packed in one way: its bytes before and after."""

    name: str
    options: str
    raw: int
    bytes: int
    by: str


def rows() -> list[Row]:
    """What sizes.csv says."""
    with TABLE.open(newline="") as file:
        return [Row(r["name"], r["options"], int(r["raw"]), int(r["bytes"]), r["by"]) for r in csv.DictReader(file)]


def write(found: list[Row]) -> None:
    """Replace sizes.csv."""
    with TABLE.open("w", newline="") as file:
        out = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        out.writeheader()
        out.writerows(map(asdict, found))


def made() -> dict[str, NDArray[Any]]:
    """Weights by integer arithmetic alone: sums of uniform words, rows and columns scaled by powers of two."""

    def matrix(seed: int, height: int, width: int) -> NDArray[np.float32]:
        z = np.arange(1, height * width * 2 + 1, dtype=np.uint64) + np.uint64(seed << 32)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        uniform = (z ^ z >> np.uint64(31)).view(np.uint16).reshape(height, width, 8).astype(np.int32)
        scale = np.arange(height)[:, None] * 7 % 5 + np.arange(width) * 11 % 3
        out: NDArray[np.float32] = np.ldexp((uniform.sum(-1) - 4 * 65535).astype(np.float32), scale - 26)
        return out

    return {
        "embed.weight": matrix(1, 600, 192).astype(ml_dtypes.bfloat16),
        "layer.0.weight": matrix(2, 768, 192),
        "layer.1.weight": matrix(3, 192, 768).astype(ml_dtypes.bfloat16),
        "layer.2.weight": matrix(4, 256, 256).astype(np.float16),
        "norm.weight": matrix(5, 1, 192)[0] + np.float32(1),
    }


def source(name: str) -> Path:
    """The model of that name, fetched if it is not there."""
    path = DEMO / MODELS[name]
    if not path.exists():
        DEMO.mkdir(exist_ok=True)
        if name.startswith("MiniLM"):
            convert(fetch())
        else:
            from check_models import fetch_gguf, shard
            from smollm2_bar import dense

            gguf = fetch_gguf()
            if name == "SmolLM2 BF16":
                shard(gguf)
            elif name == "SmolLM2 whole":
                dense(gguf, path.parent)
    return path


def packed(path: Path, options: str, folder: Path) -> tuple[int, int]:
    """Bytes of a file or folder, and of the archive that `rac pack` makes of it."""
    out = folder / "packed.rac"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = rac_main(["pack", str(path), "-o", str(out), "--force", *options.split()])
    if status:
        raise SystemExit(said.getvalue())
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files), out.stat().st_size


def measure(row: Row, folder: Path) -> Row:
    """The row as it is now; writes into `folder`."""
    if row.name in MODELS:
        raw, size = packed(source(row.name), row.options, folder)
    elif row.name == "made weights":
        import safetensors.numpy as st

        st.save_file(made(), folder / "made.safetensors")
        raw, size = packed(folder / "made.safetensors", row.options, folder)
    elif row.name == "golden inputs":
        raw = size = 0
        for path in sorted(GOLDEN.iterdir()):
            tensors = rac.load_file(path)
            rac.save_file(tensors, folder / "again.rac", level=row.options.removeprefix("--level "))
            raw += sum(t.nbytes for t in tensors.values())
            size += (folder / "again.rac").stat().st_size
    else:
        raise SystemExit(f"{TABLE.name}: no input is named {row.name!r}")
    return replace(row, raw=raw, bytes=size)


def main() -> int:
    """Print the table; 1 where a size differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help='inputs, e.g. "MiniLM BF16" (default: all)')
    parser.add_argument("--write", action="store_true", help="write what was found into sizes.csv")
    args = parser.parse_args()
    stated = rows()
    if unknown := set(args.names) - {row.name for row in stated}:
        parser.error(f"no row is named {', '.join(sorted(unknown))}")
    result = []
    print("| file | options of `rac pack` | raw bytes | bytes | % |\n| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for row in stated:
            now = measure(row, Path(folder)) if not args.names or row.name in args.names else row
            result.append(now)
            if not args.names or row.name in args.names:
                was = "" if now == row else f" (sizes.csv: {row.bytes:,} of {row.raw:,})"
                cells = f"{row.name} | `{row.options}` | {now.raw:,} | {now.bytes:,}{was} | {now.bytes / now.raw:.2%}"
                print(f"| {cells} |", flush=True)
    if args.write:
        write(result)
    return int(result != stated and not args.write)


if __name__ == "__main__":
    sys.exit(main())
