"""An archive back to the files that it was packed from."""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from rac.container.output import PART, destination, part, write_whole
from rac.container.reader import Archive
from rac.decode import random
from rac.decode.archive import RacFile
from rac.errors import FormatError, OutputError
from rac.linalg.transform import describe
from rac.machine import threads_of
from rac.provenance import Provenance
from rac.records import Entry
from rac.registry import DTYPES, RECORD_OBJECT, RECORD_TENSOR
from rac.stages.table import is_quantised
from rac.tensor import extra_of

Progress = Callable[[str, int], None]
GGUF_HEADER = "gguf.header"


@dataclass
class _Output:
    """One file to write."""

    path: str
    head: bytes = b""
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size of the bytes of each tensor
    end: int = 0


def unpack(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    online: Callable[[str, str], None] | None = None,
) -> list[str]:
    """Unpack to a folder, or to the one file that `out` names (.safetensors or .gguf); returns the paths written.

    Tensors come back bit for bit, attachments byte for byte. A sharded Hugging Face model gets its shards again, a
    GGUF model its GGUF file. What is written is the content of the file: where the layer of a weight needs an online
    transform (format_spec/stages/online.md), which these files cannot state, `online` is called with the name of the
    tensor and what the transform is; without `online` there is one warning for all of them.

    Raises:
        RacError: The archive is damaged, or the output exists or cannot be written.
    """
    target = os.fspath(out)
    with RacFile(src, threads=threads) as f:
        outputs = _plan(f, target)
        files = [] if target.endswith((".safetensors", ".gguf")) else [n for n in f.attachments() if n != GGUF_HEADER]
        paths = [o.path for o in outputs] + [os.path.join(target, *safe_name(n).split("/")) for n in files]
        if len(set(paths)) != len(paths):
            raise FormatError("an attachment has the name of a weight file", file=f.archives[0].access.name)
        places = [destination(path, force) for path in paths]
        for o, place in zip(outputs, places, strict=False):
            o.path = place
        made = not os.path.exists(target)
        try:
            needed = _write(f, outputs, threads_of(threads), progress)
            for name, place in zip(files, places[len(outputs) :], strict=True):
                os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
                write_whole(place, f.attachment(name))
        except OSError as e:
            why = "no space left" if e.errno == errno.ENOSPC else e.strerror or str(e)
            raise OutputError(why, file=e.filename or target) from e
        finally:
            for leftover in (p + PART for p in places):
                if os.path.lexists(leftover):
                    os.unlink(leftover)
            if made:
                for folder, _, _ in os.walk(target, topdown=False):
                    if not os.listdir(folder):  # made for a file that did not come
                        os.rmdir(folder)
    for name, about in needed.items():
        if online is None:
            what = f"rac: {len(needed)} tensors are unpacked whose layers need an online transform, {name!r} for one: "
            warnings.warn(what + about, stacklevel=2)
            break
        online(name, about)
    return paths


def safe_name(name: str) -> str:
    """The name of a file below the target folder; FormatError for one that leads out of it."""
    if {"", ".", ".."} & set(name.split("/")) or set("\\:\0") & set(name) or name.endswith(".part"):
        raise FormatError(f"the file name {name!r} is not allowed")
    return name


def _tensors(f: RacFile) -> list[tuple[Archive, Entry]]:
    return [(a, e) for a in f.archives for e in a.index.entries if e.type == RECORD_TENSOR]


def _plan(f: RacFile, target: str) -> list[_Output]:
    """Files to write, and the place of every tensor in them."""
    origin = Provenance.of(f.archives[0].header, f.archives[0].access.name)
    gguf = GGUF_HEADER in f.attachments()
    if target.endswith(".gguf") or (gguf and not target.endswith(".safetensors") and origin.whole):
        if not gguf or not origin.whole:
            raise OutputError("the archive does not hold a whole GGUF model; unpack to .safetensors", file=target)
        return [_plan_gguf(f, target if target.endswith(".gguf") else os.path.join(target, "model.gguf"))]
    rows: dict[str, list[tuple[str, Entry]]] = {}
    single = target.endswith(".safetensors")
    sharded = not single and origin.source == "hf"
    for archive, e in _tensors(f):
        extra = archive.record(e).head.get("extra", {}) if sharded else {}
        for name in (e.name, *(a for a, _ in e.aliases)):
            shard = str(extra_of(extra, name).get("shard", "model.safetensors"))
            rows.setdefault(shard, []).append((name, e))
    out = []
    for shard, entries in (rows or {"model.safetensors": []}).items():
        if not safe_name(shard).endswith(".safetensors"):
            raise FormatError(f"the shard name {shard!r} is not allowed", file=f.archives[0].access.name)
        path = target if single else os.path.join(target, *shard.split("/"))
        out.append(_plan_safetensors(path, entries, f.metadata()))
    return out


