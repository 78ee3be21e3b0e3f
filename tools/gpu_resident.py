"""What layers that stay compressed on a GPU need beside their records: tables, places and jobs, in bytes.

    python tools/gpu_resident.py model.rac ...

Nothing is decoded; tensors whose tiles hold Zstandard frames, which are not read in their place, are left out.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # so that a CPU may stand for the device

import argparse

import torch

from rac.decode import random as ld
from rac.decode.archive import open_archives
from rac.gpu import op
from rac.runtime import record
from rac.runtime.replace import worth


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    print("| file | tensors | records, bytes | beside them, bytes | share |\n| --- | ---: | ---: | ---: | ---: |")
    for path in parser.parse_args().files:
        count = stored = beside = 0
        for archive in open_archives(path):
            for e in (e for e in archive.index.entries if worth(e)):
                if op.frames(ld.parse(archive, archive.record(e))):
                    continue
                data = record.collect(archive, e)
                s = record.parse(data)
                t = s.tensor
                units = [record.unit(data, t, i) for i in range(len(t.units))]
                at = [t.record.payload + u.offset for u in t.units[t.first :]]
                first = [bytes(u) for u in units[: t.first]]
                on = op.Packed(t, first, units[t.first :], record.matrices(s, data), at).on(torch.from_numpy(data))
                count, stored = count + 1, stored + len(data)
                beside += sum(a.nbytes for a in (on.aux, on.last, on.objects, on.status))
            archive.close()
        print(f"| {os.path.basename(path)} | {count} | {stored:,} | {beside:,} | {beside / max(1, stored):.1%} |")


if __name__ == "__main__":
    main()
