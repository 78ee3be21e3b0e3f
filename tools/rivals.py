"""The strongest rivals and RAC on the same model, calibration and texts, in one table.

All get the same second moments (damped alike). Rows are METHOD NUMBER:

  qtip 2           QTIP/EXL3: Hadamard matrices on both sides, LDLQ, bitshift trellis of 65,536 states; 2, 3 or 4 bits
  watersic 2.5     WaterSIC: scalar, successive cancellation, entropy of each column (no file: the rate is that entropy)
  gptvq 2          GPTVQ: pairs by codebooks; 2, 3 or 4 bits and the codebooks
  int4 64          round to nearest in 4 bits, a scale and a zero point for each group of so many inputs
  linear IQ3_S     llama.cpp's type, rows joined until its blocks fit, the embedding left as it is
  gguf Q4_K_M      the file that llama.cpp makes, embedding and all in the types that it chooses; needs --gguf
  rac 3.05         linear layers at so many bits
  file 54MB        the whole file at that size, embedding included
  at PATH          a .rac or .gguf file that is there
  watersic-ft 2    tuned afterwards, as any of the first three may be: factors of rows and columns, codes as they are
  rac-ft 2.06      with --recover

A causal language model is measured by its predictions, any other by the embeddings of sentences (tools/rival/kinds.py).
Sentences are those of a text or, with --words, passages of so many words.
A row of rac or file is the mean of as many packs as --packs says, each a thousandth smaller than the one before.
tools/rival/ has what each leaves out. The embedding of the other rows is as stored, BF16, also in the
bytes of the file, which count tokenizer and configuration for all. What is made is kept in the folder WORK, matrix by
matrix, as is what is measured: a second run makes what is missing. Seconds are those of a core, calibration excluded.

  python tools/rivals.py demo/smollm2-hf valid.txt WORK --text wikitext=test.txt --text manual=man.txt \
      --choice emma.txt --rows "qtip 2" "rac 2.06" "gguf Q4_K_M" --gguf demo/smollm2.gguf
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from numpy.typing import NDArray

import rac
from gguf_bar import Ggml, library
from minilm_bar import nearest
from rac.calibrate.evaluate import load_original, translated
from rac.calibrate.layers import calibrate, joined
from rac.calibrate.pooling import readings
from rac.cli.info import report
from rac.encode import ties
from rac.encode.align.recipe import DAMP, matrix_of, quantisable
from rac.encode.options import CONTEXT
from rac.encode.sources import Source, open_source
from rac.linalg.triangular import damped
from rac.machine import parse_size
from rival import choice, gptvq, kinds, llama, qtip, tuned, watersic

METHODS: dict[str, Callable[..., Any]] = {
    "qtip": qtip.quantised,
    "gptvq": gptvq.quantised,
    "watersic": watersic.quantised,
    "int4": nearest,
}
FT = "-ft"
"""Ends the names of methods that are tuned afterwards."""
PACKED = ("rac", f"rac{FT}", "file")
"""Methods that RAC packs."""
WHOLE = (*PACKED, "gguf", "at")
"""Methods that leave a file."""
ORIGINAL = "the original"
LESS = 0.001
"""Share of its budget by which each pack of a row is smaller than the one before."""
ROWS = (
    *(f"qtip {k}" for k in (2, 3, 4)),
    *(f"watersic {b}" for b in (2, 2.5, 3, 4)),
    *(f"gptvq {k}" for k in (2, 3, 4)),
    *(f"gguf {t}" for t in ("IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_M", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")),
    *(f"gguf {t}" for t in ("Q6_K", "Q8_0")),
    *(f"rac {b}" for b in (1.62, 2.06, 2.56, 3.05, 3.5, 4.05)),
    *(f"file {size}MB" for size in (54, 64, 77)),
)
Floats = NDArray[np.float32]


class Bench:
    """What all rows are made of."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.kind = kinds.kind_of(args.folder)
        self.source: Source = open_source(args.folder)
        text = args.calibration.read_text(encoding="utf-8")
        self.how: dict[str, Any] = {"calibrate": str(args.calibration), "tokens": args.tokens, "cache": args.cache}
        parts = readings(args.folder, text, args.tokens, CONTEXT)
        made = [calibrate(args.folder, part, tokens=n, context=most, cache=args.cache) for part, n, most in parts]
        self.layers = joined(made)
        ids = made[0].ids
        self.school = tuned.School(args.folder, text, np.array(ids()), args.steps) if ids and self.kind.learns else None
        groups = ties.find(self.source.tensors)
        self.linear = [g.tensor for g in groups if quantisable(g.tensor) and g.tensor.name in self.layers]
        self.weights = sum(math.prod(t.shape) for t in self.linear)
        self.all = sum(math.prod(g.tensor.shape) for g in groups)
        done = {t.name for t in self.linear}
        self.rest = sum(g.tensor.nbytes for g in groups if g.tensor.name not in done)
        self.rest += sum(len(file.read()) for file in self.source.attachments)
        self.ggml = Ggml(args.ggml) if args.ggml else None

    def one(self, method: str, what: str, number: int) -> tuple[float, Floats]:
        """(bits, numbers) of the matrix of that number."""
        t = self.linear[number]
        w = matrix_of(t)
        if method == "linear":
            assert self.ggml  # noqa: S101
            size, out = self.ggml.quantised(what, w, self.layers[t.name].second.diagonal())
            return 8 * size, out
        second = damped(self.layers[t.name].second, DAMP)
        return METHODS[method](w, second, float(what) if method == "watersic" else int(what))  # type: ignore[no-any-return]

    def file(self, what: str, path: Path) -> None:
        """Write llama.cpp's file of a kind."""
        exact = self.args.work / "original.gguf"
        if not self.args.gguf:
            raise SystemExit("rows of gguf need --gguf, a GGUF file of the same model")
        if not exact.exists():
            llama.make(self.args.gguf, exact, "BF16", {})
            self._same(exact)
        llama.make(exact, path, what, {t.name: self.layers[t.name].second.diagonal() for t in self.linear})

    def _same(self, path: Path) -> None:
        """SystemExit where a GGUF file has other numbers than the folder."""
        theirs = translated(str(path))
        for t in (g.tensor for g in ties.find(self.source.tensors)):
            if not np.array_equal(theirs[t.name]().ravel(), matrix_of(t).ravel()):
                raise SystemExit(f"{self.args.gguf} has another {t.name} than {self.args.folder}")


