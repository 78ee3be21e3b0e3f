"""The strongest rivals and RAC on the same model, calibration and texts, in one table.

All get the same second moments (damped alike). Rows are METHOD NUMBER:

  qtip 2           QTIP/EXL3: Hadamard matrices on both sides, LDLQ, bitshift trellis of 65,536 states; 2, 3 or 4 bits
  watersic 2.5     WaterSIC: scalar, successive cancellation, entropy of each column (no file: the rate is that entropy)
  gptvq 2          GPTVQ: pairs by codebooks; 2, 3 or 4 bits and the codebooks
  gguf IQ3_S       llama.cpp's type, the embedding in the type that llama.cpp chooses beside it (Q5_K or Q6_K)
  linear IQ3_S     the same, the embedding left as it is
  rac 3.05         linear layers at so many bits
  file 3.2         the whole file at so many bits, embedding included

tools/rival/ has what each leaves out. The embedding of rows other than gguf and file is as stored, BF16, also in the
bytes of the file, which count tokenizer and configuration for all. What is made is kept in the folder WORK, matrix by
matrix, as is what is measured: a second run makes what is missing. Seconds are those of a core, calibration excluded.

  python tools/rivals.py demo/smollm2-hf valid.txt WORK --text wikitext=test.txt --text manual=bash.txt \
      --cloze novel.txt --rows "qtip 2" "rac 2.06" --ggml libggml-base.so
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from numpy.typing import NDArray

import rac
from gguf_bar import Ggml, library
from rac.calibrate.evaluate import Measure, load_original
from rac.calibrate.layers import Layers, calibrate
from rac.encode import ties
from rac.encode.align.recipe import DAMP, matrix_of, quantisable
from rac.encode.sources import Source, open_source
from rac.encode.sources.tables import is_table
from rac.linalg.triangular import damped
from rival import cloze, gptvq, qtip, watersic

COARSE = ("IQ1", "IQ2", "IQ3_XXS")
"""Types beside which llama.cpp takes Q5_K for a tied embedding; beside others Q6_K."""
METHODS: dict[str, Callable[..., Any]] = {
    "qtip": qtip.quantised,
    "gptvq": gptvq.quantised,
    "watersic": watersic.quantised,
}
ROWS = (
    *(f"qtip {k}" for k in (2, 3, 4)),
    *(f"watersic {b}" for b in (2, 2.5, 3, 4)),
    *(f"gptvq {k}" for k in (2, 3, 4)),
    *(f"gguf {t}" for t in ("IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_0", "Q6_K")),
    *(f"rac {b}" for b in (1.75, 2.06, 2.3, 2.55, 2.8, 3.05, 3.4, 3.8, 4.24)),
    *(f"file {b}" for b in (2.7, 3.2, 3.8, 4.6)),
)
Floats = NDArray[np.float32]


class Bench:
    """What all rows are made of."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.source: Source = open_source(args.folder)
        self.layers: Layers = calibrate(
            args.folder, args.calibration.read_text(encoding="utf-8"), tokens=args.tokens, cache=args.cache
        )
        groups = ties.find(self.source.tensors)
        self.linear = [g.tensor for g in groups if quantisable(g.tensor) and g.tensor.name in self.layers]
        self.tables = [g.tensor for g in groups if is_table(g.tensor)]
        self.weights = sum(math.prod(t.shape) for t in self.linear)
        done = {t.name for t in self.linear}
        self.rest = sum(g.tensor.nbytes for g in groups if g.tensor.name not in done)
        self.rest += sum(len(file.read()) for file in self.source.attachments)
        self.ggml = Ggml(args.ggml) if args.ggml else None

    def one(self, method: str, what: str, number: int) -> tuple[float, Floats]:
        """(bits, numbers) of the matrix of that number."""
        t = self.linear[number]
        w = matrix_of(t)
        if method in ("gguf", "linear"):
            assert self.ggml  # noqa: S101
            size, out = self.ggml.quantised(what, w, self.layers[t.name].second.diagonal())
            return 8 * size, out
        second = damped(self.layers[t.name].second, DAMP)
        return METHODS[method](w, second, float(what) if method == "watersic" else int(what))  # type: ignore[no-any-return]

    def table(self, what: str) -> Iterator[tuple[str, int, Floats]]:
        """(name, bytes, numbers) of the embeddings of a GGUF file of type `what`."""
        assert self.ggml  # noqa: S101
        for t in self.tables:
            w = matrix_of(t)
            even = np.ones(w.shape[1], np.float32)
            yield t.name, *self.ggml.quantised("Q5_K" if what.startswith(COARSE) else "Q6_K", w, even)


