"""Bytes that a slice reads: one of N row slices and column slices of each tensor of archives.

    python tools/slice_bar.py FILE.rac ... [--parts 8]

The bar: at most 1.1 times the slice's share of the tensor's stored bytes and 64 KB, in every tensor. The index is read
once for a file and is not counted; objects that several tensors use are, with the first slice that needs them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rac
from rac.container.access import FileAccess

MORE = 1 << 16


class Counting(FileAccess):
    """Adds up what is read."""

    parallel = 1
    bytes = 0

    def read_into(self, at: int, out: memoryview) -> None:
        """Fill `out`, and count it."""
        self.bytes += len(out)
        super().read_into(at, out)


def measure(path: Path, parts: int) -> list[tuple[float, str, str, int, int, int]]:
    """(times the bar, name, axis, bytes of the worst slice, of its share, of the record) of each tensor and axis."""
    access = Counting(path)
    out = []
    with rac.open(access) as f:
        for archive in f.archives:
            for e in archive.index.entries:
                if e.type != 1 or len(e.shape) != 2:
                    continue
                for axis, n in enumerate(e.shape):
                    if n < parts:
                        continue
                    worst = (0.0, 0, 0.0)
                    for k in range(parts):
                        a, b = min(n, k * -(-n // parts)), min(n, (k + 1) * -(-n // parts))  # as torch.chunk cuts
                        if a == b:
                            continue
                        access.bytes = 0
                        f.get_slice(e.name)[(slice(a, b),) if axis == 0 else (slice(None), slice(a, b))]
                        share = e.size * (b - a) / n
                        worst = max(worst, (access.bytes / (1.1 * share + MORE), access.bytes, share))
                    out.append((worst[0], e.name, "rows" if axis == 0 else "columns", worst[1], int(worst[2]), e.size))
    return out


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", type=Path)
    p.add_argument("--parts", type=int, default=8)
    args = p.parse_args()
    missed = 0
    for path in args.files:
        rows = sorted(measure(path, args.parts), reverse=True)
        over = [r for r in rows if r[0] > 1]
        missed += len(over)
        print(f"{path}: {len(rows)} tensors and axes of two dimensions, {len(over)} above the bar; the worst")
        for times, name, axis, read, share, size in rows[:6]:
            print(
                f"  {times:6.3f} of the bar  {read:>10,} bytes for a share of {share:>10,} of {size:>11,}  "
                f"{axis:<7}  {name}"
            )
    return missed > 0


if __name__ == "__main__":
    raise SystemExit(main())
