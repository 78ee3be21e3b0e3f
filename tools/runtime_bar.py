"""The bars of running a model from a .rac file: equal logits, equal tokens, memory, speed.

    rac pack SMOLLM2 -o lossless.rac
    rac pack SMOLLM2 -o 3bit.rac --bits 3.05 --calibrate text.txt --no-embeddings
    python tools/runtime_bar.py SMOLLM2 --lossless lossless.rac --lossy 3bit.rac

Each row is measured once; every model runs in a process of its own, so that its memory is its own. Exit code 1 where a
row that must hold does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of torch that wait leave the processors to the decoder
PROMPT = "The history of the printing press begins"
TEXT = PROMPT + " in the fifteenth century, when a goldsmith in Mainz cast letters of metal. " * 8


def rss() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(path: str, resident: str) -> Any:
    """A model: of a folder by transformers, of an archive by RAC."""
    import rac

    if os.path.isdir(path):
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(path)
    return rac.load_model(path, resident=resident)


def child(job: str, path: str, resident: str, tokens: int, folder: str) -> dict[str, Any]:
    """Do one job in this process."""
    import torch
    import transformers

    import rac.runtime  # noqa: F401 - what is imported does not count as memory of the model

    before = rss()
    start = time.perf_counter()
    model = load(path, resident)
    out: dict[str, Any] = {"load": time.perf_counter() - start, "rss": rss() - before}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if job == "logits":
        ids = tokenizer(TEXT, return_tensors="pt")
        with torch.no_grad():
            logits = torch.stack([model(**ids).logits for _ in range(2)])
        out["equal"] = bool(torch.equal(logits[0], logits[1]))
        out["digest"] = digest_of(logits[0])
    if job == "memory":
        out |= memory(model)
    if job == "generate":
        ids = tokenizer(PROMPT, return_tensors="pt")
        how = {"do_sample": False, "temperature": None, "top_p": None, "eos_token_id": -1}
        model.generate(**ids, max_new_tokens=4, **how)  # layers learn their order
        start, used = time.perf_counter(), time.process_time()
        found = model.generate(**ids, max_new_tokens=tokens, **how)
        out |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used, "ids": found[0].tolist()}
        out["rss"] = rss() - before
    if job == "decode":
        out |= decode(model)
    return out


def digest_of(tensor: Any) -> str:
    """Of the bits of a tensor."""
    import torch

    from rac.container.zstd import digest

    return digest(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hex()


def memory(model: Any) -> dict[str, Any]:
    """Bytes of the buffers of the linear layers (the output layer is the embedding), and of their workspace."""
    import torch

    from rac.runtime.layers import Compressed, RacLinear

    layers = [m for n, m in model.named_modules() if isinstance(m, RacLinear) and n != "lm_head"]
    with torch.no_grad():
        model(torch.arange(8)[None])
        model(torch.arange(8)[None])
    return {
        "linear": sum(sum(b.nbytes for b in m.buffers()) for m in layers),
        "kept": sum(kept(m) for m in layers),
        "dense": sum(m.dense_bytes for m in layers),
        "workspace": layers[0].workspace.nbytes,
        "largest": max(m.dense_bytes for m in model.modules() if isinstance(m, Compressed)),
        "after": rss(),
    }


def kept(layer: Any) -> int:
    """Bytes that a layer keeps of what it has parsed."""
    return parsed_bytes(layer._stored)


def parsed_bytes(s: Any) -> int:
    """Bytes that are kept of a parsed record, or of several: heads, frequencies, classes, scales, outliers."""
    from rac.runtime.made import Made

    if isinstance(s, Made):
        return s.kept + sum(map(parsed_bytes, s.stored))
    opened = [s.parsed.coder, s.parsed.numbers] if s and s.parsed else []
    arrays = [a for one in opened for a in getattr(one, "__dict__", {}).values() if hasattr(a, "nbytes")]
    memory = {}
    for a in arrays:
        owner = a
        while getattr(owner, "base", None) is not None:
            owner = owner.base
        memory[id(owner)] = owner.nbytes if hasattr(owner, "nbytes") else len(owner)
    return sum(memory.values()) + sum(len(h) for h in (s.heads.values() if s else ()))


def decode(model: Any) -> dict[str, Any]:
    """Seconds, the best of six, in which one thread decodes all linear layers one after the other into one buffer."""
    import numpy as np

    from rac.runtime.layers import RacLinear

    layers = [m for m in model.modules() if isinstance(m, RacLinear)]
    buffer = np.empty(max(m.dense_bytes for m in layers), np.uint8)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        for m in layers:
            s, data = m.stored()
            s.decode(data, buffer[: s.tensor.nbytes].view(f"<u{s.tensor.word}").reshape(s.shape))
        times.append(time.perf_counter() - start)
    return {"decoded": sum(m.dense_bytes for m in layers), "seconds": min(times)}


def run(job: str, path: str, resident: str, tokens: int, folder: str) -> dict[str, Any]:
    """`child` in a process of its own."""
    args = [sys.executable, __file__, folder, "--child", json.dumps([job, path, resident, tokens])]
    done = subprocess.run(args, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def file_bytes(path: str) -> int:
    """Bytes of the records of the linear layers, and of the objects that they use."""
    import rac

    with rac.open(path) as f:
        return sum(e.size for a in f.archives for e in a.index.entries if e.type == 3 or "_proj.weight" in e.name)


def main() -> int:
    """Measure all rows."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="the Hugging Face folder")
    p.add_argument("--lossless", help="the archive of all its bits")
    p.add_argument("--lossy", help="the archive at 3 bits")
    p.add_argument("--tokens", type=int, default=200)
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        job, path, resident, tokens = json.loads(args.child)
        print(json.dumps(child(job, path, resident, tokens, args.model)))
        return 0
    if not args.lossless or not args.lossy:
        p.error("--lossless and --lossy are needed")
    good = True

    def row(what: str, holds: bool | None, figure: str) -> None:
        nonlocal good
        good &= holds is not False
        print(f"{what:<66} {'' if holds is None else 'met' if holds else 'MISSED':<7}{figure}", flush=True)

    def of(job: str, path: str, resident: str = "dense") -> dict[str, Any]:
        return run(job, path, resident, args.tokens, args.model)

    own = of("logits", args.model)
    for resident in ("dense", "compressed"):
        mine = of("logits", args.lossless, resident)
        same = mine["digest"] == own["digest"] and mine["equal"]
        row(f"lossless, {resident}: logits have the bits of the original", same, mine["digest"])
    made, counts = {}, {args.lossy: args.tokens, args.lossless: min(args.tokens, 40)}
    for path, count in counts.items():
        for resident in ("dense", "compressed"):
            made[path, resident] = run("generate", path, resident, count, args.model)
    ids = made[args.lossy, "dense"]["ids"]
    row(
        f"3 bits: {args.tokens} tokens, dense and compressed",
        ids == made[args.lossy, "compressed"]["ids"],
        f"{len(ids)} ids",
    )
    m, size = of("memory", args.lossy, "compressed"), file_bytes(args.lossy)
    held = m["linear"] + m["kept"]
    row(
        "3 bits: buffers of linear layers to their bytes in the file",
        held <= 1.15 * size,
        f"{m['linear']:,} and {m['kept']:,} of what was parsed, to {size:,} bytes: {held / size:.4f} "
        f"(dense {m['dense']:,})",
    )
    row("workspace", None, f"{m['workspace']:,} bytes; the largest layer has {m['largest']:,}")
    for path, name in ((args.lossy, "3 bits"), (args.lossless, "lossless")):
        d = of("decode", path, "compressed")
        row(f"{name}: decoding all layers, one thread", None, f"{d['decoded'] / d['seconds'] / 1e6:.0f} MB/s dense")
        rates = {}
        for resident in ("dense", "compressed"):
            g = made[path, resident]
            rates[resident] = counts[path] / g["seconds"]
            row(
                f"{name}, {resident}: greedy generation",
                None,
                f"{rates[resident]:.2f} tokens/s, {1e3 * g['cpu'] / counts[path]:.0f} ms of processors per token, "
                f"loaded in {g['load']:.2f} s, RSS +{g['rss'] / 1e6:.0f} MB",
            )
        row(f"{name}: compressed to dense, tokens/s (aim 0.5)", None, f"{rates['compressed'] / rates['dense']:.3f}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
