"""The bars of running a mixture of experts that does not fit into memory: tokens per second, bytes read, memory.

    python tools/disk_bar.py FOLDER                       the model of 3 GB in BF16, packed at 3 bits and measured
    python tools/disk_bar.py FOLDER --scale 0.04          a small one, with a memory in proportion
    python tools/disk_bar.py FOLDER --row compressed      one row alone, kept in FOLDER; --report prints what is there

Rows: `compressed` (all records in memory), `disk` (within --memory), `cold` (the same, and the system forgets what it
has cached of the file behind each token: without that, a read from disk is one from memory), `small` (as little memory
as the model needs, cold), `http` (as `disk`, from a server in another process of this machine), `late` (the same,
each answer 5 ms late), `blind` (as `late`, nothing read ahead), `expert` (bytes and requests of one expert, by itself
and in a tensor of all experts; of a file and over HTTP).
In place of tokens the model reads vectors drawn at random, one after the other, larger than what its random layers add:
so the router chooses others each time, all experts alike, which is the worst case. They are timed behind the first
ones, when what fits is in memory; the logits of all rows must be equal. Memory is that of the process, its peak against
what it had when everything was imported.

FOLDER gets what is made: `moe-SCALE/`, a folder of transformers (64 experts in each of 8 layers, 16 of them used for a
token, random weights, a layer in each shard), and `moe-SCALE.rac` (3 bits, from the weights alone). What is there
already is used again; packing the large one takes many minutes. Every model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of torch that wait leave the processors to the decoder
EXPERTS, LAYERS, ACTIVE = 64, 8, 16
WIDTH, INNER, VOCABULARY = 1024, 960, 4096
"""Of scale 1."""
MEMORY = 500_000_000
BEFORE, TOKENS = 9, 6
"""Tokens that the model reads before time is taken, and while it is."""
ROWS = ("compressed", "disk", "cold", "small", "http", "late", "blind", "expert")
LATE = 0.005
"""Seconds that each answer of the server waits."""


def config_of(scale: float) -> Any:
    """The configuration of a Qwen3-MoE with `scale` times the weights."""
    import transformers

    width = max(64, round(WIDTH * scale**0.5 / 64) * 64)
    inner = max(64, round(INNER * scale**0.5 / 32) * 32)
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": inner,
        "moe_intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 256),
        "head_dim": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": ACTIVE,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "architectures": ["Qwen3MoeForCausalLM"],
        "dtype": "bfloat16",
    }
    return transformers.AutoConfig.for_model("qwen3_moe", **given)


def names_of(config: Any) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of the tensors of each shard, as files of the Hub have them: each expert by itself."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    experts = config.num_experts
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, p in model.named_parameters():
        shard = name.split(".")[2] if ".layers." in name else "ends"
        mine, shape = shards.setdefault(shard, []), tuple(p.shape)
        if name.endswith("experts.gate_up_proj"):
            parts = [("gate_proj", (shape[1] // 2, shape[2])), ("up_proj", (shape[1] // 2, shape[2]))]
        elif name.endswith("experts.down_proj"):
            parts = [("down_proj", shape[1:])]
        else:
            mine.append((name, shape))
            continue
        stem = name.rpartition(".")[0]
        mine += [(f"{stem}.{e}.{part}.weight", s) for e in range(experts) for part, s in parts]
    return list(shards.values())


def make(folder: Path, scale: float) -> None:
    """Write the model, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    config = config_of(scale)
    folder.mkdir(parents=True)
    shards, total = names_of(config), 0
    where: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        torch.manual_seed(i)
        file, tensors = f"model-{i:05d}-of-{len(shards):05d}.safetensors", {}
        for name, shape in names:
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            rows = torch.exp(0.3 * torch.randn(shape[0], 1))  # rows of real layers differ about so much
            wide = 1.0 if "gate.weight" in name else 0.6  # a router that chooses sharply
            tensors[name] = (torch.randn(shape) * rows * (wide * shape[1] ** -0.5)).to(torch.bfloat16)
        total += sum(t.nbytes for t in tensors.values())
        where |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config.save_pretrained(folder)
    print(f"{folder}: {total:,} bytes", flush=True)


def prepare(root: Path, scale: float) -> Path:
    """The packed model; made where it is not there yet."""
    import rac

    folder, packed = root / f"moe-{scale:g}", root / f"moe-{scale:g}.rac"
    if not (folder / "config.json").exists():
        make(folder, scale)
    if not packed.exists():
        rac.pack(folder, packed, bits=3, calibrate="none", effort="fast", resume=True)
    print(f"{packed}: {packed.stat().st_size:,} bytes", flush=True)
    return packed


