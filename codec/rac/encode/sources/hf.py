"""Hugging Face directories: safetensors shards, their index, and the small files beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rac.encode.sources import safetensors
from rac.encode.sources.model import PICKLES, REFUSE_PICKLE, Attachment, Extent, Source, SourceTensor
from rac.errors import SourceError

MAX_ATTACHMENT = 64 << 20
_NOT_ATTACHED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".onnx", ".gguf", ".msgpack", ".rac")
_INDEX = ".safetensors.index.json"


def _walk(root: str) -> Iterable[str]:
    """Relative POSIX names of the files under a directory; nothing hidden, directory links not followed."""

    def fail(e: OSError) -> None:
        raise e

    for folder, below, files in os.walk(root, onerror=fail):
        below[:] = [d for d in below if not d.startswith(".")]
        for path in (os.path.join(folder, file) for file in files if not file.startswith(".")):
            if not os.path.exists(path):
                raise SourceError("symbolic link to nothing; is the download complete?", file=path)
            if os.path.isfile(path):
                name = os.path.relpath(path, root).replace(os.sep, "/")
                try:
                    name.encode()
                except UnicodeEncodeError as e:
                    raise SourceError(f"file name {name!a} is not UTF-8", file=root) from e
                yield name


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


def read(root: str) -> Source:
    """A directory: all its safetensors files, or those that its index lists and all in directories below."""
    files = sorted(_walk(root))
    weight_map = _weight_map(root, files)
    listed = set(weight_map.values())
    shards = [f for f in files if f.lower().endswith(".safetensors") and (not listed or f in listed or "/" in f)]
    if not shards:
        if any(f.lower().endswith(PICKLES) for f in files):
            raise SourceError(REFUSE_PICKLE, file=root)
        other = "; name the .gguf file itself" if any(f.lower().endswith(".gguf") for f in files) else ""
        raise SourceError(f"no *.safetensors file in this directory{other}", file=root)
    owner: dict[str, str] = {}
    tensors: list[SourceTensor] = []
    metadata: dict[str, str] = {}
    for shard in shards:
        path = os.path.join(root, shard)
        found, meta = safetensors.read(path, shard if len(shards) > 1 else None)
        for name in (t.name for t in found):
            if (other := owner.setdefault(name, shard)) != shard:
                why = f"tensor {name!r} is in {other!r} and in {shard!r}; name the file to pack instead"
                raise SourceError(why, file=root)
            if shard in listed and weight_map.get(name) != shard:
                raise SourceError(f"the index does not place tensor {name!r} in this file", file=path)
        tensors += found
        metadata = meta | metadata
    for name, shard in weight_map.items():
        if name not in owner:
            raise SourceError(f"tensor {name!r} of the index is not in {shard!r}", file=root)
    sizes = {f: os.path.getsize(os.path.join(root, f)) for f in files if f not in shards}
    small = {f: n for f, n in sizes.items() if n <= MAX_ATTACHMENT and not f.lower().endswith(_NOT_ATTACHED)}
    attachments = (Attachment(f, Extent(os.path.join(root, f), 0, n)) for f, n in small.items())
    return Source("hf", tuple(tensors), tuple(attachments), metadata, tuple(f for f in sizes if f not in small))
