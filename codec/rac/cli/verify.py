"""`rac verify`."""

from __future__ import annotations

import argparse
import time
from typing import Any

HELP = """\
Check every checksum and every padding byte, decode everything, and compare the digest of each tensor.

With --against the archive is also compared with its source, tensor for tensor and file for file; of quantised tensors
the error is measured.
Exit code 0 means whole (and equal), 1 damaged or different. "-" reads standard input."""


def add(commands: Any) -> None:
    """Add the command."""
    p = commands.add_parser(
        "verify",
        help="check an archive",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("src", metavar="IN.rac", help="the archive, or one shard of a set")
    p.add_argument("--against", metavar="SRC", help="the source that it must be equal to")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, and say what was seen."""
    from rac.cli.progress import Progress, size
    from rac.decode.archive import open_archives
    from rac.decode.unpack import tensor_bytes
    from rac.encode.verify import verify

    total = 0
    if args.src != "-":
        archives = open_archives(args.src)
        total = sum(tensor_bytes(e) for a in archives for e in a.index.entries)
        for archive in archives:
            archive.close()
    start = time.monotonic()
    with Progress("verifying", total) as progress:
        seen = verify(args.src, args.against, progress=progress)
    seconds = time.monotonic() - start
    equal = f", equal to {args.against}" if args.against else ""
    if seen.lossy:
        snr = "" if seen.snr is None else f", {seen.snr:.2f} dB from {args.against}"
        rest = f", the others{equal[1:]}" if args.against and seen.lossy < seen.tensors else ""
        equal = f", lossy: {seen.lossy} tensors quantised{snr}{rest}"
    print(
        f"{args.src}: whole{equal}. {seen.tensors} tensors ({size(seen.dense)}), {seen.attachments} attachments, "
        f"content {seen.digest.hex()}, {size(seen.dense / max(seconds, 1e-9))}/s"
    )
    return 0