class Row:
    """A row of the table, and where it is kept."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name
        self.method, self.what = name.split()
        self.folder = bench.args.work / name.replace(" ", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "row.json"
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    @property
    def archive(self) -> Path:
        """The file of a row of RAC."""
        return Path(self.folder, "m.rac")

    def keep(self, **more: Any) -> None:
        """Add to what is kept."""
        self.found |= more
        new = self.folder / "row.new"
        new.write_text(json.dumps(self.found))
        new.rename(self.folder / "row.json")

    def make(self) -> None:
        """Quantise the model, but for what is there."""
        if "bits" not in self.found:
            (self._pack if self.method in ("rac", "file") else self._quantise)()

    def _pack(self) -> None:
        args, b = self.bench.args, float(self.what)
        budget: dict[str, Any] = {"bits": b} if self.method == "rac" else {"file_bits": b, "embeddings": True}
        start = time.process_time()
        how: dict[str, Any] = {"calibrate": str(args.calibration), "tokens": args.tokens, "cache": args.cache}
        done = rac.pack(args.folder, str(self.archive), force=True, jobs=args.jobs, **how, **budget)
        self.keep(bits=done.quantised_bits, bytes=done.stored, seconds=time.process_time() - start)

    def _quantise(self) -> None:
        def one(number: int) -> None:
            path = self.folder / f"{number}.npy"
            if not path.exists():
                start = time.thread_time()
                bits, out = self.bench.one(self.method, self.what, number)
                about = {"bits": bits, "seconds": time.thread_time() - start}
                (self.folder / f"{number}.json").write_text(json.dumps(about))
                np.save(self.folder / "new" / f"{number}.npy", out)
                (self.folder / "new" / f"{number}.npy").rename(path)

        (self.folder / "new").mkdir(exist_ok=True)
        numbers = range(len(self.bench.linear))
        with ThreadPoolExecutor(self.bench.args.jobs) as pool:
            list(pool.map(one, numbers))
        each = [json.loads((self.folder / f"{i}.json").read_text()) for i in numbers]
        bits = sum(e["bits"] for e in each)
        rest = float(self.bench.rest)
        if self.method == "gguf":
            for (name, size, out), t in zip(self.bench.table(self.what), self.bench.tables, strict=True):
                rest += size - t.nbytes
                np.save(self.folder / f"{name}.npy", out)
        whole = int(bits / 8 + rest)
        self.keep(bits=bits / self.bench.weights, bytes=whole, seconds=sum(e["seconds"] for e in each))

    def tensors(self) -> dict[str, Any]:
        """Numbers by name, of what is quantised at least."""
        if self.method in ("rac", "file"):
            return rac.load_file(str(self.archive), framework="pt")
        names = {str(i): t.name for i, t in enumerate(self.bench.linear)}
        return {names.get(p.stem, p.stem): np.load(p) for p in self.folder.glob("*.npy")}


def measured(rows: Sequence[Row], key: str, measure: Callable[[], Callable[[Any], dict[str, float]]]) -> None:
    """Measure those that lack `key`, the original by {}; what is needed for it is made once, if at all."""
    do = None
    for row in rows:
        if key not in row.found and "bits" in row.found:
            do = do or measure()
            row.keep(**{key: do(row)})
            print(f"{row.name}: {key} {row.found[key]}", flush=True)


def on_text(bench: Bench, path: Path) -> Callable[[Any], dict[str, float]]:
    """KL, top-1 and perplexity on a text."""
    measure = Measure(bench.args.folder, path.read_text(encoding="utf-8"), bench.args.measure)
    print(f"original on {path.name}: {asdict(measure.figures())}", flush=True)

    def do(row: Row) -> dict[str, float]:
        state = {**measure.model.state_dict(), **row.tensors()}
        return asdict(measure.figures(measure.load(state, row.name), row.name))

    return do


def on_cloze(bench: Bench, path: Path) -> Callable[[Any], dict[str, float]]:
    """Last words of passages of a text."""
    _, model, tokenizer = load_original(bench.args.folder)
    asked = cloze.passages(path.read_text(encoding="utf-8"), bench.args.passages)
    print(f"original on {len(asked)} passages: {asdict(cloze.guesses(model, tokenizer, asked))}", flush=True)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def do(row: Row) -> dict[str, float]:
        import torch

        state = own | {name: torch.as_tensor(w).reshape(own[name].shape) for name, w in row.tensors().items()}
        model.load_state_dict(state)
        return asdict(cloze.guesses(model, tokenizer, asked))

    return do


def equal(points: Sequence[tuple[float, float]], kl: float) -> float | None:
    """The bits at which (bits, KL), logarithms of KL joined by straight lines, come to a KL; None beyond them."""
    for (a, p), (b, q) in itertools.pairwise(points):
        if p >= kl >= q:
            return a + (b - a) * math.log(p / kl) / math.log(p / q)
    return None


def table(rows: Sequence[Row], texts: Sequence[str]) -> None:
    """Print what is known, and how many bits RAC takes for the same KL."""
    heads = "".join(f" KL, {t} | perplexity | top-1 | RAC at that KL, bits | saved |" for t in texts)
    print(f"\n| row | file, bytes | bits |{heads} last words | seconds |")
    print("| --- | ---: | ---: |" + " ---: |" * (5 * len(texts) + 2))
    ours = sorted((r.found for r in rows if r.method == "rac" and "bits" in r.found), key=lambda f: float(f["bits"]))
    for row in rows:
        f = row.found
        if "bits" not in f:
            continue
        cells = ""
        for t in texts:
            if not (m := f.get(t)):
                cells += " | | | | |"
                continue
            cells += f" {m['kl']:.4f} | {m['perplexity']:.3f} | {m['top1']:.2%} |"
            points = [(o["bits"], o[t]["kl"]) for o in ours if t in o]
            same = equal(points, m["kl"]) if row.method not in ("rac", "file", "gguf") else None
            cells += f" {same:.3f} | {f['bits'] - same:.3f} |" if same else " | |"
        c = f.get("cloze")
        cells += f" {c['right']:.1%}, {c['loss']:.3f} |" if c else " |"
        print(f"| {row.name} | {f['bytes']:,} | {f['bits']:.3f} |{cells} {f['seconds']:.0f} |")


def main() -> None:
    """Make and measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="to measure on")
    parser.add_argument("--cloze", type=Path, help="prose whose last words are guessed")
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--ggml", metavar="PATH", default=library(), help="libggml-base (default: of llama-cpp-python)")
    parser.add_argument("--tokens", type=int, default=40960, help="of the calibration")
    parser.add_argument("--measure", type=int, default=8192, help="tokens measured on")
    parser.add_argument("--passages", type=int, default=400)
    parser.add_argument("--cache", type=Path, help="folder where the calibration is kept")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    bench = Bench(args)
    rows = [Row(bench, name) for name in args.rows]
    for row in rows:
        row.make()
    texts = dict(t.split("=", 1) for t in args.text)
    for name, path in texts.items():
        measured(rows, name, lambda path=path: on_text(bench, Path(path)))  # type: ignore[misc]
    if args.cloze:
        measured(rows, "cloze", lambda: on_cloze(bench, args.cloze))
    table(rows, list(texts))


if __name__ == "__main__":
    main()
