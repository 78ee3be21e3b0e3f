"""Load and pack speed of this tree against another checkout, in turns.

    python tools/versus.py OTHER FILE.safetensors ... --lossy FILE.rac

Each tree runs in a process of its own, and both do the same work in turns, so that a busy machine slows both; where
memory falls decides some per cent of a process' speed, so there are several pairs of processes. Prints the least
processor time of each tree, one thread, and the median over the pairs of the ratio of speeds (above 1: this tree is
faster). Both trees need their C kernels built in place (`python setup.py build_ext --inplace`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
LEAST = 0.97
"""Ratio below which a change has to say why."""


def serve() -> None:
    """Do each line of standard input, "pack FILE ARCHIVE" or "load ARCHIVE", and print the seconds that it took."""
    import rac
    from rac.encode.pack import pack

    for line in sys.stdin:
        what, *files = line.rstrip("\n").split("\t")
        start = time.process_time()
        if what == "pack":
            pack(files[0], files[1], jobs=1, force=True)
        else:
            rac.load_file(files[0], threads=1)
        print(time.process_time() - start, flush=True)


class Tree:
    """A checkout whose code runs in a process of its own."""

    def __init__(self, root: str) -> None:
        env = os.environ | {"PYTHONPATH": os.path.join(root, "codec")}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__, "-"], env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def seconds(self, *command: str) -> float:
        """What the process took for a command."""
        print(*command, sep="\t", file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())  # type: ignore[union-attr]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def least(trees: tuple[Tree, Tree], turns: int, command: tuple[str, ...]) -> tuple[float, float]:
    """Least seconds of each tree; which begins changes from turn to turn."""
    pairs = []
    for i in range(turns + 1):
        a, b = (tree.seconds(*command) for tree in trees[:: -1 if i % 2 else 1])
        pairs.append((b, a) if i % 2 else (a, b))
    other, mine = (min(seconds) for seconds in zip(*pairs[1:], strict=True))
    return other, mine


def main() -> int:
    """Measure both trees."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("other", help="the root of the other checkout")
    p.add_argument("files", nargs="*", help="safetensors files that are packed and loaded")
    p.add_argument("--lossy", nargs="*", default=[], help="archives that are only loaded")
    p.add_argument("--pairs", type=int, default=7, help="of processes")
    p.add_argument("--turns", type=int, default=10, help="of loading in each process; a third of them for packing")
    args = p.parse_args()
    if args.other == "-":
        serve()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        todo: list[tuple[str, ...]] = []
        for file in args.files:
            out = os.path.join(folder, Path(file).stem + ".rac")
            todo += [("pack", file, out), ("load", out)]
        todo += [("load", file) for file in args.lossy]
        found: dict[tuple[str, ...], list[tuple[float, float]]] = {command: [] for command in todo}
        for i in range(args.pairs):
            print(f"pair {i + 1} of {args.pairs}", file=sys.stderr)
            trees = Tree(args.other), Tree(str(HERE))
            for command in todo:
                found[command].append(least(trees, args.turns // (3 if command[0] == "pack" else 1), command))
            for tree in trees:
                tree.close()
    for command, times in found.items():
        ratio = statistics.median(a / b for a, b in times)
        other, mine = (min(seconds) for seconds in zip(*times, strict=True))
        what = f"{command[0]} {Path(command[1]).name}"
        print(f"{what:<45} {other:8.4f} s {mine:8.4f} s  {ratio:.3f}{'' if ratio >= LEAST else '  below'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
