"""One pack by many ranks: each runs `pack_rank` on the same source, and one `finish`, at any time and in any order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rac.calibrate.text import Note
from rac.container.output import destination
from rac.encode.asked import Asked
from rac.encode.options import Hooks, Lossy, Progress, silent
from rac.encode.pack import Summary
from rac.encode.sources import open_source
from rac.errors import SourceError
from rac.machine import threads_of
from rac.ranks.crew import Crew
from rac.ranks.job import finished, job_of, opened
from rac.ranks.lease import LEASE, Heart
from rac.ranks.packer import RankPacker
from rac.ranks.store import Store, open_store


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has come to: work that is left is in the hands of others that are alive."""

    done: int
    """Items of the last stage that are done, by whichever rank."""
    items: int
    """Items of that stage."""


@dataclass(frozen=True, slots=True)
class How:
    """How this rank works; nothing of it decides about bytes. `jobs`, `note`, `progress` as `pack` has them."""

    jobs: int | None = None
    processes: bool = False
    lease: float = LEASE
    """Seconds without a sign of life after which others take over what a rank has begun."""
    cache: str | None = None
    note: Note = silent
    progress: Progress = silent


def pack_rank(
    src: str | os.PathLike[str],
    work: str | os.PathLike[str],
    asked: Asked | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    how: How = How(),
) -> Share:
    """Do what rank `rank` of `world` has to do of a pack, then what others have not finished.

    It may be killed at any time, and run again. `work` is a folder that all ranks see, or a URL of fsspec; `src` and
    `asked` (None: a lossless pack) are the same for all. ValueError for what cannot be asked for, SourceError and
    BudgetError as `rac.pack` has them, OutputError where the folder is that of another job, or cannot be written.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of 0 to {world - 1}")
    seat = _Seat(open_store(work), how, rank, world)
    with _packer(os.fspath(src), asked or Asked(), seat) as (packer, request):
        return Share(*packer.share(os.fspath(src), request))


def finish(
    work: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    src: str | os.PathLike[str] | None = None,
    asked: Asked | None = None,
    force: bool = False,
    how: How = How(),
) -> Summary:
    """Write the archive of a work folder: the bytes that one machine would write.

    What is left is done here, or waited for while a rank that is alive does it. `src` is the source where it has
    another path here; with `asked` too, no rank need have begun. Errors are those of `pack_rank` and of `rac.pack`.
    """
    store, path = open_store(work), destination(out, force)
    if src is None or asked is None:
        known, before = opened(store)
        src, asked = src or known, asked or before
    seat = _Seat(store, how, None, 1, path, force)
    with _packer(os.fspath(src), asked, seat) as (packer, request):
        done = packer.finish(os.fspath(src), request)
        finished(store, path)
        return done


def check(asked: Asked) -> None:
    """ValueError for what many ranks cannot do."""
    if asked.recover not in (None, 0):
        raise ValueError("recovery runs the whole model on one machine: many ranks pack without it")


class _Seat(NamedTuple):
    """Where a process sits among the ranks; `rank` None: it writes `out`."""

    store: Store
    how: How
    rank: int | None
    world: int
    out: str = ""
    force: bool = False


@contextlib.contextmanager
def _packer(src: str, asked: Asked, seat: _Seat) -> Iterator[tuple[RankPacker, Lossy | None]]:
    """The packer of a rank that has joined the job and is alive, and what is asked of a lossy pack."""
    check(asked)
    if not os.path.exists(src):
        raise SourceError("no such path: ranks read files, so download a repository first", file=src)
    how = seat.how
    options = asked.options(jobs=how.jobs, force=seat.force, processes=how.processes and asked.lossy)
    source = open_source(src, dequantise=asked.lossy, **asked.how)
    job = job_of(src, source, asked)
    job.join(seat.store)
    jobs = threads_of(how.jobs)
    about = {"world": seat.world, "jobs": jobs, "stages": []}
    with Heart(seat.store, seat.rank, how.lease, about) as heart:
        crew = Crew(seat.store, job.digest, heart, seat.world, jobs, how.note)
        with RankPacker(source, seat.out, options, Hooks(how.progress, how.note), crew) as packer:
            yield packer, asked.request(src, how.cache)
