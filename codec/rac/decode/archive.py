"""The reading side of the public interface: `open`, `load_file`, `load`, `iter_tensors`."""

from __future__ import annotations

import operator
import os
import re
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rac.container import index as ix
from rac.container import wire, zstd
from rac.container.access import Access, BytesAccess, FileAccess, InFile
from rac.container.access import read as access_read
from rac.container.forward import Forward, Readable, entries_by_name
from rac.container.reader import Archive
from rac.decode import frameworks as fw
from rac.decode import load as ld
from rac.decode import tensor as tn
from rac.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    NameNotFoundError,
    SourceError,
    UnsupportedError,
)
from rac.records import Entry, Limits, Record, Unit
from rac.registry import RECORD_ATTACHMENT, RECORD_OBJECT, RECORD_TENSOR

if TYPE_CHECKING:
    from rac.decode.cuda import DeviceDecoder

Array = NDArray[Any]
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.rac$")


def open_archives(path: str | os.PathLike[str], limits: Limits | None = None) -> list[Archive]:
    """The archive at `path`, or all shards of the set that it belongs to; `path` may be a folder of one set."""
    name = os.fspath(path)
    if os.path.isdir(name):
        found = sorted(f for f in os.listdir(name) if f.endswith(".rac"))
        first = [f for f in found if not (m := _SHARD.search(f)) or int(m[1]) == 1]
        if len(first) != 1:
            raise SourceError(f"{len(first)} archives in this folder; name the .rac file", file=name)
        name = os.path.join(name, first[0])
    first_archive = Archive(FileAccess(name), limits)
    out = [first_archive]
    try:
        k, n = first_archive.header.get("shard", [1, 1])
        match = _SHARD.search(name)
        if n > 1 and (not match or (int(match[1]), int(match[2])) != (k, n)):
            raise SourceError(f"is shard {k} of {n}; its name must end in -{k:05d}-of-{n:05d}.rac", file=name)
        for i in range(1, n + 1):
            if i != k and match:
                part = name[: match.start()] + f"-{i:05d}-of-{n:05d}.rac"
                out.append(Archive(FileAccess(part), limits))
                if out[-1].header.get("shard") != [i, n]:
                    raise FormatError(f"is not shard {i} of {n}", file=part)
    except BaseException:
        for archive in out:
            archive.close()
        raise
    out.sort(key=lambda archive: archive.header.get("shard", [1, 1]))
    return out


