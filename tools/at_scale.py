"""Lossless packing of models of the real size: made, packed, verified, unpacked, loaded and taken away again.

    python tools/at_scale.py FOLDER --size 16000                          # as an 8-billion-weight model in BF16
    python tools/at_scale.py FOLDER --base demo/8b-shaped.safetensors --shards 8    # the same, made in a minute
    python tools/at_scale.py FOLDER --size 500 --shards 1000 --tiny 3000
    python tools/at_scale.py FOLDER --size 0 --tiny 100000
    python tools/at_scale.py FOLDER --size 0 --one 8000

What is packed is made by tools/shaped.py after PATTERN. Each step is a process of its own, of which are printed:
seconds and seconds of the processor (all threads), dense MB for each of them, and the most memory that it held at once
(VmHWM: pages of mapped files count). Steps:

    plain          the bytes of the folder alone, cold, by two threads, 4 MB at a time: what the disk gives a pack
    pack           the folder, cold: the bar by the clock is that it takes no longer than the kernels do, or the disk to
                   give the source and to take the archive
    nowhere        the same, into a file that keeps nothing: reading and coding alone
    verify         the archive against the folder, which is taken away then
    write          as many bytes as the archive has, brought to the disk: what the disk takes
    unpack         to a folder, whose files are compared with those that were made by their SHA-256
    load           every tensor to a numpy array, one after the other; warm, and cold: the file is dropped from the page
                   cache before
    safetensors    the same of the unpacked files, by safetensors.numpy.load_file, one file after the other
    read           the bytes of the archive alone, cold: what the disk gives
    memory         a sample of the same tensors, packed to memory and loaded from there: what the kernels allow where
                   there is no disk and no large model; best of three

FOLDER must be new or empty; on the disk it takes up to 1.7 times the size of the model.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SAMPLE = 256 << 20  # bytes of the tensors that are packed in memory, about
PIECE = 4 << 20  # bytes that are read at once where nothing else is done
PATTERN = Path("demo/smollm2-bf16/model-00001-of-00003.safetensors")


def sources(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def drop(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make(folder: Path, args: argparse.Namespace) -> None:
    import shaped

    if args.base:
        turned(folder / "source", args.base, args.shards)
        return
    tensors = shaped.plan(args.size * 10**6) + shaped.more(args.one * 10**6, args.tiny)
    real = shaped.Real(args.pattern)
    digests = shaped.folder(real, folder / "source", tensors, args.shards)
    (folder / "made.json").write_text(json.dumps(digests))


def turned(folder: Path, base: Path, shards: int) -> None:
    """A folder of a file that is there and of others with its rows in other places."""
    import shaped

    folder.mkdir(parents=True)
    where = dict[str, str]()
    for i in range(shards):
        where |= shaped.turned(base, folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors", i)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    digests = {}
    for path in sources(folder):
        with path.open("rb") as f:
            digests[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    (folder.parent / "made.json").write_text(json.dumps(digests))


def pack(folder: Path, _: argparse.Namespace) -> None:
    import rac

    rac.pack(folder / "source", folder / "m.rac", jobs=2, force=True)


def verify(folder: Path, _: argparse.Namespace) -> None:
    import rac

    rac.verify(folder / "m.rac", folder / "source")


def unpack(folder: Path, _: argparse.Namespace) -> None:
    import rac

    rac.unpack(folder / "m.rac", folder / "back", threads=2, force=True)


def compare(folder: Path, _: argparse.Namespace) -> None:
    made = json.loads((folder / "made.json").read_text())
    for name, digest in made.items():
        with (folder / "back" / name).open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                raise SystemExit(f"{name} is not what was made")


def load(folder: Path, _: argparse.Namespace) -> None:
    every(folder / "m.rac")


def every(archive: Any) -> None:
    """Every tensor of an archive, one after the other."""
    import rac

    with rac.open(archive, threads=2) as f:
        names = f.keys()
        for name in names:
            f.get_tensor(name)


class Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def writable(self) -> bool:
        """It takes everything."""
        return True

    def write(self, data: Any) -> int:
        """Bytes taken."""
        return len(data)


def coded(folder: Path, _: argparse.Namespace) -> None:
    import rac

    rac.pack(folder / "source", Nowhere(), jobs=2)


def written(folder: Path, _: argparse.Namespace) -> None:
    """As many bytes as the archive has, written and brought to the disk."""
    left, piece = (folder / "m.rac").stat().st_size, os.urandom(8 << 20)
    with (folder / "written").open("wb", buffering=0) as f:
        while left > 0:
            left -= f.write(piece)
        os.fsync(f.fileno())
    (folder / "written").unlink()


def theirs(folder: Path, _: argparse.Namespace) -> None:
    import ml_dtypes  # noqa: F401 - numpy knows its names then
    from safetensors.numpy import load_file

    for path in sources(folder / "back"):
        load_file(path)


def plain(folder: Path, _: argparse.Namespace) -> None:
    """Two threads that read the source and do nothing with it."""

    def work(first: int) -> None:
        buffer = bytearray(PIECE)
        for path in sources(folder / "source"):
            with path.open("rb", buffering=0) as f:
                for at in range(first * PIECE, path.stat().st_size, 2 * PIECE):
                    os.preadv(f.fileno(), [buffer], at)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


def read(folder: Path, _: argparse.Namespace) -> None:
    buffer = bytearray(8 << 20)
    with (folder / "m.rac").open("rb", buffering=0) as f:
        while f.readinto(buffer):
            pass


def in_memory(folder: Path, _: argparse.Namespace) -> None:
    """Prints the bytes of the sample, and the fastest pack and load of three, in seconds and processor seconds."""
    import numpy as np

    import rac
    from rac.encode.sources import open_source

    tensors, size = {}, 0
    for t in open_source(folder / "source").tensors:
        if size < SAMPLE:
            n = min(t.nbytes, SAMPLE)  # of one that is larger some rows
            row = t.nbytes // t.shape[0]
            words = t.read(0, n // row * row).view(np.uint16)
            tensors[t.name] = words.reshape(-1, *t.shape[1:])
            size += words.nbytes
    import ml_dtypes

    tensors = {n: w.view(ml_dtypes.bfloat16) for n, w in tensors.items()}
    best = dict[str, float]()

    def timed(what: str, work: Callable[[], Any]) -> None:
        start, before = time.perf_counter(), time.process_time()
        work()
        busy, took = time.process_time() - before, time.perf_counter() - start
        best[what] = min(best.get(what, took), took)
        best[what + ", processor"] = min(best.get(what + ", processor", busy), busy)

    for _i in range(3):
        out = io.BytesIO()
        timed("pack", functools.partial(rac.save_file, tensors, out, threads=2))
        timed("load", functools.partial(every, out.getvalue()))
    print(json.dumps({"size": size, **best}))


STEPS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "make": make,
    "memory": in_memory,
    "plain": plain,
    "pack": pack,
    "nowhere": coded,
    "write": written,
    "verify": verify,
    "read": read,
    "load": load,
    "unpack": unpack,
    "compare": compare,
    "safetensors": theirs,
}


def step(name: str, argv: list[str]) -> dict[str, Any]:
    """Run a step in a process of its own: what it has printed, seconds, those of the processor, MB at most."""
    done = subprocess.run([sys.executable, __file__, *argv, "--step", name], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: failed")
    out: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        out |= json.loads(line)
    return out


def one(name: str, args: argparse.Namespace) -> None:
    """A step, in this process."""
    import numpy as np

    import rac.numpy

    with rac.open(rac.numpy.save({"warm": np.zeros((64, 64), np.float32)})) as f:  # what is imported on the way
        f.get_tensor("warm")
    if args.cold:
        drop([*args.folder.glob("m.rac"), *sources(args.folder / "source"), *sources(args.folder / "back")])
    start, before = time.perf_counter(), time.process_time()
    STEPS[name](args.folder, args)
    took, busy = time.perf_counter() - start, time.process_time() - before
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1000 if "VmHWM:" in status else 0.0
    print(json.dumps({"seconds": took, "busy": busy, "peak": peak * 1.024}))


def row(what: str, dense: int, found: dict[str, Any]) -> None:
    """Print a row of the table."""
    s, busy = found["seconds"], found["busy"]
    print(f"| {what} | {s:.1f} | {busy:.1f} | {dense / 1e6 / s:.0f} | {dense / 1e6 / busy:.0f} | {found['peak']:.0f} |")
    sys.stdout.flush()


def clock(took: float, kernels: float, disk: tuple[float, float], sizes: tuple[int, int]) -> str:
    """A pack beside the kernels alone and the disk, which gives the source and takes the archive; seconds, bytes."""
    gave, got = (size / 1e6 / s for size, s in zip(sizes, disk, strict=True))
    return (
        f"pack, by the clock: {took:.1f} s; the kernels alone {kernels:.1f}, the disk {sum(disk):.1f}, of which "
        f"{disk[0]:.1f} to give the source ({gave:.0f} MB/s) and {disk[1]:.1f} to take the archive ({got:.0f} MB/s): "
        f"the longer of the two is {max(kernels, sum(disk)) / took:.2f} x of the pack"
    )


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """All steps."""
    folder, archive, cold = args.folder, args.folder / "m.rac", [*argv, "--cold"]
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty")
    try:
        print("| step | seconds | of the processor | MB/s | MB/s of the processor | memory, MB |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        made = step("make", argv)
        dense = sum(p.stat().st_size for p in sources(folder / "source"))
        row("make", dense, made)
        sample = step("memory", argv)
        row("read the source, cold", dense, given := step("plain", cold))
        row("pack, cold", dense, packed := step("pack", cold))
        row("pack, written nowhere", dense, nowhere := step("nowhere", argv))
        row("verify against the source", dense, step("verify", argv))
        shutil.rmtree(folder / "source")
        row("write, by the stored bytes", archive.stat().st_size, disk := step("write", argv))
        row("read, cold", archive.stat().st_size, step("read", cold))
        row("load, cold", dense, first := step("load", cold))
        row("load, warm", dense, loaded := step("load", argv))
        row("unpack", dense, unpacked := step("unpack", argv))
        row("compare", dense, step("compare", argv))
        row("safetensors, cold", dense, others := step("safetensors", cold))
        row("safetensors, warm", dense, step("safetensors", argv))
        print(f"{archive.stat().st_size:,} of {dense:,} bytes, {100 * archive.stat().st_size / dense:.2f} %")
        for what, at in (("pack", nowhere), ("load", loaded)):
            rate = sample["size"] / 1e6 / sample[what]
            here = dense / 1e6 / at["seconds"]
            print(f"{what}: {here:.0f} MB/s, in memory {rate:.0f}: {here / rate:.2f} x")
            rate, here = sample["size"] / 1e6 / sample[what + ", processor"], dense / 1e6 / at["busy"]
            print(f"{what}, by seconds of the processor: {here:.0f} MB/s, in memory {rate:.0f}: {here / rate:.2f} x")
        print(f"pack to the disk: {disk['seconds'] / packed['seconds']:.2f} x of what it writes at")
        for what, at, size in (("pack", packed, archive.stat().st_size), ("unpack", unpacked, dense)):
            kernels = dense / sample["size"] * sample[{"unpack": "load"}.get(what, what) + ", processor"]
            writing = disk["busy"] * size / archive.stat().st_size
            print(
                f"{what}, seconds of the processor: coding alone {kernels:.1f}, writing as much alone {writing:.1f}, "
                f"all {at['busy']:.1f}: {(kernels + writing) / at['busy']:.2f} x"
            )
        kernels, sizes = dense / sample["size"] * sample["pack"], (dense, archive.stat().st_size)
        print(clock(packed["seconds"], kernels, (given["seconds"], disk["seconds"]), sizes))
        print(f"load, cold: {first['seconds'] / others['seconds']:.2f} x the time of safetensors")
    finally:
        if not args.keep:
            shutil.rmtree(folder)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--pattern", type=Path, default=PATTERN, help=f"BF16 file to take after (default: {PATTERN})")
    p.add_argument("--base", type=Path, help="take this file, and with --shards others with its rows in other places")
    p.add_argument("--size", type=int, default=1000, metavar="MB", help="of the matrices of the model (default: 1000)")
    p.add_argument("--one", type=int, default=0, metavar="MB", help="and one matrix of this size")
    p.add_argument("--tiny", type=int, default=0, metavar="N", help="and so many vectors")
    p.add_argument("--shards", type=int, default=1, metavar="N", help="files of the source (default: 1)")
    p.add_argument("--keep", action="store_true", help="leave what was made")
    p.add_argument("--step", choices=STEPS, help="one of the steps alone, in a folder that --keep has left")
    p.add_argument("--cold", action="store_true", help="with --step: what it reads is not in the page cache")
    args = p.parse_args()
    if args.step:
        one(args.step, args)
    else:
        run(args, sys.argv[1:])


if __name__ == "__main__":
    main()
