"""An archive back to the files that it was packed from."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import posixpath
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, BinaryIO

from rac import system
from rac.container.output import PART, destination, part
from rac.container.reader import Archive
from rac.decode import random, zips
from rac.decode.archive import RacFile
from rac.decode.slices import in_bands
from rac.decode.spool import at_random
from rac.errors import FormatError, NameNotFoundError, OutputError
from rac.linalg.transform import describe
from rac.machine import threads_of
from rac.native.prototypes import Array
from rac.provenance import Provenance, frame_name, header_name, piece_name
from rac.records import Entry
from rac.registry import DTYPES, RECORD_OBJECT, RECORD_TENSOR
from rac.stages.table import is_quantised
from rac.tensor import Tensor, extra_of

Progress = Callable[[str, int], None]
GGUF_HEADER = "gguf.header"
AT_ONCE = 64  # files that are open
LARGE = 1 << 28  # bytes of a tensor from which on it is written as it is decoded, and never in memory as a whole
LIBRARIES = ("npy", "npz", "onnx", "torch", "keras", "flax", "dcp")
"""Kinds of sources that are files of other libraries."""
FILES = (".npy", ".npz", ".onnx", ".pt", ".pth", ".bin", ".h5", ".keras", ".msgpack", ".rac")
"""Endings that are no names of folders to be made."""


@dataclass
class File:
    """One file of tensors."""

    name: str  # below the folder, as the archive has it
    path: str
    head: bytes = b""
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size of the bytes of each tensor
    end: int = 0
    around: list[tuple[int, bytes]] = field(default_factory=list)  # what else is written, and where
    lossy: list[tuple[int, int]] = field(default_factory=list)  # places of tensors that are not those of the source

    @property
    def zipped(self) -> bool:
        """Whether it is a zip file, and so has checksums of its tensors."""
        return any(at == 0 and piece.startswith(b"PK\3\4") for at, piece in self.around)

    def cut(self) -> None:
        """Take the head for a frame: the size of the file, and its bytes around the tensors. Or FormatError."""
        self.end, rest, at = int.from_bytes(self.head[:8], "little"), memoryview(self.head)[8:], 0
        self.head = b""
        for begin, size in [*sorted(self.places.values()), (self.end, 0)]:
            if begin < at or begin - at > len(rest):
                raise FormatError(f"the frame of {self.name!r} does not fit its tensors")
            self.around.append((at, bytes(rest[: begin - at])))
            rest, at = rest[begin - at :], begin + size
        if rest or at != self.end:
            raise FormatError(f"the frame of {self.name!r} does not fit its tensors")


def unpack(
    src: Any,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    online: Callable[[str, str], None] | None = None,
    only: Sequence[str] = (),
) -> list[str]:
    """Unpack to a folder, or to the one file that `out` names (by its ending); returns the paths written.

    Tensors come back bit for bit, attachments byte for byte. A sharded Hugging Face model gets its shards again, a
    GGUF model its GGUF file, a file of another library that file, byte for byte, where the archive has its frame, and a
    safetensors file otherwise. What is written is the content of the file: where the layer of a weight needs an online
    transform (format_spec/stages/online.md), which these files cannot state, `online` is called with the name of the
    tensor and what the transform is; without `online` there is one warning for all of them.

    `src` is a path, a URL, bytes, a file object, or "-" for standard input; what cannot be read at random is kept in an
    unnamed file beside `out` meanwhile. `only` are names or patterns (fnmatch) of files: no others are written.

    Raises:
        RacError: The archive is damaged, a name of `only` is not there, or the output exists or cannot be written.
    """
    target = os.fspath(out)
    with at_random(src, target) as source, RacFile(source, threads=threads) as f:
        chosen = _Chosen.of(f, target, only)
        places = [destination(path, force) for path in chosen.paths]
        for o, place in zip(chosen.outputs, places, strict=False):
            o.path = place
        made = not os.path.exists(target)
        try:
            needed = _write(f, chosen.outputs, threads_of(threads), progress)
            for name, place in zip(chosen.files, places[len(chosen.outputs) :], strict=True):
                os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
                write_file(place, f, name)
            _make(target, chosen.folders, chosen.links, force)
            made = False
        except OSError as e:
            why = "no space left" if e.errno == errno.ENOSPC else e.strerror or str(e)
            raise OutputError(why, file=e.filename or target) from e
        finally:
            _clear(places, target if made else None)
    for name, about in needed.items():
        if online is None:
            what = f"rac: {len(needed)} tensors are unpacked whose layers need an online transform, {name!r} for one: "
            warnings.warn(what + about, stacklevel=2)
            break
        online(name, about)
    return chosen.paths


@dataclass
class _Chosen:
    """What is unpacked, and where to."""

    outputs: list[File]
    files: list[str]  # attachments, and files that are stored in pieces
    folders: list[str]
    links: Mapping[str, str]
    paths: list[str]  # of the outputs, and then of the files

    @classmethod
    def of(cls, f: RacFile, target: str, only: Sequence[str]) -> _Chosen:
        """Everything, or what `only` names; NameNotFoundError where it names nothing."""
        outputs, archive = planned(f, target), f.archives[0].access.name
        origin = Provenance.of(f.archives[0].header, archive)
        single = target.endswith((".safetensors", ".gguf")) or (framed(f, target) and _one_file(origin.frames, target))
        if single and only:
            raise OutputError("is one file; name a folder to write chosen files to", file=target)
        if not single and target.lower().endswith(FILES) and not os.path.isdir(target):
            ending = os.path.splitext(target)[1]
            what = f"the archive does not hold one {ending} file; name a folder, or a file that ends in .safetensors"
            raise OutputError(what, file=target)
        files = [] if single else [*names_of_files(f), *origin.pieces]
        folders, links = ([], {}) if single or only else (list(origin.folders), checked_links(origin.links))
        if only:
            links = checked_links(origin.links)
            taken = _named([*(o.name for o in outputs), *files], links, only, archive)
            outputs, files = [o for o in outputs if o.name in taken], [n for n in files if n in taken]
            links = {n: to for n, to in links.items() if n in taken}
        folders = [os.path.join(target, *safe_name(n).split("/")) for n in folders]
        paths = [o.path for o in outputs] + [os.path.join(target, *safe_name(n).split("/")) for n in files]
        if len(set(map(os.path.normcase, paths))) != len(paths):
            raise FormatError("an attachment has the name of a weight file", file=archive)
        return cls(outputs, files, folders, links, paths)


def _named(names: Sequence[str], links: Mapping[str, str], only: Sequence[str], archive: str) -> set[str]:
    """Those of the files and links that a pattern matches, and the files that these links lead to."""
    taken = set[str]()
    for pattern in only:
        found = {n for n in (*names, *links) if n == pattern or fnmatchcase(n, pattern)}
        if not found:
            some = ", ".join(sorted([*names, *links])[:8]) + (", ..." if len(names) + len(links) > 8 else "")
            raise NameNotFoundError(f"holds no file {pattern!r}; it has {some}", file=archive)
        taken |= found
    for name in [n for n in taken if n in links]:
        for _ in links:  # a link may lead to a link
            if name in links:
                name = posixpath.normpath(posixpath.join(posixpath.dirname(name), links[name]))
                taken.add(name)
    return taken


def _clear(places: Sequence[str], target: str | None) -> None:
    """Take parts away, and the folders below `target` that were made for files that did not come."""
    for leftover in (p + PART for p in places):
        if os.path.lexists(leftover):
            os.unlink(leftover)
    for folder, _, _ in os.walk(target, topdown=False) if target else ():
        if not os.listdir(folder):
            os.rmdir(folder)


def names_of_files(f: RacFile) -> list[str]:
    """Names of the attachments that are files of the source, each whole."""
    origin = Provenance.of(f.archives[0].header, f.archives[0].access.name)
    others = {GGUF_HEADER, *map(header_name, origin.headers)}
    others |= set(map(frame_name, origin.frames))
    others |= {piece_name(file, i) for file, n in origin.pieces.items() for i in range(min(n, len(f.attachments())))}
    return [n for n in f.attachments() if n not in others]


def write_file(path: str, f: RacFile, name: str) -> None:
    """Write an attachment, or a file that is stored in several; it gets its name when it is whole."""
    pieces = Provenance.of(f.archives[0].header, f.archives[0].access.name).pieces
    with part(path) as file:
        file.truncate(0)
        for n in (piece_name(name, i) for i in range(pieces[name])) if name in pieces else [name]:
            file.write(f.attachment(n))
    os.replace(path + PART, path)  # closed before: Windows renames nothing that is open


def checked_links(links: Mapping[str, str]) -> Mapping[str, str]:
    """The links; FormatError for one that could lead out of the folder.

    A target goes up first and then down, to a place inside, and no link lies below another one: what is meant by its
    words is then where it leads.
    """
    for name, to in links.items():
        parts, down = safe_name(name).split("/")[:-1], to.split("/")
        while down and down[0] == ".." and parts:
            parts, down = parts[:-1], down[1:]
        below = any("/".join(name.split("/")[:i]) in links for i in range(1, name.count("/") + 1))
        if below or not down or {"", ".", ".."} & set(down) or set("\\:\0") & set(to):
            raise FormatError(f"the link {name!r} to {to!r} is not allowed")
    return links


def _make(target: str, folders: Iterable[str], links: Mapping[str, str], force: bool) -> None:
    """Make folders, and links inside `target`."""
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    for name, to in links.items():
        path = os.path.join(target, *name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if force and os.path.islink(path):
            os.unlink(path)
        system.link(to, path)


def safe_name(name: str) -> str:
    """The name of a file below the target folder; FormatError for one that leads out of it."""
    if {"", ".", ".."} & set(name.split("/")) or set("\\:\0") & set(name) or name.endswith(".part"):
        raise FormatError(f"the file name {name!r} is not allowed")
    if system.unusable(name):
        raise OutputError(f"no file of this system can be called {name!r}; unpack it on another one")
    return name


def _tensors(f: RacFile) -> list[tuple[Archive, Entry]]:
    return [(a, e) for a in f.archives for e in a.index.entries if e.type == RECORD_TENSOR]


def planned(f: RacFile, target: str = "") -> list[File]:
    """The files that hold the tensors where an archive is unpacked to `target`, and the place of each tensor there."""
    origin = Provenance.of(f.archives[0].header, f.archives[0].access.name)
    gguf = GGUF_HEADER in f.attachments()
    if target.endswith(".gguf") or (gguf and not target.endswith(".safetensors") and origin.whole):
        if not gguf or not origin.whole:
            raise OutputError("the archive does not hold a whole GGUF model; unpack to .safetensors", file=target)
        path = target if target.endswith(".gguf") else os.path.join(target, "model.gguf")
        return [_plan_gguf(f, File("model.gguf", path, f.attachment(GGUF_HEADER)))]
    if framed(f, target):
        return _plan_framed(f, origin, target)
    whole = not target.endswith(".safetensors")
    rows: dict[str, dict[str, tuple[str, Entry]]] = {}
    for archive, e in _tensors(f):
        extra = archive.record(e).head.get("extra", {}) if whole and origin.source == "hf" and not origin.frames else {}
        for name in (e.name, *(a for a, _ in e.aliases)):
            where, inside = place(name, extra_of(extra, name))
            file = rows.setdefault(where, {})
            if inside == "__metadata__" or inside in file:
                raise OutputError(f"no safetensors file can hold a tensor {name!r}, or two of them", file=target)
            file[inside] = name, e
    out = []
    for name, found in (rows or {"model.safetensors": {}}).items():
        path = os.path.join(target, *safe_name(name).split("/")) if whole else target
        key = "" if origin.source == "safetensors" else name
        if key in origin.headers and (whole or not key):
            head = f.attachment(header_name(key))
        else:
            head = safetensors_header(((n, e.dtype, e.shape) for n, (_, e) in found.items()), f.metadata())
        out.append(_plan_safetensors(File(name, path, head, end=len(head)), found))
    return out


def weights(e: Entry) -> int:
    """Elements of the tensor of an index row; 0 for other rows."""
    return math.prod(e.shape) if e.type == RECORD_TENSOR else 0


def quantised(entries: Iterable[Entry]) -> tuple[int, float]:
    """Number of quantised tensors, and bits of their records, and of objects, which they use, over their weights."""
    mine = [e for e in entries if e.type == RECORD_OBJECT or is_quantised(e.method)]
    tensors = sum(e.type == RECORD_TENSOR for e in mine)
    return tensors, 8 * sum(e.size for e in mine) / max(1, sum(map(weights, mine))) if tensors else 0.0


def _size(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * (DTYPES[dtype].bits if dtype in DTYPES else 8) // 8


def tensor_bytes(e: Entry) -> int:
    """Dense bytes of a tensor under all its names."""
    return _size(e.dtype, e.shape) * (1 + len(e.aliases))


def place(name: str, extra: Mapping[str, Any]) -> tuple[str, str]:
    """The safetensors file that a tensor belongs to, as what it carries says, and its name there."""
    return str(extra.get("shard", "model.safetensors")), str(extra.get("name", name))


def usual_headers(
    tensors: Iterable[tuple[str, Mapping[str, Any], str, Sequence[int]]], metadata: Mapping[str, str]
) -> dict[str, bytes]:
    """Header of each file where none is stored, from (name, what it carries, dtype, shape) in the order of records."""
    rows: dict[str, list[tuple[str, str, Sequence[int]]]] = {}
    for name, extra, dtype, shape in tensors:
        file, inside = place(name, extra)
        rows.setdefault(file, []).append((inside, dtype, shape))
    return {file: safetensors_header(found, metadata) for file, found in rows.items()}


def safetensors_header(rows: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes in front of tensors, given as (name, dtype, shape) in their order, as the library writes them."""
    head: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape in rows:
        size = _size(dtype, shape)
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _plan_safetensors(out: File, rows: Mapping[str, tuple[str, Entry]]) -> File:
    """A file and its places; `rows` has, by the names there, those of the archive and index rows."""
    path, head = out.path, out.head
    try:
        stated = json.loads(head[8:])
        stated.pop("__metadata__", None)
        offsets = sorted((*info["data_offsets"], name) for name, info in stated.items())
        same = stated.keys() == rows.keys() and all(
            (stated[name]["dtype"], stated[name]["shape"]) == (e.dtype, list(e.shape)) for name, (_, e) in rows.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise FormatError(f"the stored header of {os.path.basename(path)!r} is malformed") from e
    for start, stop, name in offsets if same else [(-1, -1, next(iter(rows)))]:
        size = _size(rows[name][1].dtype, rows[name][1].shape)
        if (start, stop) != (out.end - len(head), out.end - len(head) + size):
            raise FormatError(f"the stored header of {os.path.basename(path)!r} is not that of its tensors")
        out.places[rows[name][0]] = out.end, size
        out.end += size
    return out


def framed(f: RacFile, target: str) -> bool:
    """Whether the files that are written are those of another library, which the archive has the frames of.

    Not those of torch.distributed with other numbers: their checksums are those of many zip files in one.
    """
    origin = Provenance.of(f.archives[0].header, f.archives[0].access.name)
    if not origin.frames or not origin.whole or target.endswith(".safetensors"):
        return False
    return origin.source != "dcp" or not any(is_quantised(e.method) for _, e in _tensors(f))


def _one_file(frames: Sequence[str], target: str) -> bool:
    """Whether `target` is the name of the only file, and not of a folder for it."""
    return len(frames) == 1 and target.endswith(os.path.splitext(frames[0])[1] or os.sep)


def _plan_framed(f: RacFile, origin: Provenance, target: str) -> list[File]:
    """The files of the source: frames, and tensors at the places that they state."""
    out = {}
    for file in origin.frames:
        single = _one_file(origin.frames, target)
        path = target if single else os.path.join(target, *safe_name(file).split("/"))
        out[file] = File(file, path, f.attachment(frame_name(file)))
    for archive, e in _tensors(f):
        extra = archive.record(e).head.get("extra", {})
        for name in (e.name, *(a for a, _ in e.aliases)):
            own = extra_of(extra, name)
            if "at" in own:
                at, file = own["at"], str(own.get("shard"))
                if file not in out or type(at) is not int:
                    raise FormatError("states no place in a file of the source", unit=repr(name))
                out[file].places[name] = at, _size(e.dtype, e.shape)
    for o in out.values():
        o.cut()
    return list(out.values())


def _plan_gguf(f: RacFile, out: File) -> File:
    align = f.metadata().get("gguf.alignment", "32")
    step = int(align) if align.isdecimal() and 0 < int(align) <= 1 << 20 else 32
    where = {name: e for _, e in _tensors(f) for name in (e.name, *(a for a, _ in e.aliases))}
    out.end = len(out.head)
    for name in Provenance.of(f.archives[0].header, f.archives[0].access.name).gguf_order(where):
        size = _size(where[name].dtype, where[name].shape)
        out.places[name] = out.end, size
        out.end += size
        out.end += -out.end % step
    return out


def _decoded(
    archive: Archive, entries: Sequence[Entry], threads: int, put: Callable[[Tensor, int, Array], None]
) -> Iterator[Tensor]:
    """The tensors of rows of the index, in order; `put` gets each, or pieces of a large one with their offsets."""
    for large, some in itertools.groupby(entries, lambda e: _size(e.dtype, e.shape) >= LARGE):
        if not large:
            for t, words in random.load(archive, [*some], threads):
                put(t, 0, words)
                yield t
                del words
            continue
        for e in some:
            t = random.parse(archive, archive.record(e))
            in_bands(archive, t, threads, partial(put, t))
            yield t


class _Parts:
    """The files that are being written, under the names of parts; few of them are open at a time."""

    def __init__(self, outputs: Sequence[File]) -> None:
        """Begin each: its size, and what is not a tensor of it."""
        self.where = {name: o for o in outputs for name in o.places}
        self._open: dict[str, BinaryIO] = {}
        self._lock = threading.Lock()
        for o in outputs:
            os.makedirs(os.path.dirname(o.path) or ".", exist_ok=True)
            with part(o.path) as file:
                file.truncate(0)
                file.write(o.head)
                file.truncate(o.end)
                for at, piece in o.around:
                    file.seek(at)
                    file.write(piece)

    def put(self, t: Tensor, at: int, words: Array) -> None:
        """Write words of a tensor, at an offset in it, into each file that has it; threads may."""
        for name in (n for n in t.names if n in self.where):
            o = self.where[name]
            offset, size = o.places[name]
            if t.nbytes != size:
                raise FormatError("the record is not the one that the index names", unit=repr(name))
            with self._lock:
                file = self._file(o)
                file.seek(offset + at)
                file.write(words.data.cast("B") if words.size else b"")

    def _file(self, o: File) -> BinaryIO:
        if o.path not in self._open:
            if len(self._open) == AT_ONCE:
                self._open.pop(next(iter(self._open))).close()
            self._open[o.path] = part(o.path)
        return self._open[o.path]

    def finish(self, o: File) -> None:
        """Bring a file to the disk, and give it its name."""
        file = self._file(o)
        if o.zipped and o.lossy:
            zips.mend(file, o.lossy)
        file.flush()
        os.fsync(file.fileno())
        self._open.pop(o.path).close()
        os.replace(o.path + PART, o.path)

    def close(self) -> None:
        """Close what is open."""
        for file in self._open.values():
            file.close()


def _write(f: RacFile, outputs: list[File], threads: int, progress: Progress | None) -> dict[str, str]:
    """Write all tensors; returns those whose layers need an online transform, and what that is."""
    online: dict[str, str] = {}
    with closing(_Parts(outputs)) as parts:
        for archive in f.archives:
            rows = (e for e in archive.index.entries if e.type == RECORD_TENSOR)
            entries = [e for e in rows if not parts.where.keys().isdisjoint(e.names)]
            for t in _decoded(archive, entries, threads, parts.put):
                for name in (n for n in t.names if n in parts.where):
                    if t.quantised:
                        parts.where[name].lossy.append(parts.where[name].places[name])
                    if t.online:
                        online[name] = describe(t.online, t.shape[1])
                if progress:
                    progress(t.name, t.nbytes)
        for o in outputs:
            parts.finish(o)
    return online
