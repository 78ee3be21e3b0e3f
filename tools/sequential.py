"""What tuning between the blocks is worth, beside recovery: a model packed with either, with both and with neither.

Sequential tuning, as in QuIP# and AQLM: block after block gets the hidden states of the quantised blocks before it, and
what of it is not quantised yet learns to give the original's. Query, key and value are quantised, the rest of the block
is tuned; then the output layer, and the MLP is tuned; then gate and up, and down is tuned; then down. Recipe, scale and
second moments are those of the pack without. Models of Llama's layout.

A RUN is STEPS or seq+STEPS: steps of recovery (0: none), behind sequential tuning or not. Core seconds are those of the
process: all, and without calibration and the original's predictions. Files and figures stay in WORK.

  OMP_NUM_THREADS=1 python tools/sequential.py demo/smollm2-hf valid.txt WORK test.txt bash.txt --runs 0 seq+0 120
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from rac.calibrate.builtin import learned
from rac.calibrate.text import text_ids
from rac.encode import ties
from rac.encode.align.recipe import Recipe
from rac.encode.encoded import Encoded, decoded
from rac.encode.options import Budget, Calibration, Hooks, Lossy, PackOptions
from rac.encode.pack import ByTrellis, Packer
from rac.encode.quantise.tensor import encode
from rac.encode.sources import open_source
from rac.encode.tuned import Tuning
from rac.recover.model import fast
from rac.stages.words import from_words, to_words
from recover_bar import figures

CONTEXT, BATCH = 512, 4  # tokens of a sequence, sequences of a step
BETAS = 0.9, 0.95
RATE, END = 0.02, 0.1  # of a matrix's root mean square; what is left of it at the end
TAUGHT = "recovery: the original"
Some = slice | list[int]  # sequences


class Clock:
    """Core seconds by what a pack says of them."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.process_time()

    def __call__(self, what: str, done: int, of: int) -> None:
        """Called as the `note` of a pack: what was done since the last call."""
        now = time.process_time()
        self.seconds[what if what == TAUGHT else what.split(":")[0]] += now - self._last
        self._last = now
        if of == 0 or done in (1, of) or done % 70 == 0:
            print(f"{what} {done}/{of}, {now:.0f} core s", flush=True)