class Row:
    """A row of the table, or one pack of it, and where it is kept."""

    def __init__(self, bench: Bench, name: str, pack: int = 0) -> None:
        self.bench, self.name, self.pack = bench, name, pack
        self.method, self.what = name.split()
        self.folder = bench.args.work / (name.replace(" ", "-").replace("/", "_") + (f"-{pack + 1}" if pack else ""))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "row.json"
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    @property
    def archive(self) -> Path:
        """The file of a row of whole files."""
        if self.method == "at":
            return Path(self.what)
        return Path(self.folder, "m.gguf" if self.method == "gguf" else "m.rac")

    def keep(self, **more: Any) -> None:
        """Add to what is kept."""
        self.found |= more
        new = self.folder / "row.new"
        new.write_text(json.dumps(self.found))
        new.rename(self.folder / "row.json")

    def make(self) -> None:
        """Quantise the model, but for what is there."""
        if "bits" in self.found:
            return
        if self.method not in WHOLE:
            (self._tune if self.method.endswith(FT) else self._quantise)()
            return
        start = time.process_time()
        if self.method == "gguf":
            self.bench.file(self.what, self.archive)
        elif self.method != "at":
            self._pack()
        seconds = {} if self.method == "at" else {"seconds": time.process_time() - start}
        about = self._of_gguf() if self.archive.suffix == ".gguf" else self._of_rac()
        self.keep(bytes=self.archive.stat().st_size, **about, **seconds)

    def _pack(self) -> None:
        args = self.bench.args
        less = 1 - LESS * self.pack
        budget: dict[str, Any] = {"size": int(parse_size(self.what) * less), "embeddings": True}
        if self.method != "file":
            budget = {"bits": float(self.what) * less, "embeddings": False}
        if self.method.endswith(FT):
            budget["recover"] = args.steps
        rac.pack(args.folder, str(self.archive), force=True, jobs=args.jobs, **self.bench.how, **budget)

    def _of_gguf(self) -> dict[str, Any]:
        found = llama.contents(self.archive)
        return {"bits": found.bits, "types": f"{found.types}; embedding {found.table}"}

    def _of_rac(self) -> dict[str, Any]:
        linear = {t.name for t in self.bench.linear}
        size = sum(t["bytes"] for t in report(str(self.archive))["tensors"] if t["name"] in linear)
        return {"bits": 8 * size / self.bench.weights}

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
        whole = int(bits / 8 + self.bench.rest)
        self.keep(bits=bits / self.bench.weights, bytes=whole, seconds=sum(e["seconds"] for e in each))

    def _tune(self) -> None:
        school, method = self.bench.school, self.method.removesuffix(FT)
        if school is None:
            raise SystemExit(f"{self.name}: the calibration took no text, so there is none to learn from")
        plain = Row(self.bench, f"{method} {self.what}")
        plain.make()
        start, size = time.process_time(), tuned.bits(method, [t.shape for t in self.bench.linear])
        out, said = school.tuned(plain.tensors(), self.folder / "state", self.bench.args.work / "taught")
        print(f"{self.name}: {said}", flush=True)
        for i, t in enumerate(self.bench.linear):
            np.save(self.folder / f"{i}.npy", out[t.name])
        seconds = plain.found["seconds"] + time.process_time() - start
        whole = plain.found["bytes"] + size // 8
        self.keep(bits=plain.found["bits"] + size / self.bench.weights, bytes=whole, seconds=seconds, tuned=said)

    def tensors(self) -> dict[str, Any]:
        """Numbers by name, of what is quantised at least."""
        if self.method not in WHOLE:
            return {t.name: np.load(self.folder / f"{i}.npy") for i, t in enumerate(self.bench.linear)}
        if self.archive.suffix == ".gguf":
            return {name: numbers() for name, numbers in translated(str(self.archive)).items()}
        return rac.load_file(str(self.archive), framework="pt")


