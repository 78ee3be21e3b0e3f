"""`rac shard` and `rac merge`."""

from __future__ import annotations

import argparse
from typing import Any

SHARD = """\
Cut an archive into shards of at most SIZE bytes each. Records are copied as they are, and checked on the way; a
tensor that is larger than SIZE has a shard of its own."""
MERGE = """\
Join a set of shards. Records are copied as they are, and checked on the way; what `rac shard` has cut comes back byte
for byte."""


def add(commands: Any) -> None:
    """Add both commands."""
    p = commands.add_parser(
        "shard",
        help="cut an archive into shards",
        description=SHARD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("src", metavar="IN.rac", help="the archive, or one shard of a set that is to be cut anew")
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write to")
    p.add_argument("--size", required=True, metavar="SIZE", help="bytes of a shard, such as 2GB")
    p.add_argument("--force", action="store_true", help="replace existing files")
    p.set_defaults(run=run_shard)
    p = commands.add_parser(
        "merge", help="join shards", description=MERGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("src", metavar="DIR", help="folder of the shards, or one of them")
    p.add_argument("-o", "--output", required=True, metavar="OUT.rac", help="archive to write")
    p.add_argument("--force", action="store_true", help="replace an existing file")
    p.set_defaults(run=run_merge)


def run_shard(args: argparse.Namespace) -> int:
    """Cut, and name what was written."""
    from rac.cli.progress import Progress, parse_size
    from rac.container import shards

    try:
        size = parse_size(args.size)
    except argparse.ArgumentTypeError as e:
        raise ValueError(str(e)) from None
    if size < 1:
        raise ValueError("--size must be at least 1 byte")
    with _Opened(args.src) as archives, Progress("copying", sum(a.access.size for a in archives)) as progress:
        paths = shards.shard(archives, args.output, size, force=args.force, progress=progress)
    print("\n".join(paths))
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Join, and name what was written."""
    from rac.cli.progress import Progress
    from rac.container import shards

    with _Opened(args.src) as archives, Progress("copying", sum(a.access.size for a in archives)) as progress:
        shards.merge(archives, args.output, force=args.force, progress=progress)
    print(args.output)
    return 0


class _Opened:
    """All archives of a set."""

    def __init__(self, src: str) -> None:
        from rac.decode.archive import open_archives

        self._archives = open_archives(src)

    def __enter__(self) -> Any:
        """The archives."""
        return self._archives

    def __exit__(self, *_: object) -> None:
        """Close them."""
        for archive in self._archives:
            archive.close()