class Blocks:
    """The blocks of a model one after the other: tuned, and quantised as they go."""

    def __init__(self, path: str, ids: NDArray[np.int64], held: int, steps: Sequence[int]) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self._held, self._steps, self._made = held, steps, np.random.default_rng(0)
        inner = self.model.model
        with torch.no_grad():
            self._x = inner.embed_tokens(torch.from_numpy(ids))  # what the quantised blocks give
            self._rope = inner.rotary_emb(self._x[:BATCH], torch.arange(CONTEXT)[None])
        self._y = self._x.clone()  # what those of the original give

    def run(self, quantised: Callable[[str, Any], Any]) -> Iterator[float]:
        """After each block its error on the sequences that are held out.

        `quantised` gives, for the name of a matrix and what it has become, what a decoder restores.
        """
        for i, block in enumerate(self.model.model.layers):
            self._block(block, partial(self._put, block, f"model.layers.{i}", quantised))
            x, y = (z[: self._held] for z in (self._x, self._y))
            yield float(_error(x, y)) if self._held else math.nan

    @staticmethod
    def _put(block: Any, name: str, quantised: Callable[[str, Any], Any], *leaves: str) -> None:
        for leaf in leaves:
            w = block.get_submodule(leaf).weight
            w.data = quantised(f"{name}.{leaf}.weight", w.data)

    def _block(self, block: Any, put: Callable[..., None]) -> None:
        """Quantise and tune in turns; the hidden states go through the block as parts of it are done."""
        x, y, mlp = self._x, self._y, block.mlp
        inside = x.new_empty(*x.shape[:2], mlp.down_proj.in_features, dtype=fast("cpu"))

        def attention(x: Any) -> Any:
            normed = block.input_layernorm(x)
            return x + block.self_attn(normed, position_embeddings=self._rope, attention_mask=None)[0]

        def gated(x: Any) -> Any:
            normed = block.post_attention_layernorm(x)
            return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)

        def whole(x: Any) -> Any:
            x = attention(x)
            return x + mlp.down_proj(gated(x))

        def last(some: Some) -> Any:
            return x[some] + mlp.down_proj(inside[some])

        out, gates, down = "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
        _fill(y, lambda some: whole(y[some]))
        put(*(f"self_attn.{name}_proj" for name in "qkv"))
        self._tune(block, (out, *gates, down), lambda some: whole(x[some]), self._steps[0])
        put(out)
        _fill(x, lambda some: attention(x[some]))
        self._tune(block, (*gates, down), lambda some: x[some] + mlp.down_proj(gated(x[some])), self._steps[1])
        put(*gates)
        _fill(inside, lambda some: gated(x[some]))
        self._tune(block, (down,), last, self._steps[2])
        put(down)
        _fill(x, last)

    def _tune(self, block: Any, leaves: Sequence[str], part: Callable[[Some], Any], steps: int) -> None:
        """Steps of Adam of some matrices of a block, until a part of it gives the original's hidden states."""
        own = [block.get_submodule(leaf).weight.requires_grad_(True) for leaf in leaves]
        each = [{"params": [w], "lr": RATE * float(w.detach().square().mean().sqrt())} for w in own]
        adam = torch.optim.Adam(each, betas=BETAS)
        falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 1 - (1 - END) * t / max(1, steps - 1))
        picked: list[int] = []
        for _ in range(steps):
            if len(picked) < BATCH:
                picked = (self._held + self._made.permutation(len(self._x) - self._held)).tolist()
            now, picked = picked[:BATCH], picked[BATCH:]
            with _mixed():
                out = part(now)
            _error(out, self._y[now]).backward()
            adam.step()
            adam.zero_grad()
            falling.step()
        for w in own:
            w.requires_grad_(False)


def _fill(out: Any, part: Callable[[Some], Any]) -> None:
    """Run a part of a block over all sequences."""
    for at in range(0, len(out), BATCH):
        with torch.no_grad(), _mixed():
            out[at : at + BATCH] = part(slice(at, at + BATCH))


def _mixed() -> Any:
    """Products in bfloat16 where the processor multiplies it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast("cpu") == torch.bfloat16)


def _error(x: Any, y: Any) -> Any:
    """Squared error over squared norm, mean over tokens."""
    return ((x - y).square().sum(-1) / y.square().sum(-1)).mean()


class Sequential(Packer):
    """A pack that tunes what is not quantised yet between blocks, where it is asked to, before it recovers."""

    asked: argparse.Namespace
    run: str

    def _recovered(self, recipe: Recipe, tuning: Tuning) -> Recipe:
        if self.run.startswith("seq+"):
            self._sequential(recipe, tuning)
        return recipe if steps_of(self.run) == 0 else super()._recovered(recipe, tuning)

    def _sequential(self, recipe: Recipe, tuning: Tuning) -> None:
        groups, args, path = {g.tensor.name: g for g in self._groups}, self.asked, os.fspath(tuning.path)
        ids = tuning.found[0].ids
        assert ids is not None  # noqa: S101 - it was calibrated on a text
        own = np.array(ids()).reshape(-1, CONTEXT)[: args.sequences + args.held]
        unseen = learned()[len(learned()) // 2 :]  # recovery learns, and judges, by the front of the mix
        others = text_ids(path, unseen, args.mix * CONTEXT).ids.reshape(-1, CONTEXT)
        blocks = Blocks(path, np.concatenate([own, others]), args.held, args.between)

        def quantised(name: str, w: Any) -> Any:
            found = _encoded(groups[name], recipe, self._lossy.get(name), w.numpy())
            self._lossy.put(name, found)
            return torch.from_numpy(from_words(decoded(found), found.head["dtype"]).reshape(w.shape))

        every = len(blocks.model.model.layers)
        for i, error in enumerate(blocks.run(quantised), 1):
            self._hooks.note("sequential", i, every)
            print(f"block {i}: {error:.5f}", flush=True)


def _encoded(group: ties.Group, recipe: Recipe, before: Encoded, w: NDArray[np.float32]) -> Encoded:
    """Other numbers in the place of a matrix that was quantised `before`; the record names the original's digest."""
    t = group.tensor
    tensor = replace(t, data=to_words(w, t.dtype).reshape(-1).view(np.uint8), tie=None)
    aligned = recipe.aligned[t.name]
    if before.fidelity is not None:
        aligned = replace(aligned, lossless=before.fidelity.lossless)
    e = encode(replace(group, tensor=tensor), replace(recipe, aligned={t.name: aligned}), measured=False)
    if e.fidelity is None:
        raise ValueError(f"{t.name} is not smaller quantised")
    return replace(e, head=e.head | {"x-source": before.head["x-source"]})


