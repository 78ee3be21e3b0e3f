"""`rac pack --work`: the share of a rank, or the end of a pack that many ranks share; and `rac jobs`."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from rac.cli.terminal import Steps, argument, clock, command, fitted, say, size, tell
from rac.encode import workers
from rac.encode.asked import Asked
from rac.encode.pack import Summary
from rac.errors import OutputError
from rac.machine import threads_of
from rac.ranks.job import clean, finished
from rac.ranks.packing import How, finish, pack_rank
from rac.ranks.store import open_store
from rac.ranks.view import RankView, look

JOBS = """\
Show how far the ranks of a pack are, from its work folder, in which nothing is written unless --clean says so.

Stages come as they are known: the next try of a search for the scale is known when the last one is done. ETA is the
time that what is left of a stage takes at the pace so far, on the workers that are alive. A rank is alive while its
last sign of life is younger than its lease, by the clocks of its machine and of this one; the ranks themselves compare
no clocks (docs/cluster.md).

  rac jobs /shared/job
  watch rac jobs s3://bucket/job
  rac jobs --clean /shared/job                     # when the file is written: removes what ranks have left there"""


def share(args: argparse.Namespace, asked: Asked) -> int:
    """Do what a rank has to do."""
    start, rank = time.monotonic(), args.rank or 0
    with Steps() as steps:
        how = _how(args, steps, asked.lossy)
        done = pack_rank(args.src, args.work, asked, rank=rank, world=args.world, how=how)
    left = done.items - done.done
    what = (
        f"{left} items are still in the hands of others" if left else "all is done, rac pack --finish writes the file"
    )
    say(f"rank {rank} of {args.world}: {what}; {clock(time.monotonic() - start)}")
    tell({"rank": rank, "world": args.world, **asdict(done), "seconds": time.monotonic() - start})
    return 0


def end(args: argparse.Namespace, asked: Asked | None) -> Summary:
    """Write the archive."""
    with Steps() as steps:
        how = _how(args, steps, asked is None or asked.lossy)
        return finish(args.work, args.output, src=args.src, asked=asked, force=args.force, how=how)


def _how(args: argparse.Namespace, steps: Steps, lossy: bool) -> How:
    jobs = threads_of(args.jobs, most=None if lossy else workers.THREADS)
    return How(jobs, lossy and jobs > workers.THREADS, args.lease, args.cache, lambda *what: steps(*what))


def add_jobs(p: argparse.ArgumentParser) -> None:
    """Add `rac jobs`."""
    command(p, jobs, JOBS)
    argument(p, "work WORK", "the work folder: a path, or a URL of fsspec")
    argument(p, "--json", "for programs")
    argument(p, "--clean", "remove what the job has left in its work folder, once its file is written")
    argument(p, "--yes", "with --clean: remove it too where the file was not written, or ranks are still alive")


def jobs(args: argparse.Namespace) -> int:
    """Print stages and ranks, or remove them."""
    if args.yes and not args.clean:
        raise ValueError("--yes goes with --clean")
    if args.clean:
        return _cleaned(args)
    found = look(open_store(args.work))
    asked = ", ".join(f"{name} {_plain(value)}" for name, value in found.asked.items()) or "lossless"
    say(f"{args.work}: {found.source} ({asked})")
    names = fitted([s.what for s in found.stages], beside=60)
    width = max(map(len, ("stage", *names)))
    say(f"{'stage':<{width}}    items     done  claimed     dead     left             bytes      ETA")
    for stage, name in zip(found.stages, names, strict=True):
        eta = "done" if stage.done == stage.items else "?" if stage.eta is None else clock(stage.eta)
        amount = f"{size(stage.done_size)} of {size(stage.size)}"
        counts = (stage.items, stage.done, stage.claimed, stage.dead, stage.left)
        say(f"{name:<{width}} {' '.join(f'{n:8,}' for n in counts)} {amount:>20} {eta:>8}")
    for state in ("alive", "silent", "ended"):
        if mine := [rank for rank in found.ranks if rank.state == state]:
            say(f"{state}: {', '.join(map(_named, mine))}")
    stages: list[Any] = [{**asdict(stage), "left": stage.left} for stage in found.stages]
    tell(
        {"source": found.source, "asked": dict(found.asked), "stages": stages, "ranks": list(map(asdict, found.ranks))}
    )
    return 0


def _cleaned(args: argparse.Namespace) -> int:
    """Remove what a finished job has left."""
    store = open_store(args.work)
    found, file = look(store), finished(store)
    alive = sum(rank.state == "alive" for rank in found.ranks)
    if (alive or not file) and not args.yes:
        what = f"{alive} of its ranks are alive" if alive else "its file was not written"
        raise OutputError(f"is not finished: {what}; give --yes to remove it all the same", file=args.work)
    removed, others = clean(store)
    say(f"{args.work}: removed, {removed} folders" + (f"; {len(others)} other files stay" if others else ""))
    tell({"file": file, "removed": removed, "others": others})
    return 0


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _named(rank: RankView) -> str:
    what = "finish" if rank.rank is None else f"rank {rank.rank}"
    host = rank.owner.split("-", 1)[1].rsplit("-", 2)[0]
    return f"{what} on {host}" + (f" (for {clock(rank.silence)})" if rank.state == "silent" else "")
