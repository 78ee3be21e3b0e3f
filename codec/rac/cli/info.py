"""`rac info`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from rac.cli.archives import opened
from rac.cli.terminal import argument, command, fitted, size, tell
from rac.container.access import InFile, NoRangesError
from rac.container.forward import Forward
from rac.container.index import method_of
from rac.decode.random import parse
from rac.decode.stream import Objects
from rac.decode.unpack import quantised, tensor_bytes, weights
from rac.errors import FormatError
from rac.linalg.transform import describe
from rac.provenance import Provenance
from rac.records import PARTS, Entry, Index
from rac.registry import RECORD_ATTACHMENT, RECORD_OBJECT, RECORD_TENSOR
from rac.stages.base import Numbers
from rac.stages.table import PRODUCTS, is_quantised
from rac.study import grouped, role
from rac.tensor import Tensor

HELP = """\
Show what an archive holds and where its bytes went; the lines add up to the size of the file.

Reads header, index and the record heads of quantised tensors, whatever the size; of all tensors where layers of the
model need online transforms. "-" reads standard input to its
end."""


def add(p: argparse.ArgumentParser) -> None:
    """Add the command."""
    command(p, run, HELP)
    argument(p, "src IN.rac", "the archive, one shard of a set, or a URL")
    argument(p, "--json", "for programs")
    argument(p, "--tensors", "a line for every tensor, and what quantised ones consist of")


@dataclass(frozen=True)
class _File:
    name: str
    header: dict[str, Any]
    index: Index
    size: int
    heads: dict[int, Tensor]  # what the record heads state, by the offset of the record


def _wanted(mapped: bool, kind: int, method: str) -> bool:
    """Whether the head of a record says more than its row: quantised, or of a model with online maps (`mapped`)."""
    return (mapped and kind == RECORD_TENSOR) or (kind in (RECORD_TENSOR, RECORD_OBJECT) and is_quantised(method))


def _files(src: str) -> list[_File]:
    """Header, index and heads of the archive, from its ends or from a stream."""
    if src == "-" or (os.path.exists(src) and not os.path.isfile(src) and not os.path.isdir(src)):
        return [_stream(src)]
    try:
        return _at_random(src)
    except NoRangesError:
        return [_stream(src)]


def _at_random(src: str) -> list[_File]:
    out = []
    with opened(src) as archives:
        for a in archives:
            out.append(_File(a.access.name, a.header, a.index, a.access.size, {}))
            mapped = Provenance.of(a.header, a.access.name).online > 0
            wanted = [e for e in a.index.entries if _wanted(mapped, e.type, e.method)]
            with ThreadPoolExecutor(a.access.parallel) as pool:
                records = list(pool.map(a.record, wanted))
            for e, record in zip(wanted, records, strict=True):
                with InFile(a.access.name, repr(e.name)):
                    out[-1].heads[e.at] = parse(a, record)
    return out


def _forward(src: str) -> Any:
    """What can only be read forward: standard input, a pipe, a URL whose server has no ranges."""
    if "://" in src:
        from rac.container.remote import open_body  # imports more than a local path needs

        return open_body(src)
    return sys.stdin.buffer if src == "-" else open(src, "rb")


def _stream(src: str) -> _File:
    heads = {}
    with closing(_forward(src)) as f:
        forward = Forward(f, "<stdin>" if src == "-" else src)
        objects, mapped = Objects(forward.limits), Provenance.of(forward.header, forward.name).online > 0
        for record in forward.records():
            wanted = _wanted(mapped, record.type, method_of(record))
            if wanted or record.type == RECORD_OBJECT:
                with InFile(str(forward.name), repr(record.head.get("name"))):
                    t = objects.parse(record)
                objects.keep(t, None)
                if wanted:
                    heads[record.at] = t
    assert forward.index is not None  # noqa: S101
    return _File(str(forward.name), forward.header, forward.index, forward.at, heads)


def _details(e: Entry, t: Tensor, numbers: Numbers, file: _File) -> dict[str, Any]:
    """What a quantised tensor or object consists of; FormatError where its head and its index row disagree.

    "streams" are bytes, and add up to the record: its head, the front unit of the coder, the sections of the unit of
    its numbers, the streams of the tiles, and all padding.
    """
    front = [u.size for u in t.units[: t.first]]
    if sum(front) != e.parts[0] or front[-1] != numbers.front:
        why = "units do not have the sizes that head and index state"
        raise FormatError(why, file=file.name, unit=repr(e.name), offset=e.at)
    head, sections = 32 + e.head_size, numbers.section_sizes
    sizes = (head, e.parts[0] - sum(sections), *sections, *e.parts[1:5], e.size - head - sum(e.parts[:5]))
    names = ("head", "tables", *numbers.sections, "directories", "words", "escapes", "raw", "padding")
    out: dict[str, Any] = {"coder": t.chain.coder.id}
    if absent := dict(p.column for p in PRODUCTS.values() if numbers.id in p.behind):
        align = t.record.head.get("x-align")  # a note of the encoder: decoding needs to know nothing of an alignment
        out = {"align": align if isinstance(align, str) else None} | absent
    if t.chain.product is not None:
        shapes = {o.name: o.shape for o in file.index.entries if o.type == RECORD_OBJECT}
        out[t.chain.product.column[0]] = t.chain.product.detail(t.uses, [shapes[n] for n in t.uses])
    return {
        **out,
        **numbers.details(t.context.dtype),
        **t.chain.coder.details(),
        "escapes": e.parts[3],
        "streams": dict(zip(names, sizes, strict=True)),
    }


def report(src: str) -> dict[str, Any]:
    """Everything that `rac info` knows, as plain data. "bytes" adds up to "size" exactly."""
    files = _files(src)
    rows: dict[int, list[dict[str, Any]]] = {RECORD_TENSOR: [], RECORD_OBJECT: [], RECORD_ATTACHMENT: []}
    for f in files:
        for e in f.index.entries:
            if e.type in rows:
                rows[e.type].append(_row(e, f))
    entries = [e for f in files for e in f.index.entries]
    tensors = [e for e in entries if e.type == RECORD_TENSOR]
    total = sum(weights(e) * (1 + len(e.aliases)) for e in tensors)
    dense, size = sum(map(tensor_bytes, entries)), sum(f.size for f in files)
    lossy, lossy_bits = quantised(entries)
    return {
        "files": [f.name for f in files],
        "size": size,
        "dense": dense,
        "weights": total,
        "tensor_names": sum(1 + len(e.aliases) for e in tensors),
        "bits_per_weight": 8 * size / total if total else None,
        "ratio": size / dense if dense else None,
        "quantised": lossy,
        "quantised_bits": lossy_bits,
        "roles": _roles(rows[RECORD_TENSOR]),
        "bytes": _where(files, entries),
        "tensors": rows[RECORD_TENSOR],
        "objects": rows[RECORD_OBJECT],
        "attachments": rows[RECORD_ATTACHMENT],
        "metadata": files[0].header.get("metadata", {}),
        "provenance": Provenance.of(files[0].header).stated,
        "content": [f.index.digest.hex() for f in files],
    }


def _where(files: Sequence[_File], entries: Sequence[Entry]) -> dict[str, int]:
    """Bytes of all files by what they are for."""
    sizes: Counter[int] = Counter()
    for e in entries:
        sizes[e.type] += e.size
    tensors = [e for e in entries if e.type == RECORD_TENSOR]
    parts = {kind: sum(e.parts[i] for e in tensors) for i, kind in enumerate(PARTS[:5])}
    heads = sum(32 + e.head_size for e in tensors)
    known = {"attachments": sizes.pop(RECORD_ATTACHMENT, 0), "objects": sizes.pop(RECORD_OBJECT, 0)}
    padding = sizes.pop(RECORD_TENSOR, 0) - heads - sum(parts.values())
    return {
        "header": sum(f.index.header_size for f in files),
        "record heads": heads,
        **parts,
        "padding": padding,
        **known,
        "other records": sizes.total(),
        "index": sum(f.index.size for f in files),
        "trailer": 32 * len(files),
    }


def _row(e: Entry, f: _File) -> dict[str, Any]:
    """What there is to say of a record."""
    if e.type == RECORD_ATTACHMENT:
        return {"name": e.name, "method": e.method, "bytes": e.size}
    of_tensor, n = e.type == RECORD_TENSOR, math.prod(e.shape)
    n, dense = (weights(e), tensor_bytes(e) // (1 + len(e.aliases))) if of_tensor else (n, 4 * n)
    out = {
        "name": e.name,
        "dtype": e.dtype,
        "shape": list(e.shape),
        "method": e.method,
        "bytes": e.size,
        "dense": dense,
        "ratio": e.size / dense if dense else None,
        "bits_per_weight": 8 * e.size / n if n else None,
        "parts": dict(zip(PARTS, e.parts, strict=True)),
    }
    if of_tensor:
        out["aliases"] = [{"name": a, "tied": t} for a, t in e.aliases]
    if (t := f.heads.get(e.at)) and t.chain.numbers is not None:
        out["quantised"] = _details(e, t, t.chain.numbers, f)
    if t and t.online:
        out["online"] = describe(t.online, t.shape[1])
    return out


def _roles(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the quantised tensors of each role."""
    out = []
    for name, found in grouped((t for t in tensors if "quantised" in t), lambda t: role(t["name"])).items():
        n, size = sum(math.prod(t["shape"]) for t in found), sum(t["bytes"] for t in found)
        sums = {"role": name, "tensors": len(found), "weights": n, "bytes": size, "bits_per_weight": 8 * size / n}
        out.append({**sums, "outliers": sum(t["quantised"]["outliers"] for t in found)})
    return out


