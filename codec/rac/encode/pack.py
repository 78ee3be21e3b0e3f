"""Packing: a source to one archive, or to a set of shards. Workers share the work; the bytes never depend on them.

For lossless coding threads are enough: reading, counting, sorting, coding, bit planes and checksums run outside the
interpreter's lock. Matrices may be quantised in processes (workers.py).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from rac.calibrate.evaluate import Judge
from rac.calibrate.given import Given
from rac.calibrate.layers import Layers
from rac.calibrate.text import Note
from rac.container import index
from rac.container.access import ChangedError
from rac.container.writer import PipeWriter, Writer
from rac.decode.unpack import quantised, usual_headers
from rac.encode import record, resume, ties, workers
from rac.encode.align.recipe import Ask, Recipe, Sample, Seen, check_keep, look
from rac.encode.allocate.budget import Search, read_text, recipe_for
from rac.encode.asked import Asked
from rac.encode.encoded import Encoded, Fidelity, Kept
from rac.encode.options import Hooks, Lossy, Made, PackOptions, Progress, silent
from rac.encode.quantise.tensor import encode, measure
from rac.encode.reasons import Lossless, reasons
from rac.encode.schedule import WINDOW, Job, Quantiser, Schedule
from rac.encode.sources import Attachment, Source, SourceTensor, from_arrays, ready
from rac.encode.tuned import Tuning, changed, room_for, trainable
from rac.errors import OutputError, RacError, SourceError
from rac.machine import room, threads_of
from rac.provenance import Provenance, frame_name, header_name, state
from rac.records import Entry, Limits
from rac.registry import RECORD_ATTACHMENT
from rac.tensor import extra_of

PIPE = "-"
"""As the name of the output: standard output."""
__all__ = ["Fidelity", "Packer", "Progress", "Summary", "pack", "pack_source", "save", "save_file"]


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
    """Fidelity of each quantised tensor, in the order of the file, without those that an earlier run had finished."""
    lossless: tuple[Lossless, ...] = ()
    """Lossless tensors of a lossy pack by their reason, most weights first."""
    lost: str = ""  # why the source does not come back as the file that it was
    dequantised: tuple[str, ...] = ()  # what weights were stored as, where the numbers that they stand for were packed


def pack(
    src: Any,
    out: Any,
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
    calibrate: str | os.PathLike[str] | Sequence[str] | None = None,
    calibration: str | os.PathLike[str] | Layers | Sequence[Made] | None = None,
    tokens: int = 40960,
    context: int = 1024,
    backward: bool = True,
    effort: str = "default",
    keep: Sequence[str] = (),
    cache: str | None = None,
    align: str = "auto",
    rank: int | None = None,
    embeddings: bool = True,
    recover: str | int | None = None,
    note: Note | None = None,
    processes: bool = False,
    slices: str | None = None,
    all_files: bool = False,
    pickles: bool = False,
    device: str = "cpu",
) -> Summary:
    """Pack a safetensors file, a Hugging Face directory or repository, a GGUF file or one of another library.

    Losslessly without a budget. The other libraries: docs/compatibility.md.

    Args:
        src: What to pack: a path; "ORG/NAME[@REVISION]" (also behind hf://) of the Hub, of which nothing is kept; or
            the bytes of a safetensors file, or a file object with them.
        out: The .rac file to write, a file object, or "-": standard output; with `shard_size` the stem of
            "stem-00001-of-0000N.rac".
        level: "fast", "default" or "max".
        jobs: Threads, or processes; one per core up to 8 by default. The bytes do not depend on it.
        include: Patterns (fnmatch), or one, of tensors to take; none means all.
        exclude: Patterns of tensors to leave out.
        lanes: ANS lanes per tile, 1..1024. Many short lanes suit a GPU, few long ones an archive.
        shard_size: Dense bytes after which a new shard begins.
        resume: Go on with the part that an interrupted pack left.
        force: Replace a file that exists.
        progress: Called after every tensor.
        bits: Budget of a lossy pack: bytes of the quantised tensors * 8 / their weights, everything counted; embeddings
            and output layers are among them.
        file_bits: Or bytes of the file * 8 / all weights.
        size: Or bytes of the file.
        snr: Or output signal to noise, mean over the quantised tensors, in dB.
        kl: Or divergence per token from the original on the (first) calibration text, in nats; of "auto" on a part of
            the mix that is kept for it.
        calibrate: A text file to calibrate on, or a folder of pictures or sounds, pairs or prompts, as `rac pack`
            takes them (docs/lossy.md); "self": text that the model writes; or several of these, which count alike;
            "auto": the built-in mix, and "self" of a language model; "none": from the weights alone. None: "auto" for
            the folder of a causal language model or a sentence encoder, where no `calibration` is given, else "none".
        calibration: What `rac.calibrate(module, batches)` has returned, a file that it was saved to, or several of
            either: of the components of a pipeline, for example.
        tokens: Tokens of each of these texts.
        context: Tokens of a sequence, as many as the model has positions for at most.
        backward: Find out how much outputs matter, by a backward pass where the model predicts tokens.
        effort: "fast", "default" or "max": states of the trellis and passes over each matrix; at "max" errors are fed
            back along rows too, where the calibration says that it pays.
        keep: Patterns of tensors that stay lossless, beside norms and small tensors.
        cache: Folder where calibrations are kept for later packs of the same model; None: not kept.
        align: "auto", "triangular", "pca" or "identity": coordinates of the tensors whose inputs are known.
        rank: Rank of these tensors' low-rank parts; None: at effort "max" what pays, which is nearly always 0, else 0.
        embeddings: Quantise embeddings and output layers too; False: they stay lossless.
        recover: Steps of recovery, or "auto": with the integers as they are, gains of rows and norms, and biases, are
            trained on the calibration text, and some of the built-in mix where that is another, until the model
            predicts as the original does (docs/lossy.md). None: none.
        note: Called with (what, done, of) while a lossy pack calibrates and looks for its scale.
        processes: Quantise in processes, started anew, instead of threads: for machines of many cores. A script that
            asks for it has its own work under `if __name__ == "__main__":`.
        slices: "fine": an eighth of the rows or columns of any tensor costs a reader at most 1.1 times its share of the
            stored bytes and 64 KB; "coarse": and 1 MB. This holds for quantised tensors of up to 4 bits a weight. None:
            fine, but coarse at level "max", where `lanes` are given, and for quantised tensors, which are smaller so;
            strips of whole rows at level "fast", of which a slice of columns reads all.
        all_files: Take other files above 64 MB too, in pieces.
        pickles: Allow files that torch pickled (.pt, .pth, .bin); they are read by `torch.load(weights_only=True)`.
        device: "cpu", "cuda" or "mps": where blocks are calibrated, factors found and errors fed back (docs/gpu.md).
            Another device than the CPU may make other bytes, and the provenance names it.

    Raises:
        SourceError: The source is missing, damaged or no model.
        OutputError: The output exists, or cannot be written.
        BudgetError: The budget cannot be met.
        MissingDependencyError: A language model is to be calibrated, and torch or transformers is not installed.
    """
    asked = Asked.of(locals())
    options = asked.options(jobs=jobs, resume=resume, force=force, processes=processes and asked.lossy)
    beside = PIPE if hasattr(out, "write") else os.fspath(out)
    with contextlib.ExitStack() as stack:
        path, source = stack.enter_context(ready(src, beside, lossy=asked.lossy, **asked.how))
        packer = stack.enter_context(Packer(source, out, options, Hooks(progress or silent, note or silent)))
        request = asked.request(path, cache)
        quantiser = ByTrellis(packer.allocate(path, request), packer.kept) if request else None
        return packer.write(quantiser)


def save_file(
    tensors: Mapping[str, Any],
    path: Any,
    metadata: Mapping[str, str] | None = None,
    *,
    level: str = "default",
    threads: int | None = None,
) -> None:
    """Write numpy arrays or torch tensors to a .rac file, or to a file object, losslessly; shared memory is tied.

    An existing file is replaced, at once and only by a whole one. SourceError where a value cannot be stored,
    OutputError where the file cannot be written.
    """
    with Packer(from_arrays(tensors, metadata), path, PackOptions(level, threads, force=True), Hooks()) as packer:
        packer.write(None)


def save(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of the file that `save_file` writes."""
    out = io.BytesIO()
    save_file(tensors, out, metadata)
    return out.getvalue()


def pack_source(
    source: Source,
    out: Any,
    *,
    recipe: Recipe | None = None,
    quantiser: Quantiser | None = None,
    progress: Progress | None = None,
    layer: Callable[[Fidelity], None] | None = None,
    **options: Any,
) -> Summary:
    """Pack a source that is open already, as `pack` does; with a `recipe` its tensors are quantised, else lossless.

    A `quantiser` takes the place of a recipe, `layer` is called after each quantised tensor. `options` are those of
    PackOptions: `settings`, which are stated in the provenance, and what `pack` knows too.
    """
    hooks = Hooks(progress or silent, layer=layer or silent)
    with Packer(source, out, PackOptions(**options), hooks) as packer:
        return packer.write(quantiser if recipe is None else ByTrellis(recipe))


class Packer(contextlib.ExitStack):
    """One pack of an open source: what the search for a scale has made is kept for the writing. Leave it by `with`."""

    def __init__(self, source: Source, out: Any, options: PackOptions, hooks: Hooks) -> None:
        super().__init__()
        for t in source.tensors:
            try:
                index.parse_shape(list(t.shape), Limits())
            except RacError as e:
                raise SourceError(f"tensor {t.name!r} has a shape that no reader takes") from e
        self._source, self._options, self._hooks = source, options, hooks
        self._stream: Any = out if hasattr(out, "write") else None
        self._out = PIPE if self._stream is not None else os.fspath(out)
        if self._stream is not None and (options.resume or options.shard_size is not None):
            raise ValueError("a stream is written forward, in one file: without resume and shard_size")
        self._jobs = threads_of(options.jobs)
        self._calibrated: list[Layers] = []
        self._arrange()
        self._lossless, self._lossy = Kept(self._out), Kept(self._out)
        self._left: list[ties.Group] | None = None  # what the tape is to bring, until it is asked to
        self._threads = self._pool = self.enter_context(workers.start(self._jobs))
        if options.processes:
            self._pool = self.enter_context(workers.start(self._jobs, processes=True))
        self.callback(self._lossless.close)
        self.callback(self._lossy.close)
        if source.tape:
            self.callback(source.tape.close)  # first of all: threads may wait for it

    def _arrange(self) -> None:
        """Find what the source holds once, and what of its files does not follow from its tensors."""
        source = self._source
        self._groups = ties.find(source.tensors)
        every = ((name, g) for g in self._groups for name in (g.tensor.name, *(a for a, _ in g.aliases)))
        tensors = ((name, extra_of(g.extra, name), g.tensor.dtype, g.tensor.shape) for name, g in every)
        usual = usual_headers(tensors, dict(sorted(source.metadata.items(), key=lambda item: item[0].encode())))
        self._headers = {f: h for f, h in source.headers.items() if h != usual.get(f or "model.safetensors")}
        self._files = (*source.attachments, *(Attachment(header_name(f), h) for f, h in self._headers.items()))
        self._files += tuple(Attachment(frame_name(f), frame) for f, frame in source.frames.items())

    def allocate(self, src: Any, request: Lossy) -> Recipe:
        """How a pack of the source, opened from `src`, meets a request; BudgetError where it cannot.

        With `resume` the scale that an interrupted pack has found for the same request is taken from its part.
        """
        options, note, calibration = self._options, self._hooks.note, request.calibration
        if os.path.isfile(self._out) and not options.force:  # said before the long work, not after it
            raise OutputError("exists already; give --force to replace it", file=self._out)
        if not isinstance(src, str | os.PathLike) and calibration.texts:
            raise SourceError("calibration runs the model: name its folder", file=str(getattr(src, "name", "<bytes>")))
        check_keep(self._source.tensors, request.keep)
        named: str | Given = os.fspath(src) if isinstance(src, str | os.PathLike) else ""
        if self._source.every:
            named = Given.of(os.fspath(named), self._source.every)
        recipe = replace(recipe_for(self._groups, named, request, note, self._once, self._look), coder=options.coder)
        recipe = replace(recipe, lossless=options.lossless)
        before = resume.provenance(f"{self._out}.part") if options.resume else Provenance()
        scale = before.scale(recipe.about, options.level)
        if scale is not None and not request.recover:
            return replace(recipe, scale=scale)

        read = partial(read_text, calibration.texts[0]) if calibration.texts else str
        judge = Judge(named, read, calibration.tokens, note, calibration.device)

        search = self._search(recipe if scale is None else replace(recipe, scale=scale))
        if not request.recover:
            return search.meet(request.budget, lambda: self._rest(recipe), judge)
        search.reserve = room_for(self._groups, recipe.aligned)
        if scale is None:
            search.recipe = search.meet(request.budget, lambda: self._rest(recipe), judge)
        else:
            search.again()
        return self._recovered(search.recipe, Tuning(request.recover, calibration, self._calibrated, named, note))

    def _recovered(self, recipe: Recipe, tuning: Tuning) -> Recipe:
        """Tune what was quantised, and the vectors of the source beside it."""
        vectors = trainable([t for t in self._source.tensors if t.name not in recipe.aligned])
        words, about = tuning(self._groups, self._lossy, vectors)
        if words:
            mine = {n: replace(vectors[n], data=w.reshape(-1).view(np.uint8), tie=None) for n, w in words.items()}
            tensors = tuple(mine.get(t.name, t) for t in self._source.tensors)
            files = {f: h for f, h in self._source.sha256.items() if f not in self._source.headers}
            self._source = replace(self._source, tensors=tensors, sha256=files)
            self._arrange()
            for g in self._groups:
                if g.tensor.name in words:
                    self._lossless.put(g.tensor.name, changed(g, vectors[g.tensor.name], self._options.lossless))
        return replace(recipe, about={**recipe.about, "recovered": about})

    def _once(self, calibration: Callable[[], Sequence[Layers]]) -> Sequence[Layers]:
        """What a calibration finds, which takes long."""
        found = calibration()
        self._calibrated += found[:1]
        return found

    def _look(self, asked: Sequence[Sequence[Ask]], sample: Sample) -> Iterable[Seen]:
        """What tensors say of how they are quantised, in any order."""
        jobs = ((max(workers.taken(*one) for one in some), (some, sample)) for some in asked)
        return (seen for found in workers.run(self._pool, look, jobs, room()) for seen in found)

    def _search(self, recipe: Recipe) -> Search:
        """The search for the common scale of a recipe, which keeps what it makes."""
        return Search(self._groups, recipe, self._pool, self._hooks.note, self._lossy)

    def kept(self, name: str) -> Encoded | None:
        """A quantised tensor as the search for the scale has left it, once."""
        return self._lossy.take(name)

    def _rest(self, recipe: Recipe) -> int:
        """About the bytes of all that is not quantised, with heads and index rows. It is kept, and not coded again."""
        groups = [g for g in self._groups if g.tensor.name not in recipe.aligned]
        jobs = ((g.tensor.nbytes, (g, self._options.lossless)) for g in groups)
        every = ((e.name, e) for e in workers.run(self._threads, record.whole, jobs, WINDOW))
        files = ((f"file {file.name}", record.attachment(file)) for file in self._files)
        size = 0
        for name, e in itertools.chain(every, files):
            size += sum(map(len, e.units)) + 512
            self._lossless.put(name, e)
        return size

    def _tree(self) -> dict[str, Any]:
        """What the files of the source are made of beside tensors, for the provenance."""
        source = self._source
        unordered = source.kind == "gguf" and any(g.aliases for g in self._groups)
        return {
            "gguf_order": [t.name for t in source.tensors] if unordered else [],  # the file has no names for places
            "headers": [*self._headers],
            "frames": [*source.frames],
            "links": dict(source.links),
            "folders": [*source.folders],
            "dequantised": [*source.dequantised],
            "pieces": dict(source.pieces),
            "hub": dict(source.hub),
            "sha256": dict(source.sha256),
        }

    def write(self, quantiser: Quantiser | None) -> Summary:
        """Write the archive, or the shards."""
        source, options, tensors = self._source, self._options, self._source.tensors
        shards, paths = _shards(self._groups, options.shard_size), [self._out]
        if options.shard_size is not None:
            stem = self._out.removesuffix(".rac")
            paths = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.rac" for i in range(len(shards))]
        provenance = state(
            source.kind,
            options.level,
            cut=(options.lanes, options.slices),
            settings=options.settings,
            about=None if quantiser is None else quantiser.about,
            online=sum(t.online is not None for t in tensors),
            tree=self._tree(),
        )
        workers_of = (self._threads, self._pool)
        schedule = Schedule(
            options.lossless, self._jobs, *workers_of, quantiser, self._lossless.take, self._out, near=not source.tape
        )
        if source.tape and quantiser is None:
            most = max((g.tensor.nbytes for g in self._groups), default=0)
            schedule.window, self._left = max(0, min(WINDOW, source.tape.limit) - most), list(self._groups)
        resumed, stored = 0, 0
        fidelity, entries = list[Fidelity](), list[Entry]()
        for i, (shard, path) in enumerate(zip(shards, paths, strict=True)):
            header: dict[str, Any] = {"features": [], "metadata": dict(source.metadata), "provenance": provenance}
            if len(shards) > 1:
                header["shard"] = [i + 1, len(shards)]
            contents = resume.Contents(path, header, () if i else self._files, shard)
            try:
                there, end, rows = self._write(contents, schedule, fidelity)
            except ChangedError:
                for finished in paths[:i]:
                    os.unlink(finished)
                raise
            resumed, stored = resumed + there, stored + end
            entries += rows
        lossy, bits = (0, 0.0) if quantiser is None else quantised(entries)
        return Summary(
            paths=tuple(paths),
            dense=sum(t.nbytes for t in tensors),
            stored=stored,
            weights=sum(math.prod(t.shape) for t in tensors),
            tensors=len(tensors),
            resumed=resumed,
            skipped=source.skipped,
            lost=source.lost,
            quantised=lossy,
            quantised_bits=bits,
            fidelity=tuple(fidelity),
            lossless=reasons(self._groups, quantiser.recipe.why, entries) if isinstance(quantiser, ByTrellis) else (),
            dequantised=source.dequantised,
        )

    def _write(
        self, contents: resume.Contents, schedule: Schedule, fidelity: list[Fidelity]
    ) -> tuple[int, int, list[Entry]]:
        """Write one archive: tensors that were there already, its size, its index. `fidelity` gets what is lossy."""
        options, groups, content = self._options, contents.groups, list[list[Any]]()

        def done(group: ties.Group, digest: bytes) -> None:
            t = group.tensor
            for name in (t.name, *(a for a, _ in group.aliases)):
                content.append([name, t.dtype, list(t.shape), digest])
            if self._source.tape:
                self._source.tape.release(t)
            self._hooks.progress(t.name, t.nbytes * (1 + len(group.aliases)))

        # a shard may be finished
        found = resume.scan(contents.path, contents) if options.resume and "shard" in contents.header else None
        if found and (found.files, len(found.digests)) == (len(contents.files), len(groups)):
            for group, digest in zip(groups, found.digests, strict=True):
                done(group, digest)
            self._bring(len(groups), wait=True)
            return len(groups), os.path.getsize(contents.path), found.entries
        writer = self._writer(contents.path)
        try:
            found = resume.scan(writer.part, contents) if options.resume else None
            if found:
                writer.go_on(found.entries, found.at)
                for group, digest in zip(groups, found.digests, strict=False):
                    done(group, digest)
            else:
                writer.start(contents.header)
                found = resume.Found()
            for file in contents.files[found.files :]:
                e = self._lossless.take(f"file {file.name}") or record.attachment(file)
                writer.add(RECORD_ATTACHMENT, 0, e.head, e.units, **e.row)
                writer.flush()
            start, there = len(found.digests), set(found.objects)
            self._bring(start)
            with workers.named(), contextlib.closing(schedule.run(groups[start:])) as results:
                for group, e in results:
                    if of := e.write(writer, there):
                        fidelity.append(of)
                        self._hooks.layer(of)
                    done(group, e.head["digest"])
            self._bring_rest(contents.header)
            writer.finish(index.content_digest(content))
            return start, writer.at, writer.entries
        except ChangedError:
            writer.discard()
            raise
        except MemoryError as e:
            raise OutputError("not enough memory", file=contents.path) from e
        finally:
            writer.close()

    def _writer(self, path: str) -> Writer:
        """What writes an archive: to a path, to a stream, or to standard output."""
        if path != PIPE:
            return Writer(path, self._options.force)
        name = "<stdout>" if self._stream is None else str(getattr(self._stream, "name", None) or "<stream>")
        return PipeWriter(sys.stdout.buffer if self._stream is None else self._stream, name)

    def _bring(self, done: int, wait: bool = False) -> None:
        """Let the tape begin behind the first `done` tensors of what is left; with `wait` only leave these out."""
        if self._left is not None and self._source.tape:
            self._left = self._left[done:]
            if not wait:
                self._source.tape.start([g.tensor for g in self._left], self._out)
                self._left = None

    def _bring_rest(self, header: Mapping[str, Any]) -> None:
        """With the last archive: ChangedError where a file that the tape has brought is not what it is listed as."""
        k, n = header.get("shard", (1, 1))
        if self._source.tape and k == n:
            self._source.tape.finish()


def _shards(groups: list[ties.Group], size: int | None) -> list[list[ties.Group]]:
    out: list[list[ties.Group]] = [[]]
    held = 0
    for g in groups:
        if size is not None and out[-1] and held + g.tensor.nbytes > size:
            out.append([])
            held = 0
        out[-1].append(g)
        held += g.tensor.nbytes
    return out


@dataclass(frozen=True, slots=True)
class ByTrellis:
    """Quantises by trellis/1, as a recipe says."""

    recipe: Recipe
    done: Callable[[str], Encoded | None] = lambda _: None  # gives a tensor that the search has encoded, by its name

    @property
    def about(self) -> Mapping[str, Any]:
        """The scale, and what the request states."""
        return {"bits_scale": repr(self.recipe.scale), **self.recipe.about}

    @property
    def names(self) -> Container[str]:
        """The tensors of the recipe."""
        return self.recipe.aligned

    def need(self, t: SourceTensor) -> int:
        """Bytes of memory that quantising a tensor takes, about."""
        return workers.need(t, self.recipe)

    def job(self, group: ties.Group) -> Job | Encoded:
        """What the search has kept, or measuring it, or all of the work."""
        t, only = group.tensor, workers.only(self.recipe, group.tensor.name)
        e = self.done(t.name)
        if e is None:
            return encode, (group, only)
        return (measure, (e, t, only)) if e.fidelity and math.isnan(e.fidelity.snr) else e