def high() -> int:
    """Bytes of memory that this process has had at most since `forget`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def forget(path: Path) -> None:
    """Have the system drop what it has cached of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def store_of(model: Any) -> Any:
    """What reads the records of a model; None where they are in memory."""
    from rac.runtime.held import Holding

    return next(m.workspace.store for m in model.modules() if isinstance(m, Holding))


def load(path: Path, resident: str, memory: int) -> Any:
    """The model; with a memory of 0 in as little as it needs."""
    import rac
    from rac.runtime.memory import fit, needed

    if resident == "compressed":
        return rac.load_model(path, resident="compressed")
    model = rac.load_model(path, resident="disk", memory=memory or None)
    if not memory:
        fit(model, store_of(model), needed(model, store_of(model)).total)
    return model


def serve(path: Path, delay: float) -> None:
    """Serve a file until standard input ends; its URL goes to standard output."""
    from support.servers import Server

    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open(path, "rb"))
        data = opened.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        print(opened.enter_context(Server({path.name: data}, delay=delay)).url(path.name), flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def place(path: Path, row: str) -> Iterator[Any]:
    """Where a row finds the model: its path, or the URL at a server in a process of its own."""
    if row not in ("http", "late", "blind"):
        yield path
        return
    command = [sys.executable, __file__, str(path), "--serve", str(0.0 if row == "http" else LATE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None  # noqa: S101
        assert server.stdout is not None  # noqa: S101
        try:
            yield server.stdout.readline().strip()
        finally:
            server.stdin.close()


def run(path: Any, row: str, memory: int) -> dict[str, Any]:
    """Let the model read tokens, one after the other, in this process."""
    import torch

    import rac.runtime  # noqa: F401 - what is imported does not count as memory of the model
    from runtime_bar import digest_of, rss

    if row in ("cold", "small"):
        forget(path)
    before = rss()
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    model = load(path, "compressed" if row == "compressed" else "disk", 0 if row == "small" else memory)
    out: dict[str, Any] = {"load": time.perf_counter() - start}
    store, past, seconds, digests = store_of(model), None, [], []
    if row == "blind":
        store.limit(dataclasses.replace(store.budget, ahead=0))
    torch.manual_seed(0)
    vectors = (2 * torch.randn(BEFORE + TOKENS, 1, 1, model.config.hidden_size)).to(model.dtype)
    used = 0.0
    for i, vector in enumerate(vectors):
        if i == BEFORE and store is not None:
            store.reader.counts.__init__()
        start, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            found = model(inputs_embeds=vector, cache=past, use_cache=True)
        seconds.append(time.perf_counter() - start)
        used += (time.process_time() - cpu) * (i >= BEFORE)
        past = found.cache
        digests.append(digest_of(found.logits))
        if row in ("cold", "small"):
            forget(path)
    out |= {"seconds": sum(seconds[BEFORE:]), "cpu": used, "digests": digests, "peak": high() - before}
    if store is not None:
        c = store.reader.counts
        out |= {"requests": c.requests, "read": c.read, "hits": c.hits, "ahead": c.ahead, "misses": c.misses}
        out |= {"most": c.most, "budget": store.budget.total, "kept": store.budget.kept, "said": str(store.budget)}
        out |= {"waited": c.waited, "late": c.late, "guessed": c.guessed}
    return out


def expert(path: Any) -> dict[str, Any]:
    """Requests and bytes of one expert: its three matrices, and its part of a tensor of all experts."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    import rac
    from rac.runtime import disk
    from rac.runtime.held import Head, Held
    from rac.runtime.ranges import TICKET

    model = rac.load_model(path, resident="disk")
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, Held))
    reader = store_of(model).reader
    with rac.open(path) as f:
        own = sum(e.size for e in f.archives[0].index.entries if e.name.startswith(f"{name}.3."))
    before = reader.counts.requests, reader.counts.read
    module._expect(np.array([3]))
    _ = module.gate_up_proj[3], module.down_proj[3]
    out = {"own": own, "requests": reader.counts.requests - before[0], "read": reader.counts.read - before[1]}
    if isinstance(path, str):
        return out
    with place(path, "http") as url:
        out |= {f"http_{key}": value for key, value in expert(url).items()}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        w = (torch.randn(6, 720, 960) * 0.02).to(torch.bfloat16)  # 720: tiles of their own choice would end elsewhere
        save_file({"w": w}, f"{folder}/x.safetensors")
        rac.pack(f"{folder}/x.safetensors", f"{folder}/x.rac", bits=3, effort="fast")
        with rac.open(f"{folder}/x.rac") as f:
            store, entry = disk.Store(f), f.archives[0].index.entries[0]
            ticket = store.reader.ticket(f.archives[0], entry).tobytes()
            filed = store.of(ticket, Head(TICKET, "BF16", tuple(w.shape)))
            filed.rows(np.array([1]), None)  # and the front, once
            before = store.reader.counts.requests, store.reader.counts.read
            filed.rows(np.array([4]), None)
            after = store.reader.counts
            out |= {"stacked_own": entry.size // 6, "stacked_requests": after.requests - before[0]}
            out |= {"stacked_read": after.read - before[1]}
    return out


def report(found: dict[str, Any], memory: int) -> bool:
    """Print the rows that are there; True where one misses its bar."""
    missed = False
    for row in (r for r in ROWS[:-1] if r in found):
        f = found[row]
        rate = TOKENS / f["seconds"]
        line = f"{row:<11}{rate:6.2f} tokens/s, {f['cpu'] / TOKENS:.2f} s of processors a token, "
        line += f"loaded in {f['load']:.1f} s, process grew by {f['peak'] / 1e6:,.0f} MB"
        if "read" in f:
            every = max(1, f["hits"] + f["ahead"] + f["misses"])
            line += f" (memory {f['budget'] / 1e6:,.0f} MB); a token: {f['requests'] / TOKENS:.0f} requests, "
            line += (
                f"{f['read'] / TOKENS / 1e6:.1f} MB; {f['hits'] / every:.0%} in memory, {f['ahead'] / every:.0%} ahead"
            )
            line += f" ({f['late']} of {f['ahead']} late), waited {f['waited'] / TOKENS * 1e3:.0f} ms"
        if "compressed" in found and row != "compressed":
            ratio = rate * found["compressed"]["seconds"] / TOKENS
            same = f["digests"] == found["compressed"]["digests"]
            line += f"; {ratio:.2f} of compressed, {'same bits' if same else 'OTHER BITS'}"
            bad = (ratio < 0.3 and row in ("disk", "cold")) or not same
            line += " MISSED" if bad else ""
            missed |= bad
        print(line)
    if e := found.get("expert"):
        whats = {"": "one expert, three matrices", "http_": "the same over HTTP", "stacked_": "one of a stacked tensor"}
        for key, what in whats.items():
            own, read, requests = e[f"{key}own"], e[f"{key}read"], e[f"{key}requests"]
            bad = requests != 1 or read > 1.1 * own + 65536
            print(f"{what}: {requests} request, {read:,} bytes, its own {own:,} ({read / own:.3f}){' MISSED' * bad}")
            missed |= bad
    return missed


def main() -> int:
    """Print the rows; 1 where one misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is made")
    parser.add_argument(
        "--serve", type=float, metavar="SECONDS", help="serve FOLDER, a file, so much late (of the rows)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="weights, as a part of 1.5 thousand million")
    parser.add_argument("--memory", type=int, help="bytes (default: 500 million times the scale)")
    parser.add_argument("--make", action="store_true", help="make the model and pack it, and no more")
    parser.add_argument("--row", choices=ROWS, help="measure this row, in this process")
    parser.add_argument("--report", action="store_true", help="print what was measured")
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.folder, args.serve)
        return 0
    memory = args.memory or int(MEMORY * args.scale)
    packed, rows = args.folder / f"moe-{args.scale:g}.rac", args.folder / f"moe-{args.scale:g}.json"
    if not args.report:
        packed = prepare(args.folder, args.scale) if not packed.exists() or args.make else packed
    if args.make:
        return 0
    if args.row:
        found = json.loads(rows.read_text()) if rows.exists() else {}
        with place(packed, args.row) as where:
            found[args.row] = expert(packed) if args.row == "expert" else run(where, args.row, memory)
        rows.write_text(json.dumps(found))
        return 0
    if not args.report:
        for row in ROWS:
            command = [sys.executable, __file__, str(args.folder), "--scale", str(args.scale), "--row", row]
            subprocess.run([*command, "--memory", str(memory)], check=True)
    return int(report(json.loads(rows.read_text()), memory))


if __name__ == "__main__":
    sys.exit(main())
