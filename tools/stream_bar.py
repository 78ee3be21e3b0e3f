"""Time from a throttled pipe to a complete model of torch tensors: .rac files against safetensors, and peak memory.

    python tools/stream_bar.py MODEL.safetensors FILE.rac ... [--rate 200MB] [--ring 256MB] [--repeat 3]

Every file goes through the same pipe at the same rate, in rounds, each in a process of its own; the time begins with
the first byte. A safetensors file is read as the library can: all bytes, then `safetensors.torch.load`. Beside each
ratio stand that to what the pipe alone needs for the safetensors bytes, and that of the file sizes, which no decoder
can be below.

`linear` counts the quantised tensors of a lossy file alone: the same records as a file by themselves, against a
safetensors file of the same tensors, which are made in a temporary folder.

Memory: a process streams the file and drops each tensor as it comes; the peak of its resident set above what it had
with everything imported, against ring + the largest tensor's tiles + 100 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "codec"))

MB = 1_000_000
_CHILD = """
import gc, json, sys, time
kind, ring, keep = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "keep"
import torch, rac, rac.decode.stream, safetensors.torch
from rac import native
native.kernel()
torch.zeros(1)
gc.collect()  # what the imports left behind: else a collection of 70 ms falls into the time, or beside it
status = lambda key: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, pipe = status("VmRSS"), sys.stdin.buffer
print("ready", flush=True)
first = pipe.peek(1)
start, model, largest = time.monotonic(), {}, 0
if kind == "rac":
    for name, t in rac.stream(pipe, framework="pt", ring=ring):
        largest = max(largest, t.nbytes)
        if keep:
            model[name] = t
        del t
else:
    model = safetensors.torch.load(pipe.read())
print(json.dumps({"seconds": time.monotonic() - start, "tensors": len(model), "largest": largest,
                  "bytes": sum(t.nbytes for t in model.values()), "peak": status("VmHWM") - before}))
"""


def throttled(file: Any, out: Any, rate: float) -> None:
    """Write a file at `rate` bytes a second, a hundredth of a second's worth at a time."""
    step, start, sent = max(1, int(rate / 100)), time.monotonic(), 0
    while data := file.read(step):
        out.write(data)
        sent += len(data)
        time.sleep(max(0.0, start + sent / rate - time.monotonic()))
    out.close()


def run(path: Path, rate: float, ring: int, keep: bool = True) -> dict[str, Any]:
    """One process at the end of the pipe."""
    kind = "rac" if path.suffix == ".rac" else "safetensors"
    args = [sys.executable, "-c", _CHILD, kind, str(ring), "keep" if keep else "drop"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "codec")}
    with open(path, "rb") as file, subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as p:
        if p.stdin is None or p.stdout is None:
            raise SystemExit("no pipes")
        p.stdout.readline()
        thread = threading.Thread(target=throttled, args=(file, p.stdin, rate))
        thread.start()
        thread.join()
        out: dict[str, Any] = json.loads(p.stdout.read())
    return out


def linear_only(path: Path, folder: Path) -> tuple[Path, Path] | None:
    """(safetensors, .rac) of the quantised tensors alone; None where there are none."""
    import safetensors.torch

    import rac
    from rac.container import shards
    from rac.container.reader import Archive
    from rac.decode.archive import open_access
    from rac.registry import RECORD_OBJECT
    from rac.stages.table import is_quantised

    archive = Archive(open_access(str(path)))
    chosen = [e for e in archive.index.entries if e.type == RECORD_OBJECT or is_quantised(e.method)]
    names = {n for e in chosen if e.type != RECORD_OBJECT for n in (e.name, *(a for a, _ in e.aliases))}
    if not names:
        archive.close()
        return None
    small, dense = folder / "linear.rac", folder / "linear.safetensors"
    shards.write_all([shards.File(str(small), dict(archive.header), [(archive, e) for e in chosen])])
    archive.close()
    with rac.open(small, framework="pt") as f:
        safetensors.torch.save_file({n: t.contiguous() for n, t in f.load().items()}, dense)
    return dense, small


def main() -> None:
    from rac.cli.terminal import size
    from rac.machine import parse_size

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("safetensors", type=Path)
    p.add_argument("files", nargs="+", type=Path)
    p.add_argument("--rate", default="200MB", help="bytes a second (default: 200MB)")
    p.add_argument("--ring", default="256MB", help="of rac.stream (default: 256MB)")
    p.add_argument("--repeat", type=int, default=3)
    args = p.parse_args()
    rate, ring = parse_size(args.rate), parse_size(args.ring)
    with tempfile.TemporaryDirectory() as folder:
        sets = [(args.safetensors, f, f.name) for f in args.files]
        for i, f in enumerate(args.files):
            (Path(folder) / str(i)).mkdir()
            if pair := linear_only(f, Path(folder) / str(i)):
                sets.append((*pair, f"{f.name}, linear"))
        print(f"pipe at {size(rate)}/s, ring {size(ring)}; best of {args.repeat} rounds")
        for dense, packed, name in sets:
            theirs, ours = [], []
            for _ in range(args.repeat):
                theirs.append(run(dense, rate, ring)["seconds"])
                ours.append(run(packed, rate, ring)["seconds"])
            a, b = packed.stat().st_size, dense.stat().st_size
            print(
                f"{name:<28} {min(ours):6.3f} s  safetensors {min(theirs):6.3f} s  time x {min(ours) / min(theirs):.3f}"
                f"  (of the pipe's own time for the safetensors bytes: {min(ours) * rate / b:.3f})  size x {a / b:.3f}",
                flush=True,
            )
        for f in args.files:
            done = run(f, 1e12, ring, keep=False)
            bar = ring + done["largest"] + 100 * MB
            print(
                f"{f.name:<28} peak memory {size(done['peak'])}, bar {size(bar)} (ring + largest tensor "
                f"{size(done['largest'])} + 100 MB): {'met' if done['peak'] <= bar else 'MISSED'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
