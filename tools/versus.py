"""Load and pack speed of this tree against another checkout, in turns.

    python tools/versus.py OTHER FILE.safetensors ... --lossy FILE.rac

Prints processor time, the least of several passes, and the ratio of speeds (above 1: this tree is faster), of one
thread, since wall time on a shared machine differs by a fifth from run to run. Both trees need their C kernels built in
place (`python setup.py build_ext --inplace`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
LEAST = 0.97
"""Ratio below which a change has to say why."""


def measure(passes: int, files: list[str], lossy: list[str]) -> None:
    """Print "what seconds" for each file, in the process of one tree."""
    import rac
    from rac.encode.pack import pack

    def least(n: int, work: object) -> float:
        took = []
        for _ in range(n):
            start = time.process_time()
            work()  # type: ignore[operator]
            took.append(time.process_time() - start)
        return min(took)

    with tempfile.TemporaryDirectory() as folder:
        for f in files:
            out = os.path.join(folder, "m.rac")
            print(f"pack {Path(f).name}\t{least(3, lambda f=f, out=out: pack(f, out, jobs=1, force=True))}")
            print(f"load {Path(f).name}\t{least(passes, lambda out=out: rac.load_file(out, threads=1))}")
    for f in lossy:
        print(f"load {Path(f).name}\t{least(passes, lambda f=f: rac.load_file(f, threads=1))}", flush=True)


def main() -> int:
    """Measure both trees in turns."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("other", help="the root of the other checkout")
    p.add_argument("files", nargs="*", help="safetensors files that are packed and loaded")
    p.add_argument("--lossy", nargs="*", default=[], help="archives that are only loaded")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--passes", type=int, default=11)
    args = p.parse_args()
    if args.other == "-":
        measure(args.passes, args.files, args.lossy)
        return 0
    best: dict[str, dict[str, float]] = {}
    for turn in range(args.turns):
        print(f"turn {turn + 1} of {args.turns}", file=sys.stderr)
        for tree in (args.other, str(HERE)):
            command = [sys.executable, __file__, "-", *args.files, "--passes", str(args.passes), "--lossy", *args.lossy]
            env = os.environ | {"PYTHONPATH": os.path.join(tree, "codec")}
            for line in subprocess.run(
                command, env=env, capture_output=True, text=True, check=True
            ).stdout.splitlines():
                what, seconds = line.split("\t")
                found = best.setdefault(what, {})
                found[tree] = min(found.get(tree, float("inf")), float(seconds))
    for what, found in best.items():
        other, mine = found[args.other], found[str(HERE)]
        print(
            f"{what:<50} {other:8.4f} s {mine:8.4f} s  {other / mine:.3f}{'' if other / mine >= LEAST else '  below'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