def measured(rows: Sequence[Row], key: str, measure: Callable[[], Callable[[Any], dict[str, Any]]]) -> None:
    """Measure those that lack `key`; what is needed for it is made once, if at all."""
    do = None
    for row in rows:
        if key not in row.found and "bits" in row.found:
            do = do or measure()
            row.keep(**{key: do(row)})
            print(f"{row.name}: {key} measured", flush=True)


def on_text(bench: Bench, name: str, path: Path) -> Callable[[Any], dict[str, Any]]:
    """What is measured of the kind of model on a text."""
    amount = bench.args.measure or bench.kind.amount
    measure = bench.kind(bench.args.folder, path.read_text(encoding="utf-8"), amount, bench.args.words)
    Row(bench, ORIGINAL).keep(**{name: measure.original()})
    return lambda row: measure.of(row.tensors(), row.name)


def on_choice(bench: Bench, path: Path) -> Callable[[Any], dict[str, Any]]:
    """Continuations of passages of a text."""
    import torch

    _, model, tokenizer = load_original(bench.args.folder)
    asked = choice.questions(path.read_text(encoding="utf-8"), bench.args.questions)
    found = asdict(choice.answers(model, tokenizer, asked))
    Row(bench, ORIGINAL).keep(choice=found)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def do(row: Row) -> dict[str, Any]:
        state = own | {name: torch.as_tensor(w).reshape(own[name].shape) for name, w in row.tensors().items()}
        model.load_state_dict(state)
        return asdict(choice.answers(model, tokenizer, asked))

    return do


