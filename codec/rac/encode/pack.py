"""Packing: a source to one archive, or to a set of shards. Workers share the work; the bytes never depend on them.

For lossless coding threads are enough: reading, counting, sorting, coding, bit planes and checksums run outside the
interpreter's lock. Matrices may be quantised in processes (workers.py).
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any, Protocol

import numpy as np

from rac.calibrate.evaluate import Divergence
from rac.calibrate.layers import Note
from rac.container import index as ix
from rac.container import zstd
from rac.container.access import FileAccess
from rac.container.reader import Archive
from rac.container.writer import Writer
from rac.decode.unpack import quantised
from rac.encode import record as rec
from rac.encode import resume as rs
from rac.encode import ties, workers
from rac.encode.align.recipe import Recipe
from rac.encode.allocate.budget import Request, code, read_text, recipe_for, snr, solve, texts_of
from rac.encode.code.plan import LEVELS, SLICES, Bytes, Encoder, Level, Plan, tuned
from rac.encode.sources import Attachment, Source, SourceTensor, from_arrays, open_source
from rac.errors import OutputError, RacError, SourceError
from rac.machine import room, threads_of
from rac.provenance import state
from rac.records import Limits
from rac.registry import RECORD_ATTACHMENT, RECORD_OBJECT, RECORD_TENSOR
from rac.stages.lanes.parameters import MAX_LANES

WINDOW = 64 << 20
"""Dense bytes in work beyond the largest tensor."""
Progress = Callable[[str, int], None]
"""Called with the name of a finished tensor and its dense bytes."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What quantising one tensor came to."""

    name: str
    shape: tuple[int, ...]
    alignment: str
    """"triangular", "pca", or "identity": all inputs count alike, or nothing is known of them."""
    rank: int
    """Of its low-rank part."""
    states: int
    snr: float
    """Of its output (of its weights, where nothing is known of its inputs), in dB."""
    outliers: int
    dead: int
    """Columns that got no bits."""
    seconds: float
    size: int = 0
    """Bytes of its record, and of the objects in front of it."""

    @property
    def bits(self) -> float:
        """Bytes * 8 / weights."""
        return 8 * self.size / math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a pack has written."""

    paths: tuple[str, ...]
    dense: int
    stored: int
    weights: int
    tensors: int
    resumed: int
    skipped: tuple[str, ...]
    quantised: int = 0
    quantised_bits: float = 0.0
    """Bytes of the quantised tensors * 8 / their weights, everything counted."""
    fidelity: tuple[Fidelity, ...] = ()
    """Of the quantised tensors, in the order of the file; but for those that an earlier run had finished."""


def pack(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    level: str = "default",
    jobs: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lanes: int | None = None,
    shard_size: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    bits: float | None = None,
    file_bits: float | None = None,
    size: int | None = None,
    snr: float | None = None,
    kl: float | None = None,
    calibrate: str | os.PathLike[str] | Sequence[str] = "none",
    tokens: int = 40960,
    effort: str = "default",
    keep: Sequence[str] = (),
    cache: str | None = None,
    align: str = "auto",
    rank: int | None = None,
    embeddings: bool = False,
    note: Note | None = None,
    processes: bool = False,
    slices: str | None = None,
) -> Summary:
    """Pack a safetensors file, a Hugging Face directory or a GGUF file; losslessly unless a budget is given.

    Args:
        src: What to pack.
        out: The .rac file to write; with `shard_size` the stem of a set "stem-00001-of-0000N.rac".
        level: "fast", "default" or "max".
        jobs: Threads, or processes; one per core up to 8 by default. The bytes do not depend on it.
        include: Patterns (fnmatch) of tensors to take; none means all.
        exclude: Patterns of tensors to leave out.
        lanes: ANS lanes per tile, 1..1024. Many short lanes suit a GPU, few long ones an archive.
        shard_size: Dense bytes after which a new shard begins.
        resume: Go on with the part that an interrupted pack left.
        force: Replace a file that exists.
        progress: Called after every tensor.
        bits: Budget of a lossy pack: bytes of the quantised tensors * 8 / their weights, everything counted.
        file_bits: Or bytes of the file * 8 / all weights.
        size: Or bytes of the file.
        snr: Or output signal to noise, mean over the quantised tensors, in dB.
        kl: Or divergence per token from the original on the (first) calibration text, in nats.
        calibrate: A text file to calibrate on, "self": text that the model writes, or several of these, which count
            alike; "none": from the weights alone.
        tokens: Tokens of each of these texts.
        effort: "fast", "default" or "max": states of the trellis and passes over each matrix.
        keep: Patterns of tensors that stay lossless, beside norms, small tensors and embeddings.
        cache: Folder where calibrations are kept for later packs of the same model; None: not kept.
        align: "auto", "triangular", "pca" or "identity": coordinates of the tensors whose inputs are known.
        rank: Of the low-rank parts of these tensors; None: at effort "max" what pays, which is nearly always 0, else 0.
        embeddings: Quantise embeddings and output layers too, a bit finer than the rest.
        note: Called with (what, done, of) while a lossy pack calibrates and looks for its scale.
        processes: Quantise in processes, started anew, instead of threads: for machines of many cores. A script that
            asks for it has its own work under `if __name__ == "__main__":`.
        slices: "fine": an eighth of the rows or columns of any tensor costs a reader at most 1.1 times its share of the
            stored bytes and 64 KB; "coarse": and 1 MB. None: fine, but coarse at level "max", where `lanes` are given,
            and for quantised tensors, which are 0.5 to 1 % smaller so where they are small.

    Raises:
        SourceError: The source is missing, damaged or no model.
        OutputError: The output exists, or cannot be written.
        BudgetError: The budget cannot be met.
    """
    source = open_source(src, include, exclude)
    settings = {"exclude": list(exclude), "include": list(include)}
    lossy = any(v is not None for v in (bits, file_bits, size, snr, kl))
    with workers.start(threads_of(jobs), processes and lossy) as pool:
        recipe = None
        if lossy:
            request = Request(
                bits,
                file_bits,
                size,
                snr,
                kl,
                texts_of(calibrate),
                tokens,
                effort,
                tuple(keep),
                cache,
                align,
                rank,
                embeddings,
                lanes,
                slices,
            )
            recipe = recipe_of(
                source, src, out, request, level=level, jobs=jobs, force=force, resume=resume, note=note, pool=pool
            )
        return pack_source(
            source,
            out,
            level=level,
            jobs=jobs,
            lanes=lanes,
            shard_size=shard_size,
            resume=resume,
            force=force,
            progress=progress,
            settings=settings,
            recipe=recipe,
            pool=pool,
            slices=slices,
        )


def recipe_of(
    source: Source,
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    request: Request,
    *,
    level: str = "default",
    jobs: int | None = None,
    force: bool = False,
    resume: bool = False,
    note: Note | None = None,
    pool: Executor | None = None,
) -> Recipe:
    """How a pack of `source`, opened from `src`, meets the request; OutputError where `out` must not be replaced.

    With `resume` the scale that an interrupted pack has found for the same request is taken from its part.
    """
    if os.path.isfile(out) and not force:  # said before the long work, not after it
        raise OutputError("exists already; give --force to replace it", file=os.fspath(out))
    groups = ties.find(source.tensors)
    recipe = recipe_for(groups, os.fspath(src), request, note)
    found = rs.provenance(f"{os.fspath(out)}.part").scale(recipe.about, level) if resume else None
    if found is not None:
        return replace(recipe, scale=found)
    judge = None
    if request.kl is not None:
        judge = Divergence(src, read_text(request.calibrate[0]), request.tokens, note)
    return solve(groups, recipe, request, threads_of(jobs), note, LEVELS[level], source.attachments, judge, pool)


def save_file(
    tensors: Mapping[str, Any],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    level: str = "default",
    threads: int | None = None,
) -> None:
    """Write numpy arrays or torch tensors to a .rac file, losslessly; tensors that share memory are tied.

    An existing file is replaced, at once and only by a whole one.

    Raises:
        SourceError: A value cannot be stored.
        OutputError: The file cannot be written.
    """
    pack_source(from_arrays(tensors, metadata), path, level=level, jobs=threads, force=True)


def pack_source(
    source: Source,
    out: str | os.PathLike[str],
    *,
    level: str = "default",
    jobs: int | None = None,
    lanes: int | None = None,
    shard_size: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    settings: dict[str, Any] | None = None,
    recipe: Recipe | None = None,
    layer: Callable[[Fidelity], None] | None = None,
    pool: Executor | None = None,
    slices: str | None = None,
    quantiser: Quantiser | None = None,
) -> Summary:
    """`pack` for a source that is open already; with a `recipe` its tensors are quantised, the others lossless.

    `layer` is called after each quantised tensor; `pool` quantises (workers.start), or else threads. A `quantiser`
    takes the place of a recipe.
    """
    if recipe is not None:
        quantiser = ByTrellis(recipe)
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    if lanes is not None and not 1 <= lanes <= MAX_LANES:
        raise ValueError(f"lanes must be 1..{MAX_LANES}")
    if slices not in (None, *SLICES):
        raise ValueError(f"slices must be one of {', '.join(SLICES)}, not {slices!r}")
    effort = tuned(LEVELS[level], lanes, slices)
    for t in source.tensors:
        try:
            ix.parse_shape(list(t.shape), Limits())
        except RacError as e:
            raise SourceError(f"tensor {t.name!r} has a shape that no reader takes") from e
    groups = ties.find(source.tensors)
    shards = _shards(groups, shard_size)
    path = os.fspath(out)
    paths = [path]
    if shard_size is not None:
        stem = path.removesuffix(".rac")
        paths = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.rac" for i in range(len(shards))]
    provenance = state(
        source.kind,
        level,
        cut=(lanes, slices),
        settings=settings,
        about=None if quantiser is None else quantiser.about,
        online=sum(t.online is not None for t in source.tensors),
        # a GGUF file has no names for places
        gguf_order=[t.name for t in source.tensors] if source.kind == "gguf" and any(g.aliases for g in groups) else (),
    )
    resumed = 0
    fidelity: list[Fidelity] = []

    def quantised_one(of: Fidelity) -> None:
        fidelity.append(of)
        if layer:
            layer(of)

    for i, (shard, name) in enumerate(zip(shards, paths, strict=True)):
        header: dict[str, Any] = {"features": [], "metadata": dict(source.metadata), "provenance": provenance}
        if len(shards) > 1:
            header["shard"] = [i + 1, len(shards)]
        files = source.attachments if i == 0 else ()
        if resume and len(shards) > 1 and os.path.exists(name):
            found = rs.scan(name, header, files, shard)
            if found and (found.files, len(found.digests)) == (len(files), len(shard)):
                resumed += len(shard)
                if progress:
                    for group in shard:
                        progress(group.tensor.name, group.tensor.nbytes * (1 + len(group.aliases)))
                continue
        resumed += _write(
            name,
            header,
            files,
            shard,
            effort,
            quantiser,
            threads_of(jobs),
            resume,
            force,
            progress,
            quantised_one,
            pool,
        )
    stored = sum(os.path.getsize(p) for p in paths)
    done = sum(t.nbytes for t in source.tensors)
    weights = sum(weights_of(t) for t in source.tensors)
    lossy, bits = 0, 0.0
    if quantiser is not None:
        archives = [Archive(FileAccess(p)) for p in paths]
        lossy, bits = quantised(e for a in archives for e in a.index.entries)
        for archive in archives:
            archive.close()
    return Summary(
        tuple(paths), done, stored, weights, len(source.tensors), resumed, source.skipped, lossy, bits, tuple(fidelity)
    )


def weights_of(t: SourceTensor) -> int:
    """Elements of a tensor."""
    return math.prod(t.shape)


def _shards(groups: list[ties.Group], size: int | None) -> list[list[ties.Group]]:
    if size is not None and size < 1:
        raise ValueError("shard size must be positive")
    out: list[list[ties.Group]] = [[]]
    held = 0
    for g in groups:
        if size is not None and out[-1] and held + g.tensor.nbytes > size:
            out.append([])
            held = 0
        out[-1].append(g)
        held += g.tensor.nbytes
    return out


def _write(
    path: str,
    header: dict[str, Any],
    files: Sequence[Attachment],
    groups: list[ties.Group],
    level: Level,
    quantiser: Quantiser | None,
    jobs: int,
    resume: bool,
    force: bool,
    progress: Progress | None,
    fidelity: Callable[[Fidelity], None],
    pool: Executor | None,
) -> int:
    """Write one archive; returns how many tensors were there already."""
    writer = Writer(path, force)
    content: list[list[Any]] = []

    def note(group: ties.Group, digest: bytes, of: Fidelity | None = None) -> None:
        t = group.tensor
        if of is not None:
            fidelity(of)
        for name in (t.name, *(a for a, _ in group.aliases)):
            content.append([name, t.dtype, list(t.shape), digest])
        if progress:
            progress(t.name, t.nbytes * (1 + len(group.aliases)))

    try:
        found = rs.scan(writer.part, header, files, groups) if resume else None
        if found:
            writer.go_on(found.entries, found.at)
            for group, digest in zip(groups, found.digests, strict=False):
                note(group, digest)
        else:
            writer.start(header)
        for file in files[found.files if found else 0 :]:
            _attach(writer, file)
        start = len(found.digests) if found else 0
        with ThreadPoolExecutor(jobs) as threads, workers.named():
            _tensors(
                writer,
                groups[start:],
                level,
                quantiser,
                threads,
                pool or threads,
                jobs,
                note,
                set(found.objects if found else ()),
            )
        writer.finish(ix.content_digest(content))
        return start
    except MemoryError as e:
        raise OutputError("not enough memory", file=path) from e
    finally:
        writer.close()


def _attach(writer: Writer, file: Attachment) -> None:
    head, unit = rec.attachment(file)
    writer.add(RECORD_ATTACHMENT, 0, head, [unit], method=head["stages"][0]["id"])
    writer.flush()


@dataclass
class _Item:
    """A tensor on its way: what is known of it, and how many rows of its tiles are still to come (-1: not analysed)."""

    group: ties.Group
    number: int
    left: int = -1
    plan: Plan | None = None
    encoder: Encoder | None = None
    """None for a quantised tensor."""
    behind: rec.Behind | None = None
    """Of a quantised tensor, which is done in one piece."""
    fidelity: Fidelity | None = None
    objects: tuple[rec.Object, ...] = ()
    bands: list[list[Bytes]] = field(default_factory=list)


def _tensors(
    writer: Writer,
    groups: list[ties.Group],
    level: Level,
    quantiser: Quantiser | None,
    pool: Executor,
    quantisers: Executor,
    jobs: int,
    note: Callable[[ties.Group, bytes, Fidelity | None], None],
    there: set[str],
) -> None:
    """Plan and encode ahead of the writer, in bounded memory; write in order. What is written next goes first.

    `there` has the names of the objects that the archive has already, and gets those that are written.
    """
    size = {
        g.tensor.name: quantiser.need(g.tensor) if quantiser and g.tensor.name in quantiser.names else g.tensor.nbytes
        for g in groups
    }
    limit = max([WINDOW if quantiser is None else room(), *size.values()])
    waiting: deque[_Item] = deque()
    coming = deque(groups)
    ready: list[tuple[int, int]] = []
    """(number of the tensor, row of tiles; -1: analyse it)"""
    running: dict[Future[Any], tuple[_Item, int]] = {}
    held = written = 0
    try:
        while coming or waiting:
            while coming and (not waiting or held + size[coming[0].tensor.name] <= limit):
                waiting.append(_Item(coming.popleft(), written + len(waiting)))
                heappush(ready, (waiting[-1].number, -1))
                held += size[waiting[-1].group.tensor.name]
            while ready and len(running) < 2 * jobs:
                number, row = heappop(ready)
                item = waiting[number - written]
                t = item.group.tensor
                if row < 0 and quantiser and t.name in quantiser.names:
                    work, given = quantiser.job(t)
                    running[quantisers.submit(work, *given)] = (item, row)
                elif row < 0:
                    running[pool.submit(_start, t, level)] = (item, row)
                else:
                    assert item.encoder is not None  # noqa: S101
                    running[pool.submit(rec.band, t, item.encoder, row)] = (item, row)
            if waiting[0].left == 0:
                item = waiting.popleft()
                written += 1
                assert item.plan is not None  # noqa: S101
                group, plan = item.group, item.plan
                units = [unit for band in item.bands for unit in band]
                own = 0
                for o in (o for o in item.objects if o.name not in there):
                    writer.add(RECORD_OBJECT, 0, o.head, o.units, **o.fields)
                    there.add(o.name)
                    own += o.size
                head = rec.head(group, plan, item.behind)
                writer.add(RECORD_TENSOR, 0, head, units, **rec.fields(group, plan, units, item.behind))
                writer.flush()
                of = item.fidelity and replace(item.fidelity, size=own + rec.size(head, units))
                note(group, head["digest"], of)
                held -= size[group.tensor.name]
                continue
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                item, row = running.pop(job)
                if row < 0:
                    item.plan, item.encoder, units, item.behind, item.fidelity, item.objects = job.result()
                    down = item.plan.grid.down
                    item.left = down if down > 1 and not item.behind else 0
                    item.bands = [units, *([] for _ in range(item.left))]
                    for r in range(item.left):
                        heappush(ready, (item.number, r))
                else:
                    item.bands[row + 1] = job.result()
                    item.left -= 1
    finally:
        for job in running:
            job.cancel()


Started = tuple[Plan, Encoder | None, list[Bytes], rec.Behind | None, Fidelity | None, tuple[rec.Object, ...]]


class Quantiser(Protocol):
    """What makes some tensors lossy."""

    @property
    def about(self) -> Mapping[str, Any]:
        """For the provenance."""

    @property
    def names(self) -> Container[str]:
        """The tensors that it quantises."""

    def need(self, t: SourceTensor) -> int:
        """About the bytes of memory that the work on one takes."""

    def job(self, t: SourceTensor) -> tuple[Callable[..., Started], tuple[Any, ...]]:
        """A function and its arguments, for a thread or, where they pickle, a process."""


@dataclass(frozen=True, slots=True)
class ByTrellis:
    """By trellis/1, as a recipe says."""

    recipe: Recipe

    @property
    def about(self) -> Mapping[str, Any]:
        """As the protocol says."""
        return {"bits_scale": repr(self.recipe.scale), **self.recipe.about}

    @property
    def names(self) -> Container[str]:
        """As the protocol says."""
        return self.recipe.aligned

    def need(self, t: SourceTensor) -> int:
        """As the protocol says."""
        return workers.need(t, self.recipe)

    def job(self, t: SourceTensor) -> tuple[Callable[..., Started], tuple[Any, ...]]:
        """As the protocol says."""
        return _quantise, (t, workers.only(self.recipe, t.name))


def _start(t: SourceTensor, level: Level) -> Started:
    """Analyse a tensor; encode it too where it has but one row of tiles, which no other thread could share."""
    encoder = rec.lossless(t, level)
    plan = encoder.plan
    units = plan.fronts
    if plan.grid.down == 1:
        units += rec.band(t, encoder, 0)
    return plan, encoder, units, None, None, rec.matrix_of(t, level)


def _quantise(t: SourceTensor, recipe: Recipe) -> Started:
    """All of a tensor of the recipe."""
    start = time.perf_counter()
    coded = code(t, recipe)
    q, dense = coded.quantised, coded.dense
    fidelity = Fidelity(
        t.name,
        t.shape,
        coded.alignment,
        recipe.aligned[t.name].rank,
        q.trellis.states,
        snr(t, dense, recipe),
        q.outliers,
        q.dead,
        time.perf_counter() - start,
    )
    behind = coded.behind(zstd.digest(dense.reshape(-1).view(np.uint8).data), ties.digest(t))
    units: list[Bytes] = [bytes(unit) for unit in coded.units]
    return coded.plan, None, units, behind, fidelity, (*coded.objects, *rec.matrix_of(t, LEVELS["default"]))