def _table(rows: Sequence[Sequence[str]], left: int = 1, indent: str = "") -> None:
    """Columns as wide as they need to be, the first `left` of them flush left, the others flush right."""
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [v.ljust(n) if i < left else v.rjust(n) for i, (v, n) in enumerate(zip(row, width, strict=True))]
        print(indent + "  ".join(cells).rstrip())


def _tensors(r: Mapping[str, Any]) -> None:
    """A line for every tensor and object, and two tables of the quantised ones."""
    every = [*r["tensors"], *r["objects"]]
    width = max((len(t["name"]) for t in every), default=4)
    print(f"{'tensor':<{width}}  {'dtype':<8} {'shape':<16} {'method':<9} {'bytes':>12} {'ratio':>7} {'bits/w':>7}")
    for t in every:
        ratio = f"{t['ratio']:7.2%}" if t["ratio"] is not None else "      -"
        bits = f"{t['bits_per_weight']:7.3f}" if t["bits_per_weight"] is not None else "      -"
        shape = "x".join(map(str, t["shape"])) or "scalar"
        kind = t["dtype"] if "aliases" in t else "object"
        print(f"{t['name']:<{width}}  {kind:<8} {shape:<16} {t['method']:<9} {t['bytes']:>12,} {ratio} {bits}")
        for a in t.get("aliases", ()):
            print(f"  {'=' if a['tied'] else '~'} {a['name']} ({'tied' if a['tied'] else 'equal'}, stored once)")
    print()
    # a table of those that have the same parameters
    for keys, lossy in grouped((t for t in every if "quantised" in t), lambda t: tuple(t["quantised"])).items():
        at, hidden = keys.index("outliers"), ("row_classes", "column_classes", "tables", "streams")
        shown = [*keys[:at], "classes", "tables", *(k for k in keys[at:] if k not in hidden)]
        rows = [[t["name"], *(_text(k, t["quantised"]) for k in shown)] for t in lossy]
        _table([["quantised", *shown], *rows], 3)
        print()
        sizes = [["bits per weight", "sum", *lossy[0]["quantised"]["streams"]]]
        for t in lossy:
            n, streams = math.prod(t["shape"]), t["quantised"]["streams"].values()
            sizes.append([t["name"], f"{t['bits_per_weight']:.4f}", *(f"{8 * v / n:.4f}" for v in streams)])
        _table(sizes)
        print()


