"""What disk a pack of a repository of the Hub takes at most.

A server in this process holds a model of many shards in memory and speaks the Hub's API (tests/support/hub.py). `rac
pack` runs beside it in an empty folder; every few milliseconds all files there, and those without a name that the
process has open, are added up. The bar: 1.2 shards beside the output. Tests must be on the path (PYTHONPATH=tests).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
from safetensors.numpy import save

from support import environment  # type: ignore[import-untyped]
from support.hub import Hub  # type: ignore[import-untyped]


def model(shards: int, megabytes: int) -> dict[str, bytes]:
    """Files of a model of BF16-like weights, `megabytes` a shard."""
    rng = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    for k in range(shards):
        name = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        rows = megabytes * 1_000_000 // (4 * 4 * 1024)
        tensors = {f"layers.{k}.{i}.weight": rng.standard_normal((rows, 1024), np.float32) for i in range(4)}
        files[name] = save(tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    return files | {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": b"{}"}


def used(folder: str, pid: int) -> int:
    """Bytes on the disk of all files below a folder, and of the files there without a name that a process has open."""
    sizes = {}
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                st = os.stat(os.path.join(base, name))
            except FileNotFoundError:
                continue
            sizes[st.st_ino] = 512 * st.st_blocks
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(folder):
                    st = os.stat(f"/proc/{pid}/fd/{fd}")
                    sizes[st.st_ino] = 512 * st.st_blocks
            except FileNotFoundError:
                continue
    except FileNotFoundError:  # it has ended
        pass
    return sum(sizes.values())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--shards", type=int, default=20)
    p.add_argument("--megabytes", type=int, default=100, help="of a shard")
    p.add_argument("--bits", help="lossy, which downloads the model to a temporary folder")
    args = p.parse_args()
    files = model(args.shards, args.megabytes)
    shard = max(map(len, files.values()))
    with Hub() as hub, tempfile.TemporaryDirectory() as folder:
        hub.add("org/model", files)
        env = environment(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_HOME=f"{folder}/home", TMPDIR=folder)
        words = ["pack", "org/model", "-o", f"{folder}/m.rac", *(["--bits", args.bits] if args.bits else [])]
        start, peak, samples = time.monotonic(), 0, 0
        with subprocess.Popen([sys.executable, "-m", "rac.cli", *words], env=env) as process:
            while process.poll() is None:
                peak, samples = max(peak, used(folder, process.pid)), samples + 1
                time.sleep(0.005)
        if process.returncode:
            raise SystemExit(process.returncode)
        size, total = os.path.getsize(f"{folder}/m.rac"), sum(map(len, files.values()))
        seconds = time.monotonic() - start
        print(f"{args.shards} shards of {shard / 1e6:.1f} MB, {seconds:.1f} s, {samples} samples")
        print(f"at most {peak / 1e6:.1f} MB on the disk, the output has {size / 1e6:.1f}")
        print(f"{(peak - size) / shard:.3f} shards beside it; {hub.sent / total:.3f} of the model's bytes were sent")


if __name__ == "__main__":
    main()