class RacFile:
    """An open archive, used like `safetensors.safe_open`.

    Args:
        path: A .rac file, one shard of a set (the others are found beside it), or a folder that holds one.
        framework: "np" for numpy arrays, "pt" for torch tensors.
        device: Where torch tensors go.
        threads: Threads that decode; one per core up to 8 by default.

    Raises:
        RacError: The file is missing, damaged, or needs a newer version.
    """

    def __init__(
        self, path: str | os.PathLike[str] | Access, framework: str = "np", device: str = "cpu",
        threads: int | None = None, limits: Limits | None = None,
    ) -> None:  # fmt: skip
        fw.check(framework, device)
        self._framework, self._device = framework, device
        self._threads = ld.threads_of(threads)
        if isinstance(path, str | os.PathLike):
            self.archives = open_archives(path, limits)
        else:
            self.archives = [Archive(path, limits)]
        self._tensors: dict[str, tuple[Archive, Entry]] = {}
        self._files: dict[str, tuple[Archive, Entry]] = {}
        try:
            for archive in self.archives:
                for name, entry in entries_by_name(archive.index).items():
                    if name in self._tensors:
                        raise FormatError(f"tensor {name!r} is in two shards", file=archive.access.name)
                    self._tensors[name] = (archive, entry)
                for entry in archive.index.entries:
                    if entry.type == RECORD_ATTACHMENT:
                        if entry.name in self._files:
                            raise FormatError(f"attachment {entry.name!r} is in two shards", file=archive.access.name)
                        self._files[entry.name] = (archive, entry)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RacFile:
        """The file itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the files."""
        for archive in self.archives:
            archive.close()

    def keys(self) -> list[str]:
        """Names of all tensors, ties and duplicates included."""
        return list(self._tensors)

    def metadata(self) -> dict[str, str]:
        """Text to text, as the source had it."""
        return dict(self.archives[0].header.get("metadata", {}))

    def attachments(self) -> list[str]:
        """Names of the files that travel along."""
        return list(self._files)

    def attachment(self, name: str) -> bytes:
        """Content of an attached file; NameNotFoundError where it is not there."""
        archive, entry = self._find(self._files, name, "attachment")
        record = archive.record(entry)
        with InFile(archive.access.name, repr(name)):
            units = attachment_units(record, archive.limits)
            data = access_read(archive.access, record.payload, record.end - record.payload)
            if any(data[units[0].size :]):
                raise FormatError("padding is not zero", offset=record.payload + units[0].size)
            return attachment_bytes(record, data[: units[0].size])

    def _find(self, where: dict[str, tuple[Archive, Entry]], name: str, what: str) -> tuple[Archive, Entry]:
        if name not in where:
            raise NameNotFoundError(f"holds no {what} {name!r}", file=self.archives[0].access.name)
        return where[name]

    def get_tensor(self, name: str) -> Any:
        """A whole tensor; NameNotFoundError where it is not there, FormatError where it is damaged."""
        archive, entry = self._find(self._tensors, name, "tensor")
        if decoder := device_decoder(self._device):
            found = ld.load_onto(archive, entry, decoder)[1]
            decoder.flush()
            return found
        t, words = next(ld.load(archive, [entry], self._threads))
        return fw.to_framework(words, t.dtype, t.shape, self._framework, self._device)

    def get_slice(self, name: str) -> Slice:
        """A lazy view: `f.get_slice(n)[10:20, :]` reads and decodes only the tiles that it needs."""
        archive, entry = self._find(self._tensors, name, "tensor")
        record = archive.record(entry)
        with InFile(archive.access.name, repr(name)):
            t = ld.parse(archive, record)
        return Slice(archive, t, self._framework, self._device)

    def load(self, done: Callable[[tn.Tensor], None] | None = None) -> dict[str, Any]:
        """All tensors by name. Tied tensors are one object, equal ones are copies.

        A CUDA device decodes them itself; where its kernels cannot be used, a warning says why.
        """
        out: dict[str, Any] = {}
        if decoder := device_decoder(self._device):
            copies = []
            for archive in self.archives:
                for e in archive.index.entries:
                    if e.type == RECORD_TENSOR:
                        t, out[e.name] = ld.load_onto(archive, e, decoder)
                        copies += [(alias, e.name, tied) for alias, tied in t.aliases]
                        if done:
                            done(t)
            decoder.flush()
            for alias, name, tied in copies:
                out[alias] = out[name] if tied else out[name].clone()
            return {name: out[name] for name in self._tensors}
        for archive in self.archives:
            entries = [e for e in archive.index.entries if e.type == RECORD_TENSOR]
            for t, words in ld.load(archive, entries, self._threads, done):
                with_aliases(t, words, self._framework, self._device, out)
        return {name: out[name] for name in self._tensors}


def with_aliases(t: tn.Tensor, words: Array, framework: str, device: str, out: dict[str, Any]) -> None:
    """Put a tensor into `out` under all its names."""
    out[t.name] = fw.to_framework(words, t.dtype, t.shape, framework, device)
    for alias, tied in t.aliases:
        out[alias] = out[t.name] if tied else fw.to_framework(words.copy(), t.dtype, t.shape, framework, device)


def device_decoder(device: Any) -> DeviceDecoder | None:
    """Decoder of a CUDA device; None, with one warning that says why, where its kernels cannot be used."""
    if not str(device).startswith("cuda"):
        return None
    from rac.decode import cuda

    if reason := cuda.why_not(device):
        warnings.warn(f"rac: tensors for {device} are decoded on the CPU: {reason}", stacklevel=4)
        return None
    return cuda.DeviceDecoder(device)


