"""`rac unpack`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

HELP = """\
Unpack an archive: every tensor bit for bit, every attachment byte for byte.

OUT is a folder, or a single file that ends in .safetensors or .gguf. A weight whose layer needs an online transform is
written as it is stored, and named: what is written runs only where something applies the transform. `rac.load_model`
does, and `rac.runtime.fold` puts it into the weights."""


def add(commands: Any) -> None:
    """Add the command."""
    p = commands.add_parser(
        "unpack",
        help="get the model back",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("src", metavar="IN.rac", help="the archive, or one shard of a set")
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="folder or file to write")
    p.add_argument("-j", "--jobs", type=int, metavar="N", help="threads (default: one per core, at most 8)")
    p.add_argument("--force", action="store_true", help="replace existing files")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Unpack, and name what was written."""
    from rac.cli.progress import Progress
    from rac.decode.archive import open_archives
    from rac.decode.unpack import tensor_bytes, unpack

    archives = open_archives(args.src)
    total = sum(tensor_bytes(e) for a in archives for e in a.index.entries)
    for archive in archives:
        archive.close()
    with Progress("unpacking", total) as progress:
        online: dict[str, list[str]] = {}
        paths = unpack(
            args.src,
            args.output,
            force=args.force,
            threads=args.jobs,
            progress=progress,
            online=lambda name, about: online.setdefault(about, []).append(name),
        )
    for path in paths:
        print(path)
    for about, names in online.items():
        print(f"needs an online transform ({about}): {', '.join(names)}", file=sys.stderr)
    return 0
