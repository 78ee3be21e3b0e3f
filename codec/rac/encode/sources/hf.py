"""Hugging Face directories: safetensors files, their index, and the small files beside them."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from rac.encode.sources import safetensors
from rac.encode.sources.model import PICKLES, REFUSE_PICKLE, Attachment, Extent, Source, SourceTensor
from rac.encode.sources.tables import marked
from rac.errors import SourceError
from rac.provenance import piece_name

MAX_ATTACHMENT = 64 << 20
_INDEX = ".safetensors.index.json"
_BOOKS = (".git", ".cache")  # directories of what downloaded the model


@dataclass
class Tree:
    """What lies below a directory, by relative POSIX names."""

    files: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    """Links to files inside the directory, which stay links; others are files."""
    folders: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class Place(Protocol):
    """Where the files of a tree are."""

    @property
    def name(self) -> str:
        """What all of it is called in messages."""

    @property
    def refusal(self) -> str:
        """What is said where all weights are pickled."""

    def path(self, file: str) -> str:
        """The name of a file for messages."""

    def size(self, file: str) -> int:
        """Its bytes."""

    def content(self, file: str) -> bytes:
        """All its bytes."""

    def data(self, file: str, at: int, size: int) -> Extent | bytes:
        """Some of its bytes, to be read later."""

    def weights(self, file: str, extra: dict[str, Any] | None) -> tuple[list[SourceTensor], dict[str, str], bytes]:
        """Tensors, metadata and header of a safetensors file, as `safetensors.read` gives them."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A place on a disk."""

    name: str
    refusal: ClassVar[str] = REFUSE_PICKLE

    def path(self, file: str) -> str:
        """Its path."""
        return os.path.join(self.name, file)

    def size(self, file: str) -> int:
        """Its bytes."""
        return os.path.getsize(self.path(file))

    def content(self, file: str) -> bytes:
        """All its bytes."""
        with open(self.path(file), "rb") as f:
            return f.read()

    def data(self, file: str, at: int, size: int) -> Extent:
        """Some of its bytes."""
        return Extent(self.path(file), at, size)

    def weights(self, file: str, extra: dict[str, Any] | None) -> tuple[list[SourceTensor], dict[str, str], bytes]:
        """What a safetensors file holds."""
        return safetensors.read(self.path(file), extra)


def walk(root: str) -> Tree:
    """What lies below a directory; links to directories are not followed."""
    out, inside = Tree(), os.path.realpath(root) + os.sep

    def fail(e: OSError) -> None:
        raise e

    for folder, below, files in os.walk(root, onerror=fail):
        prefix = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        out.skipped += [prefix + d + "/" for d in below if d in _BOOKS]
        below[:] = [d for d in below if d not in _BOOKS]
        if not below and not files and prefix:
            out.folders.append(prefix[:-1])
        for file in files:
            path, name = os.path.join(folder, file), prefix + file
            if not os.path.exists(path):
                raise SourceError("symbolic link to nothing; is the download complete?", file=path)
            try:
                name.encode()
            except UnicodeEncodeError as e:
                raise SourceError(f"file name {name!a} is not UTF-8", file=root) from e
            to = os.readlink(path).replace(os.sep, "/") if os.path.islink(path) else "/"
            if not to.startswith("/") and os.path.realpath(path).startswith(inside):
                out.links[name] = to
            elif os.path.isfile(path):
                out.files.append(name)
    out.files.sort()
    return out