def _text(key: str, q: Mapping[str, Any]) -> str:
    """One parameter of a quantised tensor."""
    if key == "classes":
        return f"{q['row_classes']}x{q['column_classes']}" if q["tables"] else "-"
    value = q[key] or None if key == "tables" else q[key]
    if value is None or any((key, value) == p.column for p in PRODUCTS.values()):  # nothing to say
        return "-"
    return value if isinstance(value, str) else f"{value:,}"


def _quantised(r: Mapping[str, Any]) -> None:
    """What is lossy, by role; the objects count with the tensors that use them."""
    found = [(t["role"], t["tensors"], t["weights"], t["bits_per_weight"], t["outliers"]) for t in r["roles"]]
    if r["objects"]:
        share = 8 * r["bytes"]["objects"] / sum(t["weights"] for t in r["roles"])
        outliers = sum(o["quantised"]["outliers"] for o in r["objects"] if "quantised" in o)
        found.append(("(objects)", len(r["objects"]), 0, share, outliers))
    rows = [["role", "tensors", "weights", "bits/w", "outliers"]]
    names = fitted((name for name, *_ in found), beside=50)
    rows += [
        [name, f"{n:,}", f"{w:,}" if w else "-", f"{b:.4f}", f"{o:,}"]
        for name, (_, n, w, b, o) in zip(names, found, strict=True)
    ]
    _table(rows, indent="  ")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    r = report(args.src)
    if args.json or args.quiet:
        tell(r)
        return 0
    if args.tensors:
        _tensors(r)
    print(", ".join(r["files"]))
    p = r["provenance"]
    print(f"  made by      {p.get('tool', '?')}, level {p.get('level', '?')}, from {p.get('source', '?')}")
    if n := r["quantised"]:
        of_file = f"{r['bits_per_weight']:.3f} bits per weight of the file"
        print(f"  LOSSY        {of_file}; {n} tensors quantised at {r['quantised_bits']:.4f} bits, all counted")
    else:
        print("  lossless     every tensor comes back bit for bit as it was packed")
    print(f"  content      {', '.join(r['content'])}")
    print(f"  tensors      {r['tensor_names']:,} names, {len(r['tensors']):,} stored, {r['weights']:,} weights")
    for about, n in Counter(t["online"] for t in r["tensors"] if "online" in t).items():
        print(f"  online       {n:,} tensors: {about}")
    for a in r["attachments"]:
        print(f"  attachment   {a['name']} ({a['bytes']:,} bytes)")
    for kind, found in grouped(r["tensors"], lambda t: f"{t['dtype']} {t['method']}").items():
        stored, dense = sum(t["bytes"] for t in found), sum(t["dense"] for t in found)
        print(f"  {kind:<21} {len(found):>6,} tensors {stored:>16,} bytes {stored / dense if dense else 0:>8.2%}")
    if r["roles"]:
        _quantised(r)
    print("  bytes")
    for kind, n in r["bytes"].items():
        if n:
            print(f"    {kind:<14} {n:>16,}  {n / r['size']:7.3%}")
    print(f"    {'total':<14} {r['size']:>16,}  = the size of the file")
    bits = f"{r['bits_per_weight']:.3f} bits per weight" if r["weights"] else "no weights"
    print(f"  {size(r['dense'])} -> {size(r['size'])}: {r['ratio'] or 0:.2%}, {bits}, all bytes counted")
    return 0