def attachment_units(record: Record, limits: Limits) -> list[Unit]:
    """The one unit of an attachment; its head is checked."""
    head = record.head
    if {"name", "size", "stages", "units", "digest"} - head.keys():
        raise FormatError("attachment head is malformed", offset=record.at)
    if unknown := [k for k in head.keys() - {"name", "size", "stages", "units", "digest"} if not k.startswith("x-")]:
        raise UnsupportedError(f"attachment head has the unknown field {min(unknown)!r}", offset=record.at)
    units = wire.parse_units(head["units"], record.payload_size)
    stages, digest = head["stages"], head["digest"]
    if not isinstance(digest, bytes) or len(digest) != 16:
        raise FormatError("attachment digest is malformed", offset=record.at)
    if not isinstance(head["name"], str) or len(units) != 1 or not ix.is_count(head["size"]):
        raise FormatError("attachment head is malformed", offset=record.at)
    if stages not in ([{"id": "raw/1"}], [{"id": "zstd/1"}]):
        raise UnsupportedError(f"attachment stages {stages!r} are not known to this version", offset=record.at)
    if max(head["size"], units[0].size) > limits.attachment:
        raise LimitError(f"attachment of {head['size']} bytes exceeds the limit", offset=record.at)
    if units[0].size > head["size"] + 1024:
        raise FormatError("attachment is larger than it can need", offset=record.at)
    return units


def attachment_bytes(record: Record, data: bytes) -> bytes:
    """Content of an attachment from the bytes of its unit."""
    head = record.head
    if zstd.xxh3(data) != int.from_bytes(head["units"][8:16], "little"):
        raise ChecksumError("checksum does not match", offset=record.payload)
    if head["stages"][0]["id"] == "zstd/1":
        data = zstd.decompress(data, head["size"])
    elif len(data) != head["size"]:
        raise FormatError("attachment does not have the size that its head states", offset=record.payload)
    if zstd.digest(data) != head["digest"]:
        raise ChecksumError("the attachment is not the one that was packed", offset=record.payload)
    return data


