"""`rac unpack`, `rac verify`, `rac shard` and `rac merge`: commands on whole archives."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict

import rac
from rac.cli.terminal import Progress, argument, command, say, size, tell
from rac.container import shards
from rac.container.access import NoRangesError
from rac.container.reader import Archive
from rac.decode.archive import open_archives
from rac.decode.spool import at_random
from rac.decode.unpack import LIBRARIES, tensor_bytes
from rac.errors import OutputError
from rac.machine import parse_size
from rac.provenance import Provenance

UNPACK = """\
Unpack an archive: every tensor bit for bit, every attachment byte for byte.

OUT is a folder, or a single file that ends in .safetensors, .gguf or as the file that was packed; "-" reads standard
input, which is kept in an unnamed file beside OUT meanwhile. --only names files of the folder, or patterns: no others
are written.

A weight whose layer needs an online transform is written as it is stored, and named: what is written runs only where
something applies the transform. `rac.load_model` does, and `rac.runtime.fold` puts it into the weights."""
VERIFY = """\
Check every checksum and every padding byte, decode everything, and compare the digest of each tensor.

With --against the archive is also compared with its source, tensor for tensor and file for file; of quantised tensors
the error is measured. Where the archive states the SHA-256 of its files (what came from the Hub does), each file is put
together and compared; with --hub by what the Hub lists.
Exit code 0 means whole (and equal), 1 damaged or different. "-" reads standard input."""
SHARD = """\
Cut an archive into shards of at most SIZE bytes each. Records are copied as they are, and checked on the way; a
tensor that is larger than SIZE has a shard of its own."""
MERGE = """\
Join a set of shards. Records are copied as they are, and checked on the way; what `rac shard` has cut comes back byte
for byte."""


@contextmanager
def opened(src: str) -> Iterator[list[Archive]]:
    """The archives of a set, closed behind."""
    archives = open_archives(src)
    try:
        yield archives
    finally:
        for archive in archives:
            archive.close()


def dense(archives: Sequence[Archive]) -> int:
    """Bytes of all tensors, decoded."""
    return sum(tensor_bytes(e) for a in archives for e in a.index.entries)


def add_unpack(p: argparse.ArgumentParser) -> None:
    """Add `rac unpack`."""
    command(p, unpack, UNPACK)
    argument(p, "src IN.rac", "the archive, one shard of a set, a URL, or -")
    argument(p, "-o --output OUT", "folder or file to write (default: a folder with the name of the archive)")
    argument(p, "--only NAME", "write only these files", action="extend", nargs="+", default=[])
    argument(p, "-j --jobs N", "threads (default: one per core, at most 8)", type=int)
    argument(p, "--force", "replace existing files")
    argument(p, "--json", "for programs")


def unpack(args: argparse.Namespace) -> int:
    """Unpack, and name what was written."""
    online: dict[str, list[str]] = {}

    def needs(name: str, about: str) -> None:
        online.setdefault(about, []).append(name)

    how = {"force": args.force, "threads": args.jobs, "online": needs, "only": args.only}
    place = _place(args)
    with at_random(args.src, place) as archives, Progress("unpacking", total := dense(archives)) as progress:
        paths = rac.unpack(archives, place, progress=progress, **how)
        kind = Provenance.of(archives[0].header).source
    for path in paths:
        say(path)
    if kind in LIBRARIES and not place.endswith(".safetensors") and any(p.endswith(".safetensors") for p in paths):
        print(f"rac: a safetensors file, since the archive does not have the {kind} file whole", file=sys.stderr)
    tell({"files": paths, "bytes": total, "online": online})
    for about, names in online.items():
        print(f"needs an online transform ({about}): {', '.join(names)}", file=sys.stderr)
    return 0


def _place(args: argparse.Namespace) -> str:
    """Where to unpack to: what was named, or the name of the archive without its ending, in this folder."""
    if args.output is None:
        if args.src == "-":
            raise ValueError("standard input has no name: name a place by --output")
        args.output = os.path.basename(os.path.normpath(args.src)).removesuffix(".rac")
        if os.path.lexists(args.output) and not args.force:
            raise OutputError("exists already; name a place by --output, or give --force", file=args.output)
    return str(args.output)


def add_verify(p: argparse.ArgumentParser) -> None:
    """Add `rac verify`."""
    command(p, verify, VERIFY)
    argument(p, "src IN.rac", "the archive, or one shard of a set")
    argument(p, "--against SRC", "the source that it must be equal to")
    argument(p, "--allow-pickle-weights", "SRC may be a .pt, .pth or .bin file: torch.load(weights_only=True) reads it")
    argument(p, "--hub", "compare its files with what the Hub lists for the commit that was packed")
    argument(p, "--json", "for programs")


def verify(args: argparse.Namespace) -> int:
    """Verify, and say what was seen."""
    total, part = 0, ""
    if args.src != "-":
        with suppress(NoRangesError), opened(args.src) as archives:  # such a URL is read forward
            total = dense(archives)
            origin = Provenance.of(archives[0].header, args.src)
            taken = [f"--include {p}" for p in origin.include] + [f"--exclude {p}" for p in origin.exclude]
            part = f" in what was packed of it ({' '.join(taken)})" if taken else ""
    start = time.monotonic()
    with Progress("verifying", total) as progress:
        how = {"pickles": args.allow_pickle_weights, "hub": args.hub}
        seen = rac.verify(args.src, args.against, progress=progress, **how)
    seconds = time.monotonic() - start
    source = f"what the codes of {args.against} stand for" if seen.dequantised else args.against
    equal = f", equal to {source}{part}" if args.against else ""
    if seen.lossy:
        snr = "" if seen.snr is None else f", {seen.snr:.2f} dB from {source}"
        rest = f", the others{equal[1:]}" if args.against and seen.lossy < seen.tensors else ""
        tuned = f", {seen.tuned} vectors changed by recovery" if seen.tuned else ""
        equal = f", lossy: {seen.lossy} tensors quantised{snr}{tuned}{rest}"
    if seen.files:
        equal += f", {seen.files} files with the SHA-256 that " + (f"{seen.hub} has" if seen.hub else "was packed")
    say(
        f"{args.src}: whole{equal}. {seen.tensors} tensors ({size(seen.dense)}), {seen.attachments} attachments, "
        f"content {seen.digest.hex()}, {size(seen.dense / max(seconds, 1e-9))}/s"
    )
    if seen.others:
        some = ", ".join(seen.others[:5]) + (" ..." if len(seen.others) > 5 else "")
        print(f"rac: not compared, as they were not packed or are quantised: {some}", file=sys.stderr)
    tell({"file": args.src, "against": args.against, "seconds": seconds, **asdict(seen)})
    return 0


def add_shard(p: argparse.ArgumentParser) -> None:
    """Add `rac shard`."""
    command(p, shard, SHARD)
    argument(p, "src IN.rac", "the archive, or one shard of a set that is to be cut anew")
    argument(p, "-o --output DIR", "folder to write to", required=True)
    argument(p, "--size SIZE", "bytes of a shard, such as 2GB", required=True)
    argument(p, "--force", "replace existing files")
    argument(p, "--json", "for programs")


def add_merge(p: argparse.ArgumentParser) -> None:
    """Add `rac merge`."""
    command(p, merge, MERGE)
    argument(p, "src DIR", "folder of the shards, or one of them")
    argument(p, "-o --output OUT.rac", "archive to write", required=True)
    argument(p, "--force", "replace an existing file")
    argument(p, "--json", "for programs")


def shard(args: argparse.Namespace) -> int:
    """Cut, and name what was written."""
    limit = parse_size(args.size)
    if limit < 1:
        raise ValueError("--size must be at least 1 byte")
    with opened(args.src) as archives, Progress("copying", sum(a.access.size for a in archives)) as progress:
        paths = shards.shard(archives, args.output, limit, force=args.force, progress=progress)
    say("\n".join(paths))
    tell({"files": paths})
    return 0


def merge(args: argparse.Namespace) -> int:
    """Join, and name what was written."""
    with opened(args.src) as archives, Progress("copying", sum(a.access.size for a in archives)) as progress:
        shards.merge(archives, args.output, force=args.force, progress=progress)
    say(args.output)
    tell({"files": [args.output]})
    return 0
