"""`rac info`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

HELP = """\
Show what an archive holds and where its bytes went; the lines add up to the size of the file.

Reads header and index only, whatever the size. "-" reads standard input to its end."""


def add(commands: Any) -> None:
    """Add the command."""
    p = commands.add_parser(
        "info",
        help="show what is inside",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("src", metavar="IN.rac", help="the archive, or one shard of a set")
    p.add_argument("--json", action="store_true", help="for programs")
    p.add_argument("--tensors", action="store_true", help="a line for every tensor")
    p.set_defaults(run=run)


@dataclass(frozen=True)
class _File:
    name: str
    header: dict[str, Any]
    index: Any
    size: int


def _files(src: str) -> list[_File]:
    """Header and index of the archive, from its ends or from a stream."""
    if src == "-" or (os.path.exists(src) and not os.path.isfile(src) and not os.path.isdir(src)):
        from rac.container.forward import Forward

        with sys.stdin.buffer if src == "-" else open(src, "rb") as f:
            forward = Forward(f, "<stdin>" if src == "-" else src)
            for _ in forward.records():
                pass
        return [_File(str(forward.name), forward.header, forward.index, forward.at)]
    from rac.decode.archive import open_archives

    out = []
    for a in open_archives(src):
        out.append(_File(a.access.name, a.header, a.index, a.access.size))
        a.close()
    return out


def report(src: str) -> dict[str, Any]:
    """Everything that `rac info` knows, as plain data. "bytes" adds up to "size" exactly."""
    from rac.decode.unpack import quantised, tensor_bytes, weights
    from rac.records import PARTS
    from rac.registry import RECORD_ATTACHMENT, RECORD_TENSOR

    files = _files(src)
    where = dict.fromkeys(
        ("header", "record heads", *PARTS[:5], "padding", "attachments", "other records", "index", "trailer"),
        0,
    )
    tensors, attachments = [], []
    for f in files:
        where["header"] += f.index.header_size
        where["index"] += f.index.size
        where["trailer"] += 32
        for e in f.index.entries:
            if e.type == RECORD_TENSOR:
                where["record heads"] += 32 + e.head_size
                for kind, n in zip(PARTS, e.parts, strict=True):
                    where[kind] += n
                where["padding"] += e.size - 32 - e.head_size - e.payload_size
                dense, n = tensor_bytes(e) // (1 + len(e.aliases)), weights(e)
                tensors.append(
                    {
                        "name": e.name, "dtype": e.dtype, "shape": list(e.shape), "method": e.method, "bytes": e.size,
                        "dense": dense, "ratio": e.size / dense if dense else None,
                        "bits_per_weight": 8 * e.size / n if n else None,
                        "parts": dict(zip(PARTS, e.parts, strict=True)),
                        "aliases": [{"name": a, "tied": t} for a, t in e.aliases],
                    }
                )  # fmt: skip
            elif e.type == RECORD_ATTACHMENT:
                where["attachments"] += e.size
                attachments.append({"name": e.name, "method": e.method, "bytes": e.size})
            else:
                where["other records"] += e.size
    names = sum(1 + len(e.aliases) for f in files for e in f.index.entries if e.type == RECORD_TENSOR)
    total = sum(weights(e) * (1 + len(e.aliases)) for f in files for e in f.index.entries if e.type == RECORD_TENSOR)
    dense = sum(tensor_bytes(e) for f in files for e in f.index.entries)
    size = sum(f.size for f in files)
    lossy, lossy_bits = quantised(e for f in files for e in f.index.entries)
    return {
        "files": [f.name for f in files], "size": size, "dense": dense, "weights": total, "tensor_names": names,
        "bits_per_weight": 8 * size / total if total else None, "ratio": size / dense if dense else None,
        "quantised": lossy, "quantised_bits": lossy_bits,
        "bytes": where, "tensors": tensors, "attachments": attachments,
        "metadata": files[0].header.get("metadata", {}), "provenance": files[0].header.get("provenance", {}),
        "content": [f.index.digest.hex() for f in files],
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from rac.cli.progress import size

    r = report(args.src)
    if args.json:
        print(json.dumps(r, indent=1, ensure_ascii=False))
        return 0
    if args.tensors:
        width = max((len(t["name"]) for t in r["tensors"]), default=4)
        print(f"{'tensor':<{width}}  {'dtype':<8} {'shape':<16} {'method':<8} {'bytes':>12} {'ratio':>7} {'bits/w':>7}")
        for t in r["tensors"]:
            ratio = f"{t['ratio']:7.2%}" if t["ratio"] is not None else "      -"
            bits = f"{t['bits_per_weight']:7.3f}" if t["bits_per_weight"] is not None else "      -"
            shape = "x".join(map(str, t["shape"])) or "scalar"
            print(
                f"{t['name']:<{width}}  {t['dtype']:<8} {shape:<16} {t['method']:<8} {t['bytes']:>12,} {ratio} {bits}"
            )
            for a in t["aliases"]:
                print(f"  {'=' if a['tied'] else '~'} {a['name']} ({'tied' if a['tied'] else 'equal'}, stored once)")
        print()
    print(", ".join(r["files"]))
    p = r["provenance"]
    print(f"  made by      {p.get('tool', '?')}, level {p.get('level', '?')}, from {p.get('source', '?')}")
    if n := r["quantised"]:
        print(f"  LOSSY        {n} tensors quantised at {r['quantised_bits']:.4f} bits per weight, all counted")
    print(f"  content      {', '.join(r['content'])}")
    print(f"  tensors      {r['tensor_names']:,} names, {len(r['tensors']):,} stored, {r['weights']:,} weights")
    for a in r["attachments"]:
        print(f"  attachment   {a['name']} ({a['bytes']:,} bytes)")
    by: dict[str, list[int]] = {}
    for t in r["tensors"]:
        sums = by.setdefault(f"{t['dtype']} {t['method']}", [0, 0, 0])
        sums[0], sums[1], sums[2] = sums[0] + 1, sums[1] + t["bytes"], sums[2] + t["dense"]
    for kind, (n, stored, dense) in by.items():
        print(f"  {kind:<21} {n:>6,} tensors {stored:>16,} bytes {stored / dense if dense else 0:>8.2%}")
    print("  bytes")
    for kind, n in r["bytes"].items():
        if n:
            print(f"    {kind:<14} {n:>16,}  {n / r['size']:7.3%}")
    print(f"    {'total':<14} {r['size']:>16,}  = the size of the file")
    bits = f"{r['bits_per_weight']:.3f} bits per weight" if r["weights"] else "no weights"
    print(f"  {size(r['dense'])} -> {size(r['size'])}: {r['ratio'] or 0:.2%}, {bits}, all bytes counted")
    return 0