class Slice:
    """A tensor that is read where it is indexed: integers, slices and one ellipsis, as in numpy."""

    def __init__(self, archive: Archive, t: tn.Tensor, framework: str, device: str) -> None:
        self._archive, self._tensor, self._framework, self._device = archive, t, framework, device
        self._shape = (*t.shape[:-1], t.shape[-1] // 2) if t.dtype == "F4" else t.shape

    def get_shape(self) -> list[int]:
        """Shape, in bytes of two values along the last dimension for F4."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Name of the data type."""
        return self._tensor.dtype

    def __getitem__(self, key: Any) -> Any:
        """The part that `key` selects. IndexError as in numpy."""
        t, shape = self._tensor, self._shape
        key = key if isinstance(key, tuple) else (key,)
        dots = [i for i, k in enumerate(key) if k is Ellipsis]
        if len(dots) > 1:
            raise IndexError("an index can only have a single ellipsis")
        if dots:
            i = dots[0]
            key = (*key[:i], *(slice(None) for _ in range(len(shape) - len(key) + 1)), *key[i + 1 :])
        if len(key) > len(shape):
            raise IndexError(f"{len(key)} indices for a tensor of {len(shape)} dimensions")
        key = (*key, *(slice(None) for _ in range(len(shape) - len(key))))
        box: list[tuple[int, int]] = []
        rest: list[Any] = []
        for k, n in zip(key, shape, strict=True):
            if isinstance(k, slice):
                inside = range(*k.indices(n))
                low, high = sorted((inside[0], inside[-1])) if inside else (0, -1)
                box.append((low, high + 1))
                # a negative step that ends at the first element has no stop to name
                stop = inside.stop - low if inside and inside.stop >= low else None
                rest.append(slice(inside.start - low, stop, inside.step) if inside else slice(0, 0))
            else:
                if isinstance(k, bool):
                    raise IndexError("masks are not supported; load the tensor and index that")
                i = operator.index(k)  # TypeError for anything else
                if not -n <= i < n:
                    raise IndexError(f"index {i} is out of range for dimension of {n}")
                box.append((i % n, i % n + 1))
                rest.append(0)
        found = self._read(box)[tuple(rest)]
        part, shape = np.ascontiguousarray(found).reshape(-1), np.shape(found)
        if t.dtype != "F4":
            return fw.to_framework(part, t.dtype, shape, self._framework, self._device)
        return fw.to_framework(part, t.dtype, (2 * part.size,), self._framework, self._device).reshape(shape)

    def _read(self, box: list[tuple[int, int]]) -> Array:
        """Elements of the box, as unsigned integers or, for C64, as complex numbers."""
        t, shape, axis = self._tensor, list(self._shape), self._tensor.axis
        r0, r1, c0, c1 = 0, t.grid.rows, 0, t.grid.cols
        whole = [(0, n) for n in shape]
        if shape and t.grid.rows * t.grid.cols:
            if axis > 0:
                inner = t.grid.rows // shape[0]
                r0, r1 = box[0][0] * inner, box[0][1] * inner
                whole[0] = box[0]
            if axis < len(shape):
                inner = t.grid.cols // shape[axis]
                c0, c1 = box[axis][0] * inner, box[axis][1] * inner
                whole[axis] = box[axis]
        words = self._tiles(r0, r1, c0, c1).reshape(-1)
        if t.dtype == "C64":
            words = words.view("<c8")
        view = words.reshape([b - a for a, b in whole])
        cut = tuple(slice(None) if w == b else slice(*b) for w, b in zip(whole, box, strict=True))
        return view[cut]

    def _tiles(self, r0: int, r1: int, c0: int, c1: int) -> Array:
        t, g = self._tensor, self._tensor.grid
        if r0 >= r1 or c0 >= c1:
            return np.empty((max(0, r1 - r0), max(0, c1 - c0)), f"<u{t.word}")
        a0, a1, b0, b1 = r0 // g.tr, -(-r1 // g.tr), c0 // g.tc, -(-c1 // g.tc)
        if t.after == "basis/1":  # every column comes from all of them
            b0, b1 = 0, g.across
        top, left = a0 * g.tr, b0 * g.tc
        with InFile(self._archive.access.name, repr(t.name)):
            shape = (min(g.rows, a1 * g.tr) - top, min(g.cols, b1 * g.tc) - left)
            out = tn.values(t, *shape) if t.after else np.empty(shape, f"<u{t.word}")
            dec = ld.decoder(self._archive, t)
            for a in range(a0, a1):
                first = a * g.across + b0
                units = ld.read_units(self._archive, t, t.first + first, t.first + first + b1 - b0)
                for i, unit in enumerate(units):
                    dec.tile(first + i, unit, out, top, left)
            if t.after:
                found = out[r0 - top : r1 - top, slice(None) if t.after == "basis/1" else slice(c0 - left, c1 - left)]
                out = np.empty((r1 - r0, c1 - c0), f"<u{t.word}")
                dec.join(found, out, (r0, r1, c0, c1))
                return out
        return np.ascontiguousarray(out[r0 - top : r1 - top, c0 - left : c1 - left])


def load_file(
    path: str | os.PathLike[str],
    device: str = "cpu",
    framework: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """All tensors of an archive (or of a set of shards).

    numpy arrays by default; torch tensors with framework="pt" or where `device` is not the CPU.

    Raises:
        RacError: The file is missing, damaged, or needs a newer version.
    """
    with RacFile(path, _default(framework, device), device, threads) as f:
        return f.load()


def load(data: bytes, device: str = "cpu", framework: str | None = None) -> dict[str, Any]:
    """All tensors of an archive that is in memory; as `load_file`."""
    with RacFile(BytesAccess(data), _default(framework, device), device) as f:
        return f.load()


def _default(framework: str | None, device: str) -> str:
    return framework or ("np" if str(device) == "cpu" else "pt")


def iter_tensors(
    stream: Readable, framework: str = "np", device: str = "cpu", limits: Limits | None = None
) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of a forward-only stream, one tensor in memory at a time.

    Everything is checked as it goes by, and at the end of the stream the index against what went by: an exhausted
    iterator means a whole archive. Stop early and only what was yielded has been checked.
    """
    fw.check(framework, device)
    forward = Forward(stream, getattr(stream, "name", "<stream>") or "<stream>", limits)

    def attachment(record: Record) -> None:
        forward_attachment(forward, record)

    for t, words, _ in forward_tensors(forward, attachment):
        out: dict[str, Any] = {}
        with_aliases(t, words, framework, device, out)
        del words
        yield from out.items()


class Objects:
    """What a forward reader keeps of the objects that went by."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0
        self._found: dict[str, tuple[tn.Tensor, Array | None]] = {}

    def parse(self, record: Record) -> tn.Tensor:
        """The head of a tensor or an object, checked."""
        t = tn.parse(record, self._limits, lambda n: self._found[n][0].shape if n in self._found else None)
        if record.type == RECORD_OBJECT:
            if t.name in self._found:
                raise FormatError(f"object {t.name!r} is there twice", offset=record.at)
            self._held += t.nbytes
            if self._held > self._limits.objects:
                raise LimitError(f"objects of more than {self._limits.objects} bytes", offset=record.at)
        return t

    def keep(self, t: tn.Tensor, words: Array | None) -> None:
        """Take in an object; without `words` only to check what others say of it."""
        self._found[t.name] = (t, words)

    def of(self, t: tn.Tensor) -> list[NDArray[np.float32]]:
        """The matrices that a tensor uses."""
        found = [self._found[name][1] for name in t.uses]
        return [words.view(np.float32) for words in found if words is not None]


Found = tuple[tn.Tensor, Array, tuple[int, ...]]


def forward_tensors(
    forward: Forward, other: Callable[[Record], None] | None = None, reference: bool = False,
    of_object: Callable[[Found], None] | None = None,
) -> Iterator[Found]:  # fmt: skip
    """(tensor, words, parts) of every tensor record.

    `other` is called for attachments, positioned at their payload, `of_object` with every object.
    """
    objects = Objects(forward.limits)
    for record in forward.records():
        if record.type == RECORD_TENSOR:
            with InFile(str(forward.name)):
                yield forward_tensor(forward, record, objects, reference)
        elif record.type == RECORD_OBJECT:
            with InFile(str(forward.name)):
                found = forward_tensor(forward, record, objects, reference)
                objects.keep(*found[:2])
                if of_object:
                    of_object(found)
        elif other:
            other(record)


def forward_attachment(forward: Forward, record: Record) -> bytes:
    """Content of the attachment that the stream stands at."""
    with InFile(str(forward.name), repr(record.head.get("name"))):
        unit = attachment_units(record, forward.limits)[0]
        return attachment_bytes(record, forward.unit(unit, record, forward.limits.attachment, "attachment"))


def forward_tensor(forward: Forward, record: Record, objects: Objects, reference: bool = False) -> Found:
    """Decode the tensor or object that the stream stands at; also its payload bytes by kind."""
    with InFile(str(forward.name), repr(record.head.get("name"))):
        t = objects.parse(record)
        first = [forward.unit(t.units[i], record, t.most(i), f"{t.name!r} unit {i}") for i in range(t.first)]
        dec = tn.Decoder(t, first, reference, objects.of(t))
        out = found = tn.empty(t)
        heads = [b""] * t.first
        for i in range(t.tiles):
            k = i + t.first
            data = forward.unit(t.units[k], record, t.most(k), f"{t.name!r} unit {k}")
            r0, r1, c0, c1 = t.grid.box(i)
            if not t.after:
                dec.tile(i, np.frombuffer(data, np.uint8), out)
            else:  # one row of tiles after the other
                found = tn.values(t, r1 - r0, t.grid.cols) if not c0 else found
                dec.tile(i, np.frombuffer(data, np.uint8), found, r0)
                if c1 == t.grid.cols:
                    dec.join(found, out[r0:r1], (r0, r1, 0, c1))
            heads.append(data[: t.lanes.directory] if t.lanes else b"")
        sizes = [u.size for u in t.units]
        return t, out, tn.parts(t.grid, t.lanes, t.trellis is not None, sizes, lambda i, _: heads[i])