def equal(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The bits at which (bits, loss), logarithms of losses joined by straight lines, come to a loss; None beyond."""
    for (a, p), (b, q) in itertools.pairwise(points):
        if p >= loss >= q:
            return a + (b - a) * math.log(p / loss) / math.log(p / q)
    return None


def mean(packs: Sequence[Row], texts: Sequence[str], loss: str) -> dict[str, Any]:
    """What packs of a row have in common and in the mean; of a text also `spread`, highest over lowest loss less 1."""
    done = [r.found for r in packs if all(key in r.found for key in ("bits", *texts))]
    if not done:
        return {}
    found = done[0] | {key: sum(f[key] for f in done) / len(done) for key in ("bits", "bytes")}
    for text in texts:
        each = [f[text][loss] for f in done]
        found[text] = {k: sum(f[text][k] for f in done) / len(done) for k in done[0][text]}
        found[text]["spread"] = max(each) / min(each) - 1 if min(each) else 0.0
    return found | {"packs": len(done)}


def chosen(found: dict[str, Any], original: dict[str, Any]) -> str:
    """Cells of the task: share of right answers, what is lost of it and in nats, each with its standard error."""
    if "choice" not in found:
        return " | | |"
    right, loss = (np.array(found["choice"][k], np.float64) for k in ("right", "loss"))
    ours, less = (np.array(original["choice"][k], np.float64) for k in ("right", "loss"))
    share, lost, nats = choice.mean(right), choice.mean(ours - right), choice.mean(loss - less)
    return f" {share[0]:.1%} ± {share[1]:.1%} | {lost[0]:.1%} ± {lost[1]:.1%} | {nats[0]:.4f} ± {nats[1]:.4f} |"


def on(kind: kinds.Kind, text: str, f: dict[str, Any], ours: Sequence[dict[str, Any]]) -> str:
    """Cells of a text: what was measured, and at how many bits of linear layers the rows `ours` have the same loss."""
    if text not in f:
        return " |" * (len(kind.heads) + 2)
    m = f[text]
    spread = f" (± {m['spread'] / 2:.1%})" if m.get("spread") else ""
    same = equal([(o["bits"], o[text][kind.loss]) for o in ours], m[kind.loss])
    saved = f" {same:.3f} | {f['bits'] - same:.3f} |" if same else " | |"
    return kind.cells(m, spread) + saved


def table(bench: Bench, rows: dict[str, list[Row]], texts: Sequence[str]) -> None:
    """Print what is known."""
    kind = bench.kind
    each = " | ".join((*kind.heads[1:], "RAC at that loss, bits", "saved"))
    heads = "".join(f" {kind.heads[0]}, {t} | {each} |" for t in texts)
    task = "right | lost | nats lost"
    print(f"\n| row | packs | bytes | bits of the file | of linear layers |{heads} {task} | seconds |")
    print("| --- |" + " ---: |" * ((len(kind.heads) + 2) * len(texts) + 8))
    original = Row(bench, ORIGINAL).found
    means = {name: mean(packs, texts, kind.loss) for name, packs in rows.items()}
    ours = {
        how: sorted((f for n, f in means.items() if n.split()[0] == f"rac{how}" and f), key=bits) for how in ("", FT)
    }
    for name, f in ({ORIGINAL: original} | means).items():
        size = f"{f['bytes']:,.0f} | {8 * f['bytes'] / bench.all:.3f} | {f['bits']:.3f}" if "bits" in f else " | | "
        how = FT if name.split()[0].endswith(FT) else ""
        quantised = name.split()[0].removesuffix(FT) in (*METHODS, "linear")  # the embedding is as it was
        alike = ours[how] if quantised else []
        cells = "".join(on(kind, t, f, alike) for t in texts) + chosen(f, original)
        seconds = f"{f['seconds']:.0f}" if "seconds" in f else ""
        print(f"| {name} | {f.get('packs', '')} | {size} |{cells} {seconds} |")
    for name, f in means.items():
        if "types" in f:
            print(f"{name}: {f['types']}")


def bits(found: dict[str, Any]) -> float:
    """Bits of the linear layers of a row."""
    return float(found["bits"])


def main() -> None:
    """Make and measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="to measure on")
    parser.add_argument("--choice", type=Path, help="prose whose continuations are chosen from four")
    parser.add_argument("--questions", type=int, default=400, help="of these")
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--packs", type=int, default=1, help="of each row of rac and file")
    parser.add_argument("--ggml", metavar="PATH", default=library(), help="libggml-base (default: of llama-cpp-python)")
    parser.add_argument("--gguf", type=Path, help="a GGUF file of the original, for its tokenizer")
    parser.add_argument("--tokens", type=int, default=40960, help="of the calibration")
    parser.add_argument("--measure", type=int, help="tokens measured on (default: 8,192), or sentences (300)")
    parser.add_argument("--words", type=int, help="of a passage that an encoder is measured on (default: sentences)")
    parser.add_argument("--cache", type=Path, help="folder where the calibration is kept")
    parser.add_argument("--steps", type=int, default=240, help="of what is tuned afterwards")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    rows: dict[str, list[Row]] = {}
    for name in args.rows:
        rows[name] = [Row(bench, name, i) for i in range(args.packs if name.split()[0] in PACKED else 1)]
    every = [row for packs in rows.values() for row in packs]
    for row in every:
        row.make()
    texts = dict(t.split("=", 1) for t in args.text)
    for name, path in texts.items():
        measured(every, name, lambda n=name, path=path: on_text(bench, n, Path(path)))  # type: ignore[misc]
    if args.choice:
        measured([packs[0] for packs in rows.values()], "choice", lambda: on_choice(bench, args.choice))
    table(bench, rows, list(texts))


if __name__ == "__main__":
    main()