def _weight_map(place: Place, files: Sequence[str]) -> dict[str, str]:
    """Tensor name to shard, as the index of the directory states; empty without an index."""
    indexes = [f for f in files if f.endswith(_INDEX) and "/" not in f]
    if not indexes:
        return {}
    if len(indexes) > 1:
        raise SourceError(f"more than one index: {', '.join(indexes)}", file=place.name)
    path = place.path(indexes[0])
    weight_map = safetensors.parse_json(place.content(indexes[0]), "safetensors index", path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not safetensors.is_text_map(weight_map):
        raise SourceError("safetensors index has no weight_map of tensor names to files", file=path)
    if missing := set(weight_map.values()) - {f for f in files if f.lower().endswith(".safetensors")}:
        raise SourceError(f"shard {min(missing)!r} is missing", file=path)
    return weight_map


def _weights(tree: Tree) -> list[str]:
    """Names of the safetensors files: those that say so, and those that a link calls so (`blobs/` of a Hub cache)."""
    linked = set()
    for name in (n for n in tree.links if n.lower().endswith(".safetensors")):
        for _ in tree.links:  # a link may lead to a link
            if name in tree.links:
                name = posixpath.normpath(posixpath.join(posixpath.dirname(name), tree.links[name]))
        linked.add(name)
    return [f for f in tree.files if f.lower().endswith(".safetensors") or f in linked]


def read(root: str, all_files: bool = False, pickles: bool = False) -> Source:
    """A directory, with all its safetensors files (see `assemble`), or with `pickles` those that torch pickled."""
    place, tree = Folder(root), walk(root)
    if not pickles or _weights(tree):
        return assemble(place, tree, all_files)
    from rac.encode.sources.others import folder

    if not (files := folder.weights(tree.files)):
        return assemble(place, tree, all_files)
    source = folder.read(root, files)
    sizes = {f: place.size(f) for f in sorted(set(tree.files) - set(files))}
    whole, pieces, skipped = _others(place, sizes, all_files)
    tensors = marked(source.tensors, whole)
    return replace(
        source,
        tensors=tensors,
        every=tensors,
        attachments=whole,
        skipped=(*tree.skipped, *skipped),
        links=tree.links,
        folders=tuple(sorted(tree.folders)),
        pieces=pieces,
    )


def assemble(place: Place, tree: Tree, all_files: bool = False) -> Source:
    """The files of a tree as a source; with `all_files` those of any size, large ones in pieces.

    The names of the model come first: those of the files that its index lists, or of `model.safetensors`. A tensor of
    a file beside these, or one whose name another has already, is called `FILE::NAME` in the archive.
    """
    weight_map = _weight_map(place, tree.files)
    listed = set(weight_map.values()) or {"model.safetensors"}
    files = sorted(_weights(tree), key=lambda f: (f not in listed, "/" in f, f))
    if not files:
        graphs = any(f.endswith(".onnx") for f in tree.files)  # whose data may lie beside them, in files of any name
        if any(f.lower().endswith(PICKLES) and not (graphs and "pytorch_model" not in f) for f in tree.files):
            raise SourceError(place.refusal, file=place.name)
        known = (".gguf", ".rac", ".onnx", ".npz", ".npy", ".weights.h5", ".h5", ".keras", ".msgpack")
        named = [f for kind in known for f in tree.files if f.lower().endswith(kind)]
        other = f"; name the {os.path.splitext(named[0])[1]} file itself ({named[0]})" if named else ""
        raise SourceError(f"no *.safetensors file in this directory{other}", file=place.name)
    owner: dict[str, str] = {}
    tensors: list[SourceTensor] = []
    metadata: dict[str, str] = {}
    headers = {}
    for file in files:
        found, meta, headers[file] = place.weights(file, None if files == ["model.safetensors"] else {"shard": file})
        beside = files[0] in listed and file not in listed and "/" not in file
        for t in found:
            name = f"{file}::{t.name}" if beside or t.name in owner else t.name
            if weight_map and file in listed and weight_map.get(t.name) != file:
                raise SourceError(f"the index does not place tensor {t.name!r} in this file", file=place.path(file))
            owner[name] = file
            tensors.append(t if name == t.name else replace(t, name=name, extra={"shard": file, "name": t.name}))
        metadata = meta | metadata
    for name, file in weight_map.items():
        if owner.get(name) != file:
            raise SourceError(f"tensor {name!r} of the index is not in {file!r}", file=place.name)
    sizes = {f: place.size(f) for f in sorted(set(tree.files) - set(files))}
    whole, pieces, skipped = _others(place, sizes, all_files)
    return Source(
        *("hf", marked(tensors, whole), whole, metadata, (*tree.skipped, *skipped)),
        *(headers, tree.links, tuple(sorted(tree.folders))),
        pieces=pieces,
    )


def _others(
    place: Place, sizes: Mapping[str, int], all_files: bool
) -> tuple[tuple[Attachment, ...], dict[str, int], list[str]]:
    """Attachments of files of these sizes, of how many each large one consists, and the names of what is left out."""
    out = [Attachment(f, place.data(f, 0, n)) for f, n in sizes.items() if n <= MAX_ATTACHMENT]
    large = {f: n for f, n in sizes.items() if n > MAX_ATTACHMENT}
    if not all_files:
        return tuple(out), {}, list(large)
    for f, n in large.items():
        starts = range(0, n, MAX_ATTACHMENT)
        places = ((i, at, min(MAX_ATTACHMENT, n - at)) for i, at in enumerate(starts))
        out += [Attachment(piece_name(f, i), place.data(f, at, m)) for i, at, m in places]
    return tuple(out), {f: -(-n // MAX_ATTACHMENT) for f, n in large.items()}, []
