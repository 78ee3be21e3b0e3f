"""GPU decoding, measured: GB/s of dense weights against a plain copy and against decoding on the CPU, in one run.

    python tools/bench_gpu.py model.rac [--ring-mb 256] [--repeat 5]

Prints the device and the date, a table, and where the time of the kernels goes. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable

import torch

from rac import native
from rac.decode import archive as ar
from rac.decode import random as ld
from rac.gpu import decoder as cuda
from rac.registry import RECORD_TENSOR


def best(work: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest of some runs, the device idle before and after."""
    out = []
    for _ in range(repeat + 1):  # the first one compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        out.append(time.perf_counter() - start)
    return min(out[1:])


def main() -> int:
    """Measure."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("file")
    args.add_argument("--device", default="cuda")
    args.add_argument("--ring-mb", type=int, default=cuda.RING >> 20)
    args.add_argument("--repeat", type=int, default=5)
    options = args.parse_args()
    if reason := cuda.why_not(options.device):
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 1
    device = torch.device(options.device)
    with ar.RacFile(options.file) as f:
        entries = [(a, e) for a in f.archives for e in a.index.entries if e.type == RECORD_TENSOR and 0 not in e.shape]
        tensors = [(ld.parse(a, a.record(e)), a) for a, e in entries]
        units = [ld.read_units(a, t, [(0, len(t.units))])[0] for t, a in tensors]
        objects = [[torch.from_numpy(o).to(device) for o in ld.objects(a, t)] for t, a in tensors]
        size = sum(t.nbytes for t, _ in tensors)
        stored = sum(u.nbytes for of in units for u in of)

        def decode() -> None:
            decoder = cuda.DeviceDecoder(device, options.ring_mb << 20)
            for (t, _), of, uses in zip(tensors, units, objects, strict=True):
                decoder.add(t, [u.data for u in of[: t.first]], of[t.first :], uses, checked=True)
            decoder.flush()

        one = torch.empty(min(size, 4 << 30) // 2, dtype=torch.uint8, device=device)
        host = torch.empty(min(stored, 1 << 30), dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=device)
        rows = [
            ("copy on the device", 2 * one.numel(), best(lambda: one.clone(), options.repeat)),
            ("copy from pinned memory", host.numel(), best(lambda: there.copy_(host), options.repeat)),
            (
                f"CPU, {native.kernel()}, one thread",
                size,
                best(lambda: [list(ld.load(a, [e], 1)) for a, e in entries], 1),
            ),
            (f"GPU, ring of {options.ring_mb} MB, host work and copy included", size, best(decode, options.repeat)),
        ]
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {datetime.date.today()}")
        print(f"{options.file}: {len(tensors)} tensors, {size / 1e9:.2f} GB dense, {stored / 1e9:.2f} GB stored\n")
        print("| what | GB/s |\n| --- | ---: |")
        for name, n, seconds in rows:
            print(f"| {name} | {n / seconds / 1e9:.1f} |")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            decode()
        print("\n| kernel | ms | launches | GB/s of the whole dense size |\n| --- | ---: | ---: | ---: |")
        for row in sorted(p.key_averages(), key=lambda r: -r.device_time_total)[:12]:
            ms = row.device_time_total / 1000
            print(f"| {row.key[:40]} | {ms:.2f} | {row.count} | {size / max(ms, 1e-6) / 1e6:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
