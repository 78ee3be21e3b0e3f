"""What one number of KL hides: predictions of packed models by token, by position, by language, and over long runs.

Each FILE (.rac) is held against the original in FOLDER. Positions of --text, in windows of 1,024, are told apart by how
often the next token occurs in --counts and by how much of the window stands before them; --long is one text in windows
of 4,096; each of --kind NAME=FILE,FILE... is read in one window; and --prompts, 64 tokens of the middle of each file,
are continued by --length tokens, greedily and drawn at random (temperature 0.8, top-p 0.95, the same seed for all
models), to see whether runs repeat themselves, and where the greedy ones leave those of the original.
What was found is kept in the folder WORK, a file for each model and task, and only what is missing is measured.

  python tools/harder_look.py demo/smollm2-hf WORK 2.06=a.rac 3.05=b.rac 4.05=c.rac --text test.txt --counts valid.txt \
      --long emma.txt --kind code=a.txt,b.txt --kind french=c.txt --plot docs/harder-look.svg
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from numpy.typing import NDArray

import rac
from rac.calibrate.evaluate import Measure
from rac.models.predictions import begin, split

OFTEN = (0, 1, 10, 100, 1000)
"""Occurrences of a token from which on it is of the next kind."""
BEFORE = (0, 32, 128, 512, 1024, 2048)
"""Tokens that stand before a position, from which on it is of the next kind."""
TOGETHER = 256  # positions whose distributions are held in float32 together
GRAM = 4
"""Tokens in a row that a run is looked through for."""
PROMPT = 64
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "drawn": {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95},
}
"""How runs are made."""
Found = dict[str, NDArray[Any]]
Find = Callable[[Sequence[str]], dict[str, Found]]


class Look:
    """The original, and models whose weights take its place one after the other."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.measure = Measure(args.folder, args.text.read_text(encoding="utf-8"), args.tokens)
        auto: Any = self.measure._transformers
        self.tokenizer = auto.AutoTokenizer.from_pretrained(args.folder, local_files_only=True)
        self.front = begin(self.tokenizer)
        self.models: dict[str, Any] = {}

    def model(self, name: str) -> Any:
        """The model of a file, or the original; all that were asked for are held."""
        if name == "original":
            return self.measure.model
        if name not in self.models:
            state = rac.load_file(self.args.files[name], framework="pt")
            self.models[name] = self.measure.load(state, name)
        return self.models[name]

    def ids(self, paths: Iterable[Path], most: int) -> NDArray[np.int64]:
        """The first `most` tokens of texts that follow each other, without begin-of-text."""
        text = "\n\n".join(p.read_text(encoding="utf-8") for p in paths)
        return np.array(self.tokenizer(text, add_special_tokens=False).input_ids[:most])

    def compared(self, names: Sequence[str], windows: NDArray[np.int64]) -> dict[str, Found]:
        """For all positions but the last of a window: KL, whether the likeliest tokens are equal, place, next token."""
        keys = ("kl", "same", "place", "next")
        out: dict[str, dict[str, list[NDArray[Any]]]] = {name: {key: [] for key in keys} for name in names}
        for window in windows:
            ids = torch.from_numpy(window)[None]
            with torch.no_grad():
                p = self.measure.model(ids).logits[0, :-1]
                for name, found in out.items():
                    q = self.model(name)(ids).logits[0, :-1]
                    for a in range(0, len(p), TOGETHER):
                        own, other = (x[a : a + TOGETHER].float().log_softmax(-1) for x in (p, q))
                        found["kl"].append((own.exp() * (own - other)).sum(-1).numpy())
                        found["same"].append((own.argmax(-1) == other.argmax(-1)).numpy())
                    found["place"].append(np.arange(1, len(window)))
                    found["next"].append(window[1:])
        return {name: {key: np.concatenate(each) for key, each in found.items()} for name, found in out.items()}

    def continued(self, name: str, prompts: Sequence[NDArray[np.int64]], length: int, way: str) -> Found:
        """(prompts, length) tokens that the model writes after prompts of equal length."""
        torch.manual_seed(0)
        begun = torch.from_numpy(np.stack(prompts))
        how: dict[str, Any] = {"min_new_tokens": length, "max_new_tokens": length, **WAYS[way]}
        how |= {"attention_mask": torch.ones_like(begun), "repetition_penalty": 1.0}
        with torch.no_grad():
            return {"run": self.model(name).generate(begun, **how)[:, begun.shape[1] :].numpy()}

    def prompt(self, path: Path) -> NDArray[np.int64]:
        """PROMPT tokens of the middle of a text, begin-of-text before them where the model's tokenizer has it."""
        every = self.ids([path], 1 << 16)
        at = (len(every) - PROMPT) // 2
        return np.array([*self.front, *every[at : at + PROMPT]])