def weights(e: Entry) -> int:
    """Elements of the tensor of an index row; 0 for other rows."""
    return math.prod(e.shape) if e.type == RECORD_TENSOR else 0


def quantised(entries: Iterable[Entry]) -> tuple[int, float]:
    """Number of quantised tensors, and bits of their records, and of objects, which they use, over their weights."""
    mine = [e for e in entries if e.type == RECORD_OBJECT or is_quantised(e.method)]
    tensors = sum(e.type == RECORD_TENSOR for e in mine)
    return tensors, 8 * sum(e.size for e in mine) / max(1, sum(map(weights, mine))) if tensors else 0.0


def _size(e: Entry) -> int:
    return weights(e) * (DTYPES[e.dtype].bits if e.dtype in DTYPES else 8) // 8


def tensor_bytes(e: Entry) -> int:
    """Dense bytes of a tensor under all its names."""
    return _size(e) * (1 + len(e.aliases))


def _plan_safetensors(path: str, rows: list[tuple[str, Entry]], metadata: dict[str, str]) -> _Output:
    head: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, e in rows:
        if name == "__metadata__":
            raise OutputError("a tensor has the name '__metadata__', which safetensors keeps for itself", file=path)
        head[name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [at, at + _size(e)]}
        at += _size(e)
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: (start + head[name]["data_offsets"][0], _size(e)) for name, e in rows}
    return _Output(path, len(text).to_bytes(8, "little") + text, places, start + at)


def _plan_gguf(f: RacFile, path: str) -> _Output:
    out = _Output(path, f.attachment(GGUF_HEADER))
    align = f.metadata().get("gguf.alignment", "32")
    step = int(align) if align.isdecimal() and 0 < int(align) <= 1 << 20 else 32
    where = {name: e for _, e in _tensors(f) for name in (e.name, *(a for a, _ in e.aliases))}
    out.end = len(out.head)
    for name in Provenance.of(f.archives[0].header, f.archives[0].access.name).gguf_order(where):
        out.places[name] = out.end, _size(where[name])
        out.end += _size(where[name])
        out.end += -out.end % step
    return out


def _write(f: RacFile, outputs: list[_Output], threads: int, progress: Progress | None) -> dict[str, str]:
    """Write all tensors; returns those whose layers need an online transform, and what that is."""
    online: dict[str, str] = {}
    files: list[BinaryIO] = []
    where: dict[str, tuple[BinaryIO, tuple[int, int]]] = {}
    with ExitStack() as stack:
        for o in outputs:
            os.makedirs(os.path.dirname(o.path) or ".", exist_ok=True)
            files.append(file := stack.enter_context(part(o.path)))
            file.truncate(0)
            file.write(o.head)
            file.truncate(o.end)
            where |= {name: (file, place) for name, place in o.places.items()}
        for archive in f.archives:
            entries = [e for e in archive.index.entries if e.type == RECORD_TENSOR]
            for t, words in random.load(archive, entries, threads):
                for name in (t.name, *(a for a, _ in t.aliases)):
                    file, (offset, size) = where[name]
                    if t.nbytes != size:
                        raise FormatError("the record is not the one that the index names", unit=repr(name))
                    file.seek(offset)
                    file.write(words.data.cast("B") if words.size else b"")
                    if t.online:
                        online[name] = describe(t.online, t.shape[1])
                if progress:
                    progress(t.name, t.nbytes)
        for o, file in zip(outputs, files, strict=True):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(o.path + PART, o.path)
    return online
