"""Packed or quantised files of a model against their original, one row for each."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.evaluate import Measure, decibels, translated
from rac.calibrate.given import Given
from rac.calibrate.text import Note
from rac.decode.archive import RacFile
from rac.decode.unpack import quantised
from rac.dequantise import SMALLEST, Dequantised, Logical, dtype_of, find, stated_in
from rac.encode.align.recipe import KEEP
from rac.encode.sources import Extent, open_source
from rac.encode.sources.tables import by_name
from rac.errors import FormatError, MismatchError, MissingDependencyError
from rac.linalg.transform import Transform, hook
from rac.provenance import Provenance
from rac.registry import DTYPES as REGISTERED
from rac.registry import RECORD_TENSOR
from rac.stages.words import DTYPES, from_words
from rac.study.contents import begins_as_archive, dense
from rac.tensor import extra_of

Floats = NDArray[np.float32]
Within = Callable[[Any, Provenance], contextlib.AbstractContextManager[Any]]
"""Called with a file's model and what is known of the file's making; entered while the model predicts."""
Ways = Sequence[Within | None]
Path = str | os.PathLike[str]
Files = Sequence[Path]


@dataclass(frozen=True, slots=True)
class Row:
    """One file of a comparison. Ratios are in dB; None is no error at all, or, of the last four, not measured."""

    file: str
    size: int  # bytes on disk: all shards, and the files that travel along
    bits: float  # bits on disk per weight: `size` * 8 / all weights
    quantised_bits: float | None  # bytes of the quantised matrices * 8 / their weights; None where there are none
    snr: float | None  # energy of the matrices of the original to that of their error, over all
    weighted_snr: float | None = None  # of the outputs: sum tr(W S W') / sum tr(E S E'), S moments on the text
    kl: float | None = None  # KL(original || file) per token, nats, mean over all positions
    top1: float | None = None  # share of positions where both predict the same token
    perplexity: float | None = None  # over all positions but the last of each window
    turned: bool = False  # whether the model was transformed, its weights in other coordinates: no SNR is measured


@dataclass(slots=True)
class _File:
    """The content of a file: its floating-point tensors under all their names, read when called."""

    path: str
    kind: str
    size: int = 0
    floats: dict[str, Callable[[], Floats]] = field(default_factory=dict)
    matrices: list[str] = field(default_factory=list)
    quantised_bits: float | None = None
    tied: bool | None = None  # whether its configuration ties output layer and embedding; None: it has none
    about: Provenance = field(default_factory=Provenance)  # the provenance of an archive
    maps: dict[str, Transform] | None = None  # online transforms of tensors that were read; None: they are folded
    weights: int = 0
    blocks: list[tuple[int, int]] = field(default_factory=list)  # (bytes, weights) of matrices of GGUF blocks
    given: Given | None = None  # the weights of a folder, where its files hold codes and scales

    def add(self, name: str, dtype: str, shape: tuple[int, ...], size: int, extra: Any, read: Any) -> None:
        """Take in a tensor of `size` stored bytes, 0 of an alias; `extra` says what GGUF blocks the bytes of U8 are."""
        blocks = extra.get("gguf") if dtype == "U8" else None
        if isinstance(blocks, dict):
            shape = tuple(int(n) for n in blocks.get("shape", shape))
            self.floats[name] = partial(_numbers_of, read, str(blocks.get("type")), shape)
        elif dtype in DTYPES or dtype == "F64":
            self.floats[name] = lambda: read().astype(np.float32)
        n, kept = math.prod(shape), by_name(name, shape) or any(fnmatchcase(name, p) for p in KEEP)
        linear = len(shape) >= 2 and n >= SMALLEST and not kept
        if linear and name in self.floats:
            self.matrices.append(name)
        self.weights += n
        if size and blocks and linear:
            self.blocks.append((size, n))

    def row(self, ratio: float | None) -> Row:
        """What is known of the file before it predicts anything."""
        bits, turned = self.quantised_bits, self.about.transformed
        if bits is None and self.blocks:
            bits = 8 * sum(size for size, _ in self.blocks) / sum(n for _, n in self.blocks)
        return Row(self.path, self.size, 8 * self.size / max(1, self.weights), bits, ratio, turned=turned)


@dataclass(frozen=True, slots=True)
class Reading:
    """A text that the models predict."""

    text: str
    tokens: int = 8192  # most of its tokens
    context: int = 1024  # tokens of one window; what is left behind the last whole window is not measured
    snr: bool = False  # whether the weighted SNR is measured too, which takes one more pass of the original


def compare(
    original: Path,
    files: Files,
    reading: Reading | None = None,
    note: Note | None = None,
    within: Ways = (None,),
    pickles: bool = False,
) -> Iterator[Row]:
    """Rows for the original, whatever can be packed, and for each file of any such kind, as they are found.

    With `reading` the original is the Hugging Face folder of a causal language model, and predictions are measured.
    `note` is called with a model's name, windows done, and all of them. `within` are ways in which the model of each
    file predicts, not that of the original, a row for each: None as it is; others, such as simulated activations, are
    called with the model, whose layers then apply the online transforms that are folded into the weights otherwise.
    `pickles` allows weights that torch pickled. MismatchError where a file lacks a tensor of the original, or has it in
    another shape.
    """
    for file in files if reading is not None else ():  # before the original is run
        with _opened(os.fspath(file), pickles=pickles):
            pass
    with _opened(os.fspath(original), pickles=pickles) as ours:
        measure = None
        if reading is not None:
            measure = Measure(ours.given or original, reading.text, reading.tokens, reading.context, note)
            if reading.snr:
                measure.moments()
        yield _row(ours.row(None), measure, None)
        for file in files:
            name = os.fspath(file)
            ratio: float | None = None
            for i, way in enumerate(within):
                with _opened(name, way is not None, pickles) as theirs:
                    if theirs.kind == "gguf" and not ours.floats.keys() & theirs.floats.keys():
                        theirs.floats = translated(name)
                    if not i and not theirs.about.transformed:
                        ratio = _snr(ours, theirs)
                    yield _row(theirs.row(ratio), measure, theirs, way)


def _row(row: Row, measure: Measure | None, file: _File | None, within: Within | None = None) -> Row:
    """The row with what `measure` finds for a file, or for the original."""
    if measure is None:
        return row
    model = None
    if file is not None:
        model = measure.load({name: read() for name, read in file.floats.items()}, row.file, file.tied)
    around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if file is not None and model is not None and within is not None:
        for name, online in (file.maps or {}).items():
            hook(model.get_submodule(name.removesuffix(".weight")), online)
        around = within(model, file.about)
    with around:
        found = measure.figures(model, row.file)
    weighted = measure.weighted_snr(model) if file is not None and not row.turned else None
    return replace(row, weighted_snr=weighted, kl=found.kl, top1=found.top1, perplexity=found.perplexity)


def _snr(ours: _File, theirs: _File) -> float | None:
    """Signal to noise over all matrices of the original, in dB; None where there is no error."""
    energy = error = 0.0
    for name in ours.matrices:
        if name not in theirs.floats:
            raise MismatchError(f"holds no tensor {name!r} of numbers, which the original has", file=theirs.path)
        a, b = ours.floats[name](), theirs.floats[name]()
        if a.shape != b.shape:
            what = f"tensor {name!r} is {list(b.shape)}, the original has {list(a.shape)}"
            raise MismatchError(what, file=theirs.path)
        energy += float(np.square(a, dtype=np.float64).sum())
        error += float(np.square(a - b, dtype=np.float64).sum())
    return decibels(energy, error)


@contextlib.contextmanager
def _opened(path: str, mapped: bool = False, pickles: bool = False) -> Iterator[_File]:
    """The content of a .rac file (all shards of it), or of anything that can be packed."""
    if begins_as_archive(path):
        with RacFile(path) as archive:
            yield _of_archive(archive, path, {} if mapped else None)
    else:
        yield _of_source(path, pickles)


def _of_archive(f: RacFile, path: str, maps: dict[str, Transform] | None) -> _File:
    size = sum(archive.access.size for archive in f.archives)
    out = _File(path, "rac", size, about=Provenance.of(f.archives[0].header, path), maps=maps)
    stated: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        stated = json.loads(f.attachment("config.json")) if "config.json" in f.attachments() else {}
        out.tied = stated.get("tie_word_embeddings")
    codes, gone = _codes(f, stated, path)
    for archive in f.archives:
        for e in archive.index.entries:
            if e.type == RECORD_TENSOR:
                extra = archive.record(e).head.get("extra", {}) if e.dtype == "U8" else {}
                for name in (n for n in e.names if n not in gone):
                    size, read = e.size if name == e.name else 0, partial(_unmapped, f, name, maps)
                    out.add(name, e.dtype, e.shape, size, extra_of(extra, name), read)
    count, bits = quantised(e for archive in f.archives for e in archive.index.entries)
    out.quantised_bits = bits if count else None
    for one in codes:
        whole = Dequantised(one.rows, dtype_of(stated), math.prod(one.shape[:-1]), one.shape[-1])
        out.add(one.name, whole.dtype, one.shape, 0, {}, partial(_made, whole, one.shape))
    return out


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of an archive that holds what another tool has quantised."""

    file: RacFile
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """All its bytes."""
        return math.prod(self.shape) * REGISTERED[self.dtype].bits // 8

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop)."""
        found = np.ascontiguousarray(self.file.read(self.name)[1]).reshape(-1).view(np.uint8)
        return found[start:stop]  # type: ignore[no-any-return]


def _codes(f: RacFile, config: dict[str, Any], path: str) -> tuple[list[Logical], set[str]]:
    """The matrices that codes in an archive stand for, and the tensors that they take the place of."""
    every = (e for archive in f.archives for e in archive.index.entries if e.type == RECORD_TENSOR)
    return find({n: _Stored(f, n, e.dtype, e.shape) for e in every for n in e.names}, stated_in(config), path)


def _made(whole: Dequantised, shape: tuple[int, ...]) -> Floats:
    return from_words(whole.read(0, whole.size).view("<u2"), whole.dtype).reshape(shape)


def _unmapped(f: RacFile, name: str, maps: dict[str, Transform] | None) -> NDArray[Any]:
    """A tensor, the online transform of its layer folded into it, or put apart."""
    stated, found = f.read(name)
    online = f.online(name) if stated.online else None
    if online is not None and maps is not None:
        maps[name] = online
    elif online is not None:
        found = online.fold(found.astype(np.float32))
    return found  # type: ignore[no-any-return]


def _of_source(path: str, pickles: bool) -> _File:
    source = open_source(path, pickles=pickles)
    parts = [*(t.data for t in source.tensors), *(a.data for a in source.attachments)]
    files = {part.path: part for part in parts if isinstance(part, Extent)}
    out = _File(path, source.kind, sum(part.whole for part in files.values()))
    if source.kind != "gguf":  # its blocks are read as numbers below
        source = open_source(path, dequantise=True, pickles=pickles)
        out.given = Given.of(path, source.every) if source.dequantised else None
    for t in source.tensors:
        out.add(t.name, t.dtype, t.shape, t.nbytes, t.extra or {}, partial(dense, t))
    return out


def _numbers_of(read: Callable[[], NDArray[Any]], kind: str, shape: tuple[int, ...]) -> Floats:
    """Numbers of GGUF blocks."""
    try:
        import gguf
    except ImportError as e:
        raise MissingDependencyError("GGUF tensors need `pip install rac-codec[gguf]`") from e
    try:
        out: Floats = gguf.quants.dequantize(read(), gguf.GGMLQuantizationType[kind]).reshape(shape)
    except (KeyError, ValueError, NotImplementedError) as e:
        raise FormatError(f"GGUF blocks of type {kind!r} cannot be read: {e}") from e
    return out
