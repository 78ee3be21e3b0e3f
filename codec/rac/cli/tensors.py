"""`rac ls`, `rac cat` and `rac diff`: tensors by name, of archives and of whatever can be packed."""

from __future__ import annotations

import argparse
import math
import sys
from fnmatch import fnmatchcase

from rac.cli import meant
from rac.cli.terminal import PICKLES, Progress, argument, command, fitted, say, size, tell
from rac.errors import NameNotFoundError
from rac.study.contents import Contents, Difference, both, by_digest, contents, difference

LS = """\
List the tensors of an archive, or of whatever can be packed: name, type, shape and size; of an archive also what they
take in the file, and how.

  rac ls model.rac
  rac ls model/ --match "*.mlp.*"
  rac ls model.rac --json"""
CAT = """\
Write one tensor to standard output as a .npy file, or one attached file as it is.

Types that .npy files do not know (BF16 and the 8-bit floats) are written as float32, which holds them exactly; --raw
writes the bytes of any tensor as they are, little-endian and in C order.

  rac cat model.rac model.norm.weight > norm.npy
  rac cat model.rac config.json
  rac cat model.rac model.norm.weight --raw | xxd | head"""
DIFF = """\
What differs between two archives, or anything else that can be packed, tensor by tensor: names, types, shapes, and how
large the error is. Attached files are compared by their content.

Exit code 0: no difference; 1: some. The error of B against A is in decibels (signal to noise) and at its largest.

  rac diff a.rac b.rac
  rac diff model/ model.rac --json"""


def add_ls(p: argparse.ArgumentParser) -> None:
    """Add `rac ls`."""
    command(p, ls, LS)
    argument(p, "src FILE", "an archive, one shard of a set, a folder, or another file that can be packed")
    argument(p, "--match PATTERN", "only tensors whose names match", default="*")
    argument(p, "--allow-pickle-weights", PICKLES)
    argument(p, "--json", "for programs")


def ls(args: argparse.Namespace) -> int:
    """List, a line for each tensor."""
    with contents(args.src, args.allow_pickle_weights) as found:
        rows = [t for t in found.tensors.values() if fnmatchcase(t.name, args.match)]
    names = fitted((t.name for t in rows), beside=55)
    width = max(map(len, names), default=0)
    for name, t in zip(names, rows, strict=True):
        shape = "x".join(map(str, t.shape)) or "scalar"
        stored = "" if t.stored is None else f"  {size(t.stored):>9}  {t.method}"
        say(f"{name:<{width}}  {t.dtype:<8} {shape:<16} {size(t.nbytes):>9}{stored}")
    keys = ("name", "dtype", "shape", "nbytes", "stored", "method")
    tell([{key: getattr(t, key) for key in keys} for t in rows])
    if not rows:
        raise NameNotFoundError(f"holds no tensor that matches {args.match!r}", file=args.src)
    return 0


def add_cat(p: argparse.ArgumentParser) -> None:
    """Add `rac cat`."""
    command(p, cat, CAT)
    argument(p, "src FILE", "an archive, one shard of a set, a folder, or another file that can be packed")
    argument(p, "name NAME", "of a tensor or of an attached file")
    argument(p, "--allow-pickle-weights", PICKLES)
    argument(p, "--raw", "the bytes of the tensor, without a .npy header")
    argument(p, "--force", "even where standard output is a terminal")


def cat(args: argparse.Namespace) -> int:
    """Write one tensor or file."""
    with contents(args.src, args.allow_pickle_weights) as found:
        if args.name in found.tensors:
            if sys.stdout.isatty() and not args.force:
                raise ValueError("a tensor is no text: send standard output to a file (... > x.npy), or give --force")
            data = _npy(found, args.name) if not args.raw else found.tensors[args.name].read().tobytes()
        elif args.name in found.files:
            data = found.files[args.name]()
        else:
            close = meant(args.name, [*found.tensors, *found.files])
            raise NameNotFoundError(f"holds no tensor and no file {args.name!r}{close}", file=args.src)
    sys.stdout.buffer.write(data)
    return 0


def _npy(found: Contents, name: str) -> bytes:
    """A tensor as a .npy file."""
    import io

    import numpy as np

    array = found.tensors[name].read()
    if np.dtype(array.dtype.str) != array.dtype:  # a type of ml_dtypes
        print(f"rac: {name} is {found.tensors[name].dtype}; written as float32", file=sys.stderr)
        array = array.astype(np.float32)
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def add_diff(p: argparse.ArgumentParser) -> None:
    """Add `rac diff`."""
    command(p, diff, DIFF)
    argument(p, "a A", "an archive, a folder, or another file that can be packed")
    argument(p, "b B", "what to compare with it")
    argument(p, "--match PATTERN", "only tensors whose names match", default="*")
    argument(p, "--allow-pickle-weights", PICKLES)
    argument(p, "--json", "for programs")


def diff(args: argparse.Namespace) -> int:
    """Compare, a line for each difference."""
    with both(args.a, args.b, args.allow_pickle_weights) as (a, b):
        if a.numbers != b.numbers:
            codes = args.b if a.numbers else args.a
            print(
                f"rac: {codes} holds codes; name the source that it was packed from to compare numbers", file=sys.stderr
            )
        names = [n for n in (*a.tensors, *(n for n in b.tensors if n not in a.tensors)) if fnmatchcase(n, args.match)]
        found: list[Difference] = []
        stated = 0  # equal by digests alone
        with Progress("comparing", sum(a.tensors[n].nbytes for n in names if n in a.tensors)) as progress:
            for name in names:
                if by_digest(x := a.tensors.get(name), y := b.tensors.get(name)):
                    stated += 1
                elif (one := difference(x, y)) is not None:
                    found.append(one)
                progress(name, a.tensors[name].nbytes if name in a.tensors else 0)
        files = _files(a, b) if args.match == "*" else {}
    for one in found:
        say(f"{one.name}: {_text(one)}")
    for name, what in files.items():
        say(f"file {name}: {what}")
    differ = len(found) + len(files)
    equal = len(names) - len(found)
    some = "" if stated == equal else f" ({stated} of them"
    by = f"{some} by the digests that both archives state (rac verify checks these){')' if some else ''}"
    say(f"{len(names)} tensors: {equal} equal{by if stated else ''}, {len(found)} differ; {len(files)} files differ")
    rows = [{key: getattr(one, key) for key in ("name", "what", "snr", "largest", "unequal")} for one in found]
    tell({"tensors": len(names), "differences": rows, "files": files})
    return 1 if differ else 0


def _files(a: Contents, b: Contents) -> dict[str, str]:
    """Attached files that differ, and how."""
    out = {}
    for name in sorted(a.files.keys() | b.files.keys()):
        if name not in b.files:
            out[name] = "only in A"
        elif name not in a.files:
            out[name] = "only in B"
        elif a.files[name]() != b.files[name]():
            out[name] = "differs"
    return out


def _text(one: Difference) -> str:
    """A difference for people."""
    if one.largest is None:
        return one.what
    snr = "" if one.snr is None or not math.isfinite(one.snr) else f"{one.snr:.2f} dB, "
    return f"{one.what}: {snr}at most {one.largest:.3g}, {one.unequal:,} values"
