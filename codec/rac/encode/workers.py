"""Where matrices are quantised: threads of this process, or processes of their own, in bounded memory.

Threads scale to some eight cores: the kernels run outside the interpreter's lock, but 5 to 10 % of the time is spent
inside it (docs/scaling.md). What a matrix becomes does not depend on where.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, TypeVar

from rac.calibrate.layers import Layer
from rac.encode.align.recipe import Recipe
from rac.encode.code.plan import axis_of
from rac.encode.sources import SourceTensor
from rac.encode.worker_begin import begin
from rac.errors import OutputError
from rac.grid import matrix

T = TypeVar("T")
THREADS = 8  # jobs up to which threads are as good as processes
PER_WEIGHT, PER_MOMENT, PER_ROWS = 14, 9, 25
"""Bytes for each weight of a matrix, each number of its inputs' second moment, and of one that feeds rows."""


def start(jobs: int, processes: bool = False) -> Executor:
    """Workers: threads, or with `processes` processes that are started anew and import only what they need."""
    if not processes:
        return ThreadPoolExecutor(jobs)
    # a fork would copy locks that other threads hold
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), begin)


def submit(pool: Executor, done: SimpleQueue[Future[Any]], work: Callable[..., T], *arguments: Any) -> Future[T]:
    """Ask for work(*arguments); the future goes to `done` when it is done.

    `concurrent.futures.wait` holds the locks of all futures for a moment, and an interrupt in it leaves them held:
    then the workers never end.
    """
    job = pool.submit(work, *arguments)
    job.add_done_callback(done.put)
    return job


@contextlib.contextmanager
def named() -> Iterator[None]:
    """OutputError where a process was killed."""
    try:
        yield
    except BrokenProcessPool as e:
        raise OutputError("a worker process ended, perhaps for want of memory: try fewer --jobs") from e


def only(recipe: Recipe, name: str) -> Recipe:
    """What a worker needs to know for one tensor."""
    return replace(recipe, aligned={name: recipe.aligned[name]}, unreached=(), parts={}, why={})


def need(t: SourceTensor, recipe: Recipe) -> int:
    """About the bytes that quantising a tensor takes while it lasts."""
    a = recipe.aligned[t.name]
    return taken(t, a.layer) + (PER_ROWS * len(a.scales.rows) ** 2 if a.by_outputs else 0)


def taken(t: SourceTensor, layer: Layer | None) -> int:
    """About the bytes that any work on a tensor takes, of whose inputs so much is known, while it lasts."""
    if layer is None:
        return PER_WEIGHT * math.prod(t.shape)
    each, (rows, cols) = max(1, len(layer.experts)), matrix(t.dtype, t.shape, axis_of(t.shape))
    inputs = rows // each if layer.transposed else cols
    each_number = (PER_ROWS if layer.transposed else PER_MOMENT) + 8 * (each - 1)
    return PER_WEIGHT * math.prod(t.shape) + each_number * inputs**2


def run(pool: Executor, work: Callable[..., T], jobs: Iterable[tuple[int, Sequence[Any]]], limit: int) -> Iterator[T]:
    """Results of work(*arguments) for each (bytes that it takes, arguments) as they come, in `limit` bytes or one."""
    running: dict[Future[T], int] = {}
    done = SimpleQueue[Future[T]]()
    try:
        with named():
            for size, arguments in itertools.chain(jobs, [(math.inf, None)]):
                while running and sum(running.values()) + size > limit:
                    job = done.get()
                    del running[job]
                    yield job.result()
                if arguments is not None:
                    running[submit(pool, done, work, *arguments)] = int(size)
    finally:
        for job in running:
            job.cancel()
