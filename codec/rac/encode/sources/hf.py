"""Hugging Face directories: safetensors files, their index, and the small files beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rac.encode.sources import safetensors
from rac.encode.sources.model import PICKLES, REFUSE_PICKLE, Attachment, Extent, Source, SourceTensor
from rac.encode.sources.tables import marked
from rac.errors import SourceError

MAX_ATTACHMENT = 64 << 20
_INDEX = ".safetensors.index.json"
_BOOKS = (".git", ".cache")  # directories of what downloaded the model


@dataclass
class _Tree:
    """What lies below a directory, by relative POSIX names."""

    files: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    """Links to files inside the directory, which stay links; others are files."""
    folders: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def _walk(root: str) -> _Tree:
    """What lies below a directory; links to directories are not followed."""
    out, inside = _Tree(), os.path.realpath(root) + os.sep

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


def _weight_map(root: str, files: Sequence[str]) -> dict[str, str]:
    """Tensor name to shard, as the index of the directory states; empty without an index."""
    indexes = [f for f in files if f.endswith(_INDEX) and "/" not in f]
    if not indexes:
        return {}
    if len(indexes) > 1:
        raise SourceError(f"more than one index: {', '.join(indexes)}", file=root)
    path = os.path.join(root, indexes[0])
    with open(path, "rb") as f:
        weight_map = safetensors.parse_json(f.read(), "safetensors index", path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not safetensors.is_text_map(weight_map):
        raise SourceError("safetensors index has no weight_map of tensor names to files", file=path)
    if missing := set(weight_map.values()) - {f for f in files if f.lower().endswith(".safetensors")}:
        raise SourceError(f"shard {min(missing)!r} is missing", file=path)
    return weight_map


def _weights(root: str, tree: _Tree) -> list[str]:
    """Names of the safetensors files: those that say so, and those that a link calls so (`blobs/` of a Hub cache)."""
    linked = {
        os.path.relpath(os.path.realpath(os.path.join(root, name)), os.path.realpath(root)).replace(os.sep, "/")
        for name in tree.links
        if name.lower().endswith(".safetensors")
    }
    return [f for f in tree.files if f.lower().endswith(".safetensors") or f in linked]


def read(root: str) -> Source:
    """A directory, with all its safetensors files.

    The names of the model come first: those of the files that its index lists, or of `model.safetensors`. A tensor of
    a file beside these, or one whose name another has already, is called `FILE::NAME` in the archive.
    """
    tree = _walk(root)
    weight_map = _weight_map(root, tree.files)
    listed = set(weight_map.values()) or {"model.safetensors"}
    files = sorted(_weights(root, tree), key=lambda f: (f not in listed, "/" in f, f))
    if not files:
        if any(f.lower().endswith(PICKLES) for f in tree.files):
            raise SourceError(REFUSE_PICKLE, file=root)
        other = "; name the .gguf file itself" if any(f.lower().endswith(".gguf") for f in tree.files) else ""
        raise SourceError(f"no *.safetensors file in this directory{other}", file=root)
    owner: dict[str, str] = {}
    tensors: list[SourceTensor] = []
    metadata: dict[str, str] = {}
    headers = {}
    for file in files:
        extra = None if files == ["model.safetensors"] else {"shard": file}
        found, meta, headers[file] = safetensors.read(os.path.join(root, file), extra)
        beside = files[0] in listed and file not in listed and "/" not in file
        for t in found:
            name = f"{file}::{t.name}" if beside or t.name in owner else t.name
            if weight_map and file in listed and weight_map.get(t.name) != file:
                why = f"the index does not place tensor {t.name!r} in this file"
                raise SourceError(why, file=os.path.join(root, file))
            owner[name] = file
            tensors.append(t if name == t.name else replace(t, name=name, extra={"shard": file, "name": t.name}))
        metadata = meta | metadata
    for name, file in weight_map.items():
        if owner.get(name) != file:
            raise SourceError(f"tensor {name!r} of the index is not in {file!r}", file=root)
    sizes = {f: os.path.getsize(os.path.join(root, f)) for f in sorted(set(tree.files) - set(files))}
    small = {f: n for f, n in sizes.items() if n <= MAX_ATTACHMENT}
    attachments = tuple(Attachment(f, Extent(os.path.join(root, f), 0, n)) for f, n in small.items())
    skipped = (*tree.skipped, *(f for f in sizes if f not in small))
    return Source(
        *("hf", marked(tensors, attachments), attachments, metadata, skipped),
        *(headers, tree.links, tuple(sorted(tree.folders))),
    )
