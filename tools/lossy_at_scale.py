"""What a lossy pack of blocks of 8B shape costs, really packed: core seconds by stage, memory, bits.

    python tools/lossy_at_scale.py FOLDER --blocks 32                              # from the weights alone
    python tools/lossy_at_scale.py FOLDER --blocks 1 --tokens 4096 --json one.json      # calibrated on a text
    python tools/scaling.py --measured one.json --check four.json                  # what follows for large models

The model is made up in FOLDER: a llama of Llama 3 8B's shape but for its vocabulary of 256 bytes, its matrices after
PATTERN as tools/shaped.py makes them, norms of 1. It is packed as any folder, by `rac.pack` at 3 bits, and taken away
again. Core seconds are those of this process, all threads: other work on the machine changes them little. Those of a
stage are taken around the functions in STAGES, less what is called in them of another stage; "rest" is all else. What
a text costs is counted by itself: finding the chain of blocks, which runs the model over 1,024 tokens, then before, in
and behind the blocks. A model of one block is no chain and is run as a whole: each block forward once, not twice.

On the disk it takes the model (0.44 GB for each block), the archive, and of calibrated blocks 2 GB each.
"""

from __future__ import annotations

import os

for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"

import argparse  # noqa: E402
import functools  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

import rac  # noqa: E402
import shaped  # noqa: E402
from rac.calibrate.builtin import learned  # noqa: E402