def kept(folder: Path, task: str, names: Sequence[str], find: Find) -> dict[str, Found]:
    """What the files of a task hold, one for each name; `find` makes those that are missing."""
    paths = {name: folder / f"{name}-{task}.npz" for name in names}
    missing = [name for name, path in paths.items() if not path.exists()]
    for name, found in find(missing).items() if missing else ():
        new = paths[name].with_suffix(".new.npz")
        np.savez(new, allow_pickle=False, **found)
        new.rename(paths[name])
        print(f"{paths[name].name}", flush=True)
    return {name: {key: np.asarray(value) for key, value in np.load(path).items()} for name, path in paths.items()}


def parts(value: NDArray[Any], edges: Sequence[int], found: Found) -> list[tuple[int, float, float]]:
    """(positions, mean KL, share of equal likeliest tokens) of values from each edge up to the next."""
    which = np.searchsorted(np.array(edges), value, "right") - 1
    out = []
    for i in range(len(edges)):
        at = which == i
        n = int(at.sum())
        out.append((n, float(found["kl"][at].mean()), float(found["same"][at].mean())) if n else (0, 0.0, 0.0))
    return out


def repeated(drawn: NDArray[np.int64]) -> list[float]:
    """Share of runs of GRAM tokens that occurred before in the same text, by tenths of the length, mean over texts."""
    steps = drawn.shape[1] // 10
    out = np.zeros(10)
    for text in drawn.tolist():
        seen: set[tuple[int, ...]] = set()
        for i in range(len(text) - GRAM + 1):
            gram = tuple(text[i : i + GRAM])
            out[min(9, i // steps)] += gram in seen
            seen.add(gram)
    return [float(x) for x in out / (steps * len(drawn))]


def distinct(drawn: NDArray[np.int64], n: int) -> float:
    """Different runs of n tokens in a text, as a share of all of them; mean over texts."""
    each = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in drawn.tolist()]
    return float(np.mean([len({*grams}) / len(grams) for grams in each]))


def apart(run: NDArray[np.int64], other: NDArray[np.int64]) -> list[int]:
    """Tokens that each text of a run has in common with the other's from the first on."""
    return [int(np.append(a != b, True).argmax()) for a, b in zip(run, other, strict=True)]


def names_of(edges: Sequence[int]) -> list[str]:
    """Names of what lies from each edge up to the next."""
    each = [f"{a:,} to {b - 1:,}" if b - a > 1 else f"{a:,}" for a, b in itertools.pairwise(edges)]
    return [*each, f"{edges[-1]:,} and more"]


def rows(title: str, kinds: Sequence[str], each: dict[str, list[tuple[int, float, float]]]) -> str:
    """A table of kinds: positions, then KL and agreement of each model; kinds without a position are left out."""
    models = list(each)
    out = [f"| {title} | positions |" + "".join(f" KL, {m} | top-1, {m} |" for m in models)]
    out.append("| --- | ---: |" + " ---: | ---: |" * len(models))
    for i, kind in enumerate(kinds):
        if n := each[models[0]][i][0]:
            cells = "".join(f" {each[m][i][1]:.4f} | {each[m][i][2]:.1%} |" for m in models)
            out.append(f"| {kind} | {n:,} |{cells}")
    return "\n".join([*out, ""])


def draw(path: Path, panels: dict[str, tuple[Sequence[str], dict[str, list[float]]]]) -> None:
    """Lines over named places, a panel each, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "rac", "font.size": 8, "svg.fonttype": "none"}
    from matplotlib import pyplot as plt

    figure: Any
    columns = -(-len(panels) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(5 * columns, 6.4))
    for ax, (title, (places, lines)) in zip(axes.flat, panels.items(), strict=False):
        for name, values in lines.items():
            ax.plot(range(len(values)), values, "o-", markersize=3, linewidth=1, label=name)
        ax.set_title(title, fontsize=9)
        ax.set_xticks(range(len(places)), places, rotation=30, ha="right")
        ax.grid(visible=True, linewidth=0.3)
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the original")
    parser.add_argument("work", type=Path)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--counts", type=Path, required=True, help="text whose tokens are counted")
    parser.add_argument("--long", type=Path)
    parser.add_argument("--kind", action="append", default=[], metavar="NAME=FILE,...")
    parser.add_argument("--tokens", type=int, default=8192, help="of --text, and of --long, which has 4,096 at least")
    parser.add_argument("--most", type=int, default=1024, help="tokens of each kind")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="texts that are continued")
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.files = dict(f.split("=", 1) for f in args.files)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


class Page:
    """Tables that are printed, and panels of the plot."""

    def __init__(self, models: Sequence[str]) -> None:
        self.models = models
        self.panels: dict[str, tuple[Sequence[str], dict[str, list[float]]]] = {}

    def add(self, kind: str, names: Sequence[str], each: dict[str, list[tuple[int, float, float]]], top: bool) -> None:
        """A table by kinds, and a panel of its KL, or with `top` of its agreement; empty kinds are left out."""
        print(rows(kind, names, each))
        shown = [i for i in range(len(names)) if each[self.models[0]][i][0]]
        lines = {m: [r[i][2 if top else 1] for i in shown] for m, r in each.items()}
        self.panels[f"{'equal top-1' if top else 'KL'} by {kind}"] = [names[i] for i in shown], lines

    def runs(self, made: dict[str, dict[str, NDArray[np.int64]]]) -> None:
        """How much of each tenth of a run was there before, of (way, model); how much is different in all."""
        each = {(way, m): repeated(run) for way, runs in made.items() for m, run in runs.items()}
        some = next(iter(made["greedy"].values()))
        print(f"| part of {some.shape[1]:,} tokens |" + "".join(f" {way}, {m} |" for way, m in each))
        print("| --- |" + " ---: |" * len(each))
        for i in range(10):
            print(f"| {10 * i} to {10 * i + 10} % |" + "".join(f" {r[i]:.1%} |" for r in each.values()))
        print(f"\n| {len(some)} texts | greedy leaves the original's after (middle) |", end="")
        print("".join(f" {way}: repeated | distinct-1 | distinct-2 | distinct-{GRAM} |" for way in made))
        print("| --- | --- |" + " ---: | ---: | ---: | ---: |" * len(made))
        for m in made["greedy"]:
            after = sorted(apart(made["greedy"][m], made["greedy"]["original"]))
            cells = f" {', '.join(map(str, after))} ({np.median(after):.0f}) |" if m != "original" else " |"
            for way, runs in made.items():
                shares = (np.mean(each[way, m]), *(distinct(runs[m], n) for n in (1, 2, GRAM)))
                cells += "".join(f" {share:.1%} |" for share in shares)
            print(f"| {m} |{cells}")
        for way in made:
            lines = {m: each[way, m] for m in made[way]}
            self.panels[f"repeated runs of {GRAM} tokens, {way}"] = [f"{10 * i} %" for i in range(10)], lines


def main() -> None:
    """Measure what is missing, print the tables, draw the plot."""
    args = arguments()
    look, page = Look(args), Page(list(args.files))
    counts = Counter(look.tokenizer(args.counts.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)
    kinds = dict(k.split("=", 1) for k in args.kind)
    tasks = {"text": split(look.ids([args.text], args.tokens), 1024, look.front)}
    tasks |= {"long": split(look.ids([args.long], max(args.tokens, 4096)), 4096, look.front)} if args.long else {}
    for kind, paths in kinds.items():
        ids = look.ids(map(Path, paths.split(",")), args.most)
        tasks[kind] = split(ids, len(ids) + len(look.front), look.front)
    models = list(args.files)

    def find(windows: NDArray[np.int64]) -> Find:
        return lambda names: look.compared(names, windows)

    found = {task: kept(args.work, task, models, find(windows)) for task, windows in tasks.items()}
    often = {m: parts(np.array([counts[t] for t in f["next"]]), OFTEN, f) for m, f in found["text"].items()}
    page.add("occurrences of the next token", names_of(OFTEN), often, top=True)
    for task in ("text", "long") if args.long else ("text",):
        each = {m: parts(f["place"], BEFORE, f) for m, f in found[task].items()}
        page.add("tokens before" + ", windows of 4,096" * (task == "long"), names_of(BEFORE), each, top=False)
    if kinds:
        each = {m: [x for k in kinds for x in parts(found[k][m]["place"], (0,), found[k][m])] for m in args.files}
        page.add("kind of text", list(kinds), each, top=False)
    if args.prompts:
        begun = [look.prompt(p) for p in args.prompts]

        def writes(way: str) -> Find:
            return lambda names: {name: look.continued(name, begun, args.length, way) for name in names}

        every = ("original", *models)
        page.runs({w: {m: kept(args.work, w, [m], writes(w))[m]["run"] for m in every} for w in WAYS})
    if args.plot:
        draw(args.plot, page.panels)


if __name__ == "__main__":
    main()
