"""The quantisation types of llama.cpp and RAC on the same model, calibration and text, in one table.

All linear layers of a causal language model are quantised, the rest stays as it is. The types get the diagonal of the
second moments of the calibration text as their importance matrix; rows are joined until blocks of 256 fit them. Bits
per weight are bytes * 8 / weights of these layers: blocks, or whole records of a .rac file. KL(original || quantised)
per token in nats and top-1 agreement over all positions of the first MEASURE tokens of the text, in windows of 1,024.

  python tools/gguf_bar.py demo/smollm2-hf valid.txt test.txt --ggml libggml-base.so --types IQ4_XS Q3_K --bits 3.05

ggml comes from an installed llama-cpp-python, or from its source, of which one small library is enough:

  pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
  cd llama_cpp_python-*/vendor/llama.cpp/ggml && touch ggml.pc.in
  cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_CPU=OFF -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF
  cmake --build build --target ggml-base      # build/src/libggml-base.so
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import numpy as np
from numpy.typing import NDArray

import rac
from rac.calibrate.evaluate import Figures, Measure
from rac.calibrate.layers import calibrate
from rac.encode import ties
from rac.encode.align.recipe import calibrated, matrix_of, quantisable
from rac.encode.options import Budget
from rac.encode.pack import pack_source
from rac.encode.sources import open_source
from solve import solve

TYPES = (
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q5_0",
    "Q4_K",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K",
    "IQ3_S",
    "IQ3_XXS",
    "Q2_K",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "TQ2_0",
    "IQ1_M",
    "TQ1_0",
    "IQ1_S",
)
HEAD = (
    "| type | bits per weight | KL | top-1 | perplexity | seconds | smaller, and of lower KL, than |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
)
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    bits: float
    kl: float
    top1: float
    perplexity: float
    seconds: float
    conditions: str
    """What it was measured on, and with which calibration."""

    def text(self, others: list[Row]) -> str:
        """The row of the table; of a .rac file with the names of the types that it beats."""
        beaten = [o.name for o in others if self.bits < o.bits and self.kl < o.kl] if "rac" in self.name else []
        return (
            f"| {self.name} | {self.bits:.4f} | {self.kl:.5f} | {self.top1:.2%} | {self.perplexity:.3f} | "
            f"{self.seconds:.0f} | {', '.join(beaten)} |"
        )


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class Ggml:
    """The library; its calls run outside the interpreter's lock."""

    def __init__(self, path: str) -> None:
        lib = ctypes.CDLL(path)
        self._quantise = lib.ggml_quantize_chunk
        self._quantise.restype = ctypes.c_size_t
        self._quantise.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        )
        self._traits = lib.ggml_get_type_traits
        self._traits.restype = ctypes.POINTER(_Traits)
        self._traits.argtypes = (ctypes.c_int,)

    def known(self, name: str) -> bool:
        """Whether both this library and gguf-py have the type, of the same blocks."""
        kind = gguf.GGMLQuantizationType.__members__.get(name)
        if kind is None:
            return False
        t = self._traits(int(kind)).contents
        return bool(t.is_quantized) and (t.blck_size, t.type_size) == gguf.GGML_QUANT_SIZES[kind]

    def quantised(self, name: str, w: Floats, importance: Floats, check: bool = False) -> tuple[int, Floats]:
        """(bytes, numbers (R, C)) of a matrix (R, C) in blocks of type `name`; importance (C,) of its columns.

        `check`: gguf-py must read the same numbers.
        """
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, cols = w.shape
        join = block // math.gcd(block, cols)
        if rows % join:
            raise SystemExit(f"{rows} rows of {cols} cannot be joined to blocks of {block}")
        w = np.ascontiguousarray(w)
        weights = np.tile(importance.astype(np.float32), join)
        blocks = np.zeros(w.size // block * size, np.uint8)
        args = w.ctypes.data, blocks.ctypes.data, 0, rows // join, cols * join, weights.ctypes.data
        if self._quantise(int(kind), *args) != blocks.size:
            raise SystemExit(f"{name}: not all of a matrix was quantised")
        out = np.empty_like(w)
        self._traits(int(kind)).contents.to_float(blocks.ctypes.data, out.ctypes.data, w.size)
        if check:
            other = gguf.quants.dequantize(blocks.reshape(rows // join, -1), kind).reshape(w.shape)
            if not np.allclose(out, other, rtol=1e-5, atol=1e-6 * np.abs(out).max()):
                raise SystemExit(f"{name}: ggml and gguf-py read different numbers")
        return blocks.size, out


def library() -> str | None:
    """libggml-base of an installed llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    found = sorted(Path(spec.origin).parent.glob("lib/*ggml-base*")) if spec and spec.origin else []
    return str(found[0]) if found else None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--ggml", metavar="PATH", default=library(), help="libggml-base (default: of llama-cpp-python)")
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--bits", type=float, nargs="*", default=[4.24, 3.4, 3.05, 2.56, 2.06, 1.74, 1.55])
    parser.add_argument("--effort", default="default", help="of the .rac files")
    parser.add_argument("--tokens", type=int, default=40960, help="of the calibration")
    parser.add_argument("--measure", type=int, default=8192, help="tokens measured on")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="quantise these tensors only")
    parser.add_argument("--rows", type=Path, help="file that keeps every row; those it has are not measured again")
    parser.add_argument("--cache", type=Path, help="folder where the calibration is kept")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.types and not args.ggml:
        raise SystemExit("no ggml: install llama-cpp-python, or give --ggml libggml-base.so")
    ggml = Ggml(args.ggml) if args.types else None
    if ggml and (unknown := [t for t in args.types if not ggml.known(t)]):
        raise SystemExit(f"unknown to ggml or gguf-py: {', '.join(unknown)}")
    conditions = f"{args.tokens} {args.measure} {args.only}"
    kept: dict[str, Row] = {}
    if args.rows and args.rows.exists():
        rows = [Row(**json.loads(line)) for line in args.rows.read_text().splitlines()]
        kept = {row.name: row for row in rows if row.conditions == conditions}

    source = open_source(args.folder)
    groups = [g for g in ties.find(source.tensors) if quantisable(g.tensor) and fnmatchcase(g.tensor.name, args.only)]
    start = time.perf_counter()
    text = args.calibration.read_text(encoding="utf-8")
    layers = calibrate(args.folder, text, tokens=args.tokens, cache=args.cache)
    seconds = time.perf_counter() - start
    groups = [g for g in groups if g.tensor.name in layers]
    weights = sum(math.prod(g.tensor.shape) for g in groups)
    print(f"calibration on {args.tokens} tokens: {seconds:.0f} s. {len(groups)} matrices, {weights:,} weights\n")
    measure = Measure(args.folder, args.test.read_text(encoding="utf-8"), args.measure)
    own = measure.figures()
    print(f"{HEAD}\n| original | - | 0 | 100.00% | {own.perplexity:.3f} | | |", flush=True)

    def of_type(name: str) -> tuple[float, Figures]:
        assert ggml  # noqa: S101
        first = groups[0].tensor.name

        def one(g: ties.Group) -> tuple[str, int, Floats]:
            t = g.tensor
            return t.name, *ggml.quantised(name, matrix_of(t), layers[t.name].second.diagonal(), t.name == first)

        with ThreadPoolExecutor(args.jobs) as pool:
            found = list(pool.map(one, groups))
        bits = 8 * sum(size for _, size, _ in found) / weights
        return bits, figures({n: numbers for n, _, numbers in found}, name)

    def of_rac(bits: float) -> tuple[float, Figures]:
        recipe = calibrated(groups, layers, (), args.effort)
        recipe = solve(groups, recipe, Budget(bits=bits), args.jobs)
        with tempfile.TemporaryDirectory() as temporary:
            path = os.path.join(temporary, "m.rac")
            done = pack_source(source, path, recipe=recipe, jobs=args.jobs)
            return done.quantised_bits, figures(rac.load_file(path, framework="pt"), path)

    def figures(state: Mapping[str, Any], name: str) -> Figures:
        whole = {**measure.model.state_dict(), **state}
        return measure.figures(measure.load(whole, name), name)

    done: list[Row] = []
    work = [(name, name) for name in args.types] + [(f"rac {bits} {args.effort}", bits) for bits in args.bits]
    for name, what in work:
        row = kept.get(name)
        if row is None:
            start = time.perf_counter()
            bits, found = of_type(what) if isinstance(what, str) else of_rac(what)
            seconds = time.perf_counter() - start
            row = Row(name, bits, found.kl, found.top1, found.perplexity, seconds, conditions)
            if args.rows:
                with args.rows.open("a") as f:
                    f.write(json.dumps(asdict(row)) + "\n")
        print(row.text(done), flush=True)
        done.append(row)


if __name__ == "__main__":
    main()