PATTERN = Path("demo/smollm2-bf16/model-00001-of-00003.safetensors")
WIDTH, INNER, KEYS, VOCABULARY = 4096, 14336, 1024, 256
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Roles of tools/shaped.py to modules of transformers."""
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
STAGES = (
    ("rac.calibrate.chain", "Chain.__init__", "chain"),
    ("rac.calibrate.chain", "Chain.batch", "chain"),
    ("rac.calibrate.whole", "calibrate", "whole"),
    ("rac.calibrate.passes", "Passes._start", "ends"),
    ("rac.calibrate.passes", "Passes._forward", "forward"),
    ("rac.calibrate.passes", "Passes._end", "ends"),
    ("rac.calibrate.passes", "Passes._backward", "backward"),
    ("rac.calibrate.passes", "Passes._back", "ends"),
    ("rac.calibrate.place", "Place.added", "moments"),
    ("rac.linalg.triangular", "_factor", "triangular"),
    ("rac.encode.quantise.trellis", "_rates", "rates"),
    ("rac.native.product", "add", "feedback"),
    ("rac.native.trellis", "block", "search"),
    ("rac.encode.quantise.trellis", "Quantised.coded", "coding"),
    ("rac.encode.quantise.tensor", "measure", "measuring"),
    ("rac.encode.pack", "measure", "measuring"),
)
"""Module, function, and the stage that its time belongs to."""
WHOLE = ("rates", "measuring")
"""Stages whose time has that of others that they call in it."""


class Clock:
    """Core seconds by stage: of the sample of rows that a scale is looked for on, and of all else, apart."""

    def __init__(self) -> None:
        self.sample, self.all = defaultdict[str, float](float), defaultdict[str, float](float)
        self._now, self._lock, self._local = self.all, threading.Lock(), threading.local()

    def around(self, work: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The function, its time counted: less that of stages inside it, or with it where they are WHOLE."""

        @functools.wraps(work)
        def run(*args: Any, **how: Any) -> Any:
            stack: list[list[Any]] = self._local.__dict__.setdefault("stack", [])
            if stack and stack[-1][0] in WHOLE:
                return work(*args, **how)
            stack.append([stage, 0.0])
            start = time.thread_time()
            try:
                return work(*args, **how)
            finally:
                took = time.thread_time() - start
                inside = stack.pop()[1]
                if stack:
                    stack[-1][1] += took
                with self._lock:
                    self._now[stage] += took - inside

        return run

    def sampled(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose stages in any thread are those of the sample."""

        @functools.wraps(work)
        def run(*args: Any, **how: Any) -> Any:
            self._now = self.sample
            try:
                return work(*args, **how)
            finally:
                self._now = self.all

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take the times of all STAGES."""
        every = [(module, path, functools.partial(self.around, stage=stage)) for module, path, stage in STAGES]
        every.append(("rac.encode.allocate.budget", "Search._sampled", self.sampled))  # type: ignore[arg-type]
        undo = []
        for module, path, turned in every:
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(module))
            undo.append((owner, name, getattr(owner, name)))
            setattr(owner, name, turned(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, was in undo:
                setattr(owner, name, was)


def make(folder: Path, pattern: Path, blocks: int) -> None:
    """A model folder of so many blocks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    real, plain = shaped.Real(pattern), list[tuple[str, tuple[int, ...], Callable[[], NDArray[np.uint16]]]]()
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((VOCABULARY, WIDTH), np.float32).view(np.uint32) >> 16).astype("<u2")
    plain.append(("model.embed_tokens.weight", table.shape, lambda: table))
    norms = [
        f"model.layers.{i}.{name}" for i in range(blocks) for name in ("input_layernorm", "post_attention_layernorm")
    ]
    for name in (*norms, "model.norm"):
        plain.append((f"{name}.weight", (WIDTH,), lambda: np.full(WIDTH, 0x3F80, "<u2")))  # ones
    made = [
        (f"model.layers.{i}.{NAMES[role]}.weight", shaped.Made("", role, i, shape))
        for i in range(blocks)
        for role, shape in shaped.SHAPES.items()
    ]
    sizes = {name: shape for name, shape, _ in plain} | {name: m.shape for name, m in made}
    head, at = dict[str, Any](), 0
    for name, shape in sizes.items():
        end = at + 2 * int(np.prod(shape))
        head[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(head | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, of in plain:
            file.write(of().data)
        for _, m in made:
            for words in real.words(m):
                file.write(words.data)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": blocks}))
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    byte_level.pre_tokenizer, byte_level.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    PreTrainedTokenizerFast(tokenizer_object=byte_level).save_pretrained(folder)


def peak() -> int:
    """Bytes of this process' memory at most since this was called last; pages of mapped files count (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def pack(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the pack of a folder has taken."""
    out, text, clock, notes = folder.parent / "m.rac", folder.parent / "text", Clock(), dict[str, None]()
    text.write_text(learned()[: 8 * args.tokens])
    how: dict[str, Any] = {"calibrate": str(text), "tokens": args.tokens} if args.tokens else {"calibrate": "none"}

    memory, phase = dict[str, int](), "begun"

    def note(what: str, _: int, of: int) -> None:
        nonlocal phase
        notes[what] = None
        if of and what.partition(":")[0] != phase:
            memory[phase], phase = peak(), what.partition(":")[0]

    importlib.import_module("rac.calibrate.passes")  # torch and transformers are not of the pack
    peak()
    start, cpu = time.perf_counter(), time.process_time()
    with clock.watching():
        done = rac.pack(folder, out, bits=args.bits, jobs=args.jobs, note=note, **how)
    busy, took = time.process_time() - cpu, time.perf_counter() - start
    clock.all["rest"] = busy - sum(clock.all.values()) - sum(clock.sample.values())
    found = {"blocks": args.blocks, "tokens": args.tokens, "jobs": args.jobs, "seconds": took, "core": busy}
    memory[phase] = peak()
    found |= {
        "memory": max(memory.values()),
        "memories": memory,
        "weights": sum(int(np.prod(f.shape)) for f in done.fidelity),
    }
    found |= {"bits": done.quantised_bits, "all": dict(clock.all), "sample": dict(clock.sample), "notes": [*notes]}
    return found


def table(found: dict[str, Any]) -> None:
    """Print it."""
    millions = found["weights"] / 1e6
    print("\n".join(what for what in found["notes"] if "pass" in what or "scale" in what))
    print("\n| stage | core seconds | for a million weights | of these on the sample |\n| --- | ---: | ---: | ---: |")
    for stage in sorted({*found["all"], *found["sample"]}, key=lambda s: -found["all"].get(s, 0)):
        some = found["sample"].get(stage, 0.0)
        both = found["all"].get(stage, 0.0) + some
        print(f"| {stage} | {both:.1f} | {both / millions:.4f} | {some:.1f} |")
    print(f"| all | {found['core']:.1f} | {found['core'] / millions:.4f} | {sum(found['sample'].values()):.1f} |\n")
    for phase, most in found["memories"].items():
        print(f"{phase}: {most / 1e9:.2f} GB of memory at most, until the next")
    print(
        f"{found['blocks']} blocks, {found['weights']:,} weights, {found['tokens']} tokens, {found['jobs']} jobs: "
        f"{found['bits']:.4f} bits, {found['seconds']:.0f} s, {found['memory'] / 1e9:.2f} GB of memory at most"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="new or empty")
    p.add_argument("--pattern", type=Path, default=PATTERN, help=f"BF16 file to take after (default: {PATTERN})")
    p.add_argument("--blocks", type=int, default=1, help="default: 1; Llama 3 8B has 32")
    p.add_argument("--tokens", type=int, default=0, help="of text to calibrate on; default: 0, from the weights alone")
    p.add_argument("--bits", type=float, default=3.0, help="default: 3")
    p.add_argument("--jobs", type=int, default=2, help="threads; default: 2")
    p.add_argument("--json", type=Path, help="write what was found to this file")
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if any(args.folder.iterdir()):
        raise SystemExit(f"{args.folder} is not empty")
    tempfile.tempdir = str(args.folder)  # second moments and factors lie where there is room
    try:
        make(args.folder / "model", args.pattern, args.blocks)
        found = pack(args.folder / "model", args)
    finally:
        shutil.rmtree(args.folder)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    table(found)


if __name__ == "__main__":
    main()
