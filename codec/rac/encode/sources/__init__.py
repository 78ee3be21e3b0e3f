"""What a pack reads: safetensors files, Hugging Face directories, GGUF files, arrays in memory.

Opening a source reads headers only. Tensor bytes stay where they are, as byte ranges of files that a
worker process can read by itself, until `SourceTensor.read` asks for them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rac.calibrate.text import Note
from rac.container.access import read as access_read
from rac.container.wire import MAGIC
from rac.decode.archive import access_of
from rac.encode.sources import gguf, hf, others, quantised, safetensors
from rac.encode.sources.arrays import from_arrays
from rac.encode.sources.model import Attachment, Extent, Source, SourceTensor
from rac.errors import MissingFileError, SourceError

if TYPE_CHECKING:
    from rac.container.hub import Address

__all__ = ["Attachment", "Extent", "Source", "SourceTensor", "from_arrays", "open_source", "ready"]


def _nobody(*_: object) -> None:
    """Tell nobody."""


@contextlib.contextmanager
def ready(
    path: Any,
    beside: str,
    *,
    lossy: bool = False,
    note: Note = _nobody,
    **how: Any,
) -> Iterator[tuple[Any, Source]]:
    """A source, opened for a pack, and the path by which its model can be run, if it is one.

    A lossy pack reads the source more than once: a repository of the Hub is downloaded to a temporary folder beside
    the path `beside` then, and `note` is called with (what, done, of). `how` are other arguments of `open_source`.
    """
    where = _address(path)
    if where is None or not lossy:
        source = open_source(path, dequantise=lossy, **how)
        try:
            yield path, source
        finally:
            if source.tape:
                source.tape.close()
        return
    from rac.encode.sources import hub

    with hub.downloaded(where, beside, note) as (folder, origin):
        source = open_source(folder, dequantise=lossy, **how | {"all_files": False})
        sha256 = {f: h for f, h in origin.sha256.items() if source.headers or not f.endswith(".safetensors")}
        yield folder, replace(source, hub=origin.hub, sha256=sha256, skipped=origin.skipped)


def _address(path: Any) -> Address | None:
    """What a name means on the Hub; None for what is no name of a repository, or is there as a path."""
    if not isinstance(path, str) or os.path.lexists(path):
        return None
    from rac.container import hub  # imports more than a local path needs

    where = hub.address(path)
    if where and where.file:
        raise SourceError("names a file; name the repository, hf://ORG/NAME", file=path)
    return where


def open_source(
    path: Any,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dequantise: bool = False,
    all_files: bool = False,
    pickles: bool = False,
) -> Source:
    """Open a safetensors file (by path, bytes, or a file object), a GGUF file, or a directory with safetensors files.

    Or a file of numpy, ONNX, Keras, Flax, or with `pickles` of torch (rac.encode.sources.others).
    `ORG/NAME[@REVISION]`, also behind `hf://`, is a repository of the Hub where no such path exists.
    With `all_files`, other files of any size are taken, too; else those up to 64 MB.
    With `dequantise` codes and scales are read as the numbers that they stand for (rac.encode.sources.quantised).
    `include` are patterns (fnmatch, case-sensitive) of the tensors to take, none means all; `exclude` wins over it.
    SourceError where the path is missing, damaged or no model, or a pattern leaves nothing.
    """
    named = isinstance(path, str | os.PathLike)
    where = os.path.abspath(os.fspath(path)) if named else str(getattr(path, "name", None) or "<bytes>")
    try:
        source = _held(path, where) if not named else _found(os.fspath(path), where, all_files, pickles)
    except MissingFileError:
        raise
    except FileNotFoundError as e:
        raise MissingFileError(file=e.filename or where) from e
    except OSError as e:
        raise SourceError(e.strerror or str(e), file=e.filename or where) from e
    if dequantise:
        source = quantised.logical(source, where)
        source = replace(source, every=source.tensors) if source.dequantised else source
        if source.dequantised:
            source = replace(source, sha256={f: h for f, h in source.sha256.items() if f not in source.headers})
    for pattern in include:
        if not any(t.matches(pattern) for t in source.tensors):
            raise SourceError(f"no tensor matches the include pattern {pattern!r}", file=where)
    taken = (t for t in source.tensors if not include or any(t.matches(p) for p in include))
    tensors = tuple(t for t in taken if not any(t.matches(p) for p in exclude))
    if not tensors:
        raise SourceError("no tensor is left to pack" if source.tensors else "holds no tensor", file=where)
    whole = len(tensors) == len(source.tensors)
    if whole:
        return replace(source, tensors=tensors)
    if source.tape:
        source.tape.check = False  # these files are not read whole
    sha256 = {f: h for f, h in source.sha256.items() if f not in source.headers}
    if source.frames:  # there is no file that these have places in
        tensors = tuple(replace(t, extra=None) for t in tensors)
    return replace(source, tensors=tensors, headers={}, frames={}, sha256=sha256)


def _found(path: str, where: str, all_files: bool, pickles: bool) -> Source:
    """What a path names, or a repository of the Hub."""
    address = _address(path)
    if address is not None:
        from rac.encode.sources import hub

        return hub.read(address, all_files)
    if "://" in path and not os.path.lexists(path):
        raise SourceError("only archives are read from a URL: download what is to be packed", file=path)
    if not os.path.isdir(where):
        return _file(where, pickles)
    if found := others.of_folder(where, pickles):
        return found
    source = hf.read(where, all_files, pickles)
    if "/snapshots/" in where.replace(os.sep, "/"):
        from rac.encode.sources import hub

        return hub.of_cache(where, source)
    return source


def _held(data: Any, name: str) -> Source:
    """Arrays by name, or a safetensors file whose bytes are in memory, or behind a file object, which is read whole."""
    if isinstance(data, Mapping):
        return from_arrays(data, None)
    access = access_of(data)
    raw = np.frombuffer(access_read(access, 0, access.size), np.uint8)
    if raw[:8].tobytes().startswith((MAGIC, b"GGUF")):
        raise SourceError("only the bytes of a safetensors file can be packed; name a file", file=name)
    size = safetensors.header_size(raw[:8].tobytes(), raw.size, name)
    front = raw[: 8 + size].tobytes()
    found, metadata, header = safetensors.parse(front, raw.size, name, lambda at, n: raw[at : at + n])
    return Source("safetensors", tuple(found), (), metadata, headers={"": header})


def _file(path: str, pickles: bool) -> Source:
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would wait
        raise SourceError("not a regular file", file=path)
    with open(path, "rb") as f:
        magic = f.read(9)
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".rac" or magic.startswith(MAGIC):
        raise SourceError("already a .rac archive; unpack it first", file=path)
    if magic.startswith(b"GGUF"):
        return gguf.read(path)
    if suffix != ".safetensors" and (found := others.of_file(path, magic, pickles)):
        return found
    if path.endswith(".safetensors.index.json"):
        raise SourceError("is the index of a folder's files: name the folder", file=path)
    if suffix != ".safetensors" and magic[8:] != b"{":
        raise SourceError(
            "no file of weights that rac knows (docs/compatibility.md); convert it to safetensors", file=path
        )
    tensors, metadata, header = safetensors.read(path)
    return Source("safetensors", tuple(tensors), (), metadata, headers={"": header})