def steps_of(run: str) -> int:
    """Steps of recovery of a run."""
    return int(run.removeprefix("seq+"))


def packed(args: argparse.Namespace, run: str) -> tuple[Path, Mapping[str, Any]]:
    """The file of a run, and what its pack came to."""
    out = args.work / f"{args.bits}-{run}.rac"
    about = out.with_suffix(".json")
    if not about.exists():
        clock = Clock()
        learns = Calibration((args.calibrate,), cache=str(args.cache or args.work / "cache"))
        request = Lossy(Budget(bits=args.bits), learns, embeddings=False, recover=max(1, steps_of(run)))
        source = open_source(args.model)
        with Sequential(source, out, PackOptions(jobs=1, force=True), Hooks(note=clock)) as packer:
            packer.asked, packer.run = args, run
            done = packer.write(ByTrellis(packer.allocate(args.model, request), packer.kept))
        clock("writing", 1, 1)
        about.write_text(json.dumps({"bits": done.quantised_bits, "seconds": clock.seconds}))
    return out, json.loads(about.read_text())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder of a causal language model")
    parser.add_argument("calibrate", help="a text")
    parser.add_argument("work", type=Path, help="folder for files and figures")
    parser.add_argument("texts", type=Path, nargs="+", help="what is measured on")
    parser.add_argument("--bits", type=float, default=2.06)
    parser.add_argument("--runs", nargs="+", default=["0", "seq+0", "120", "seq+60"])
    parser.add_argument("--between", type=int, nargs=3, default=[12, 8, 16], help="steps behind value, output and up")
    parser.add_argument("--sequences", type=int, default=32, help="of the calibration text")
    parser.add_argument("--mix", type=int, default=8, help="sequences of the built-in mix")
    parser.add_argument("--held", type=int, default=0, help="sequences of the text that errors are printed of")
    parser.add_argument("--cache", type=Path, help="folder of calibrations (default: in the work folder)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [(run, *packed(args, run)) for run in args.runs]
    found = [figures(args, text, [path for _, path, _ in rows]) for text in args.texts]
    heads = " | ".join(f"{t.stem}: KL, top-1, perplexity" for t in args.texts)
    print(f"\n| run | bits | core s | all | {heads} |")
    print("| --- | ---: | ---: | ---: |" + " ---: |" * len(args.texts))
    for run, path, about in rows:
        whole = sum(about["seconds"].values())
        own = whole - about["seconds"].get(TAUGHT, 0) - about["seconds"].get("calibrating", 0)
        each = (of[path.name] for of in found)
        cells = " | ".join(f"{kl:.4f}, {top1:.2%}, {perplexity:.3f}" for kl, top1, perplexity in each)
        print(f"| {run} | {about['bits']:.4f} | {own:.0f} | {whole:.0f} | {cells} |")
        print("  " + ", ".join(f"{what} {s:.0f}" for what, s in about["seconds"].items()))


if __name__ == "__main__":
    main()
