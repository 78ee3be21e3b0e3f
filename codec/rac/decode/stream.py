"""Reading forward once: tensors as they arrive from a pipe, a socket, a file or the network."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from rac import frameworks
from rac.container.access import InFile, NoRangesError, guarded
from rac.container.feed import Feed, Memory, Near, RangeRing, StreamRing, Trace
from rac.container.forward import Forward
from rac.decode.archive import open_access
from rac.decode.attachments import forward_attachment
from rac.decode.engine import RING, Cpu, Damaged, Engine, Item, later_units, take_units
from rac.decode.gpu import engine_for
from rac.errors import ChecksumError, DamagedError, FormatError, LimitError, RacError, SourceError
from rac.machine import threads_of
from rac.native.prototypes import F32, Array
from rac.records import Limits, Record
from rac.registry import RECORD_OBJECT, RECORD_TENSOR
from rac.tensor import Tensor
from rac.tensor import parse as parse_tensor
from rac.tensor import parts as tensor_parts

HEAD = 1 << 16  # bytes that the head of a record is rarely larger than


class Stream(Iterator[tuple[str, Any]], AbstractContextManager["Stream"]):
    """(name, tensor) of an archive that is read from front to back; see `stream`."""

    def __init__(
        self,
        source: Any,
        device: str,
        framework: str,
        on_error: str,
        threads: int | None,
        ring: int,
        limits: Limits | None,
    ) -> None:
        frameworks.check(framework, device)
        if on_error not in ("raise", "report"):
            raise ValueError(f"on_error must be 'raise' or 'report', not {on_error!r}")
        damaged: Damaged | None = {} if on_error == "report" else None
        self._engine = engine_for(device, threads_of(threads), ring, damaged)
        self.header: dict[str, Any] = {}
        """Header of the archive, once its first tensor was asked for."""
        put = partial(frameworks.put, framework=framework, device=device)
        self._run = _tensors(source, self._engine, put, damaged, limits, self.header)

    @property
    def decoder(self) -> str:
        """What decodes."""
        return self._engine.name

    def __next__(self) -> tuple[str, Any]:
        """The next tensor under the next of its names."""
        return next(self._run)

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End the threads; what has not been yielded is not read. The source stays open where the caller opened it."""
        self._run.close()


def _tensors(
    source: Any,
    engine: Engine,
    put: Callable[..., None],
    damaged: Damaged | None,
    limits: Limits | None,
    header: dict[str, Any],
) -> Generator[tuple[str, Any]]:
    """What a `Stream` yields; it does not refer to the stream, so that both end when nobody refers to that."""
    feed, close = open_feed(source, engine.ring // 2, engine.trace, near=isinstance(engine, Cpu))
    try:
        forward = Forward(feed, feed.name, limits)
        header |= forward.header
        for t, value in engine.run(forward_items(forward, partial(_attachment, forward, damaged))):
            if t.record.type == RECORD_OBJECT:
                continue
            out: dict[str, Any] = {}
            put(t, value, out=out)
            del value
            while out:
                name = next(iter(out))
                yield name, out.pop(name)
    except RacError as e:
        if not damaged:
            raise
        raise DamagedError(damaged, file=feed.name, more=f", and then: {e.message}") from e
    finally:
        try:
            feed.close()
        finally:
            close()
    if damaged:
        raise DamagedError(damaged, file=feed.name)


def _attachment(forward: Forward, damaged: Damaged | None, record: Record) -> None:
    """Check an attachment."""
    try:
        forward_attachment(forward, record)
    except FormatError as e:
        if damaged is None or forward.at > record.payload + record.payload_size:
            raise
        damaged[str(record.head.get("name"))] = e


def stream(
    source: Any,
    device: str = "cpu",
    framework: str | None = None,
    on_error: str = "raise",
    threads: int | None = None,
    ring: int = RING,
    limits: Limits | None = None,
) -> Stream:
    """(name, tensor) of an archive, forward only and in bounded memory, while it arrives.

    Reading runs ahead of decoding, and the tiles of a tensor are decoded side by side. Each tensor is checked before it
    is yielded, and at the end the index against what went by: an exhausted stream means a whole archive. Stop early
    (`close`, or leave the `with` block) and only what was yielded has been checked.

    Args:
        source: A file object, pipe or socket (anything with `read` or `recv`), a path, a URL, or bytes.
        device: Where torch tensors go; "cuda" decodes there where its kernels can be used.
        framework: "np" for numpy arrays, "pt" for torch tensors; as `load_file` by default.
        on_error: "raise" ends with the first damaged tensor. "report" goes on behind it: tensors that are damaged are
            never yielded, the others are, and the stream ends in a DamagedError that names all that are.
        threads: Threads that decode; one per core up to 8 by default.
        ring: Bytes that may be held beyond the tensors: half for what is read ahead, half for tensors in work.
        limits: What to accept.

    Raises:
        RacError: The stream is damaged, ends early, or needs a newer version.
    """
    return Stream(source, device, frameworks.default(framework, device), on_error, threads, ring, limits)


def load_forward(shards: Sequence[str], **how: Any) -> dict[str, Any]:
    """All tensors of an archive, or of all shards of its set, each read from front to back: as `load_file` gives them.

    `how` are arguments of `stream`. Beside the tensors no more than the ring is in memory.
    """
    out: dict[str, Any] = {}
    for k, url in enumerate(shards, 1):
        with stream(url, **how) as arriving:
            for name, tensor in arriving:
                if name in out:
                    raise FormatError(f"tensor {name!r} is in two shards", file=url)
                out[name] = tensor
        if (place := arriving.header.get("shard", [1, 1])) != [k, len(shards)]:
            where = f"its name must end in -{place[0]:05d}-of-{place[1]:05d}.rac"
            raise SourceError(f"is shard {place[0]} of {place[1]}; {where}", file=url)
    return out


def iter_tensors(
    stream: Any, framework: str = "np", device: str = "cpu", limits: Limits | None = None
) -> Iterator[tuple[str, Any]]:
    """`stream` under the name and with the arguments that it had first."""
    return Stream(stream, device, framework, "raise", None, RING, limits)


def open_feed(
    source: Any, size: int, trace: Trace | None = None, near: bool = False
) -> tuple[Feed, Callable[[], None]]:
    """The bytes of a source, of which `size` may be read ahead, and what closes that which was opened for it.

    `near`: a local file is not read ahead, but by who decodes it.
    """
    name = str(getattr(source, "name", None) or "<stream>")
    with guarded(SourceError, name, of=ValueError):  # closed
        if type(source) is io.BytesIO:
            source = source.read()
        with contextlib.suppress(TypeError):  # it has no buffer
            return Memory(memoryview(source), name), _nothing
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source), size, trace, near)
    if hasattr(source, "read_into"):
        return RangeRing(source, [(0, source.size)], size, trace=trace), _nothing
    with guarded(SourceError, name, of=ValueError):  # closed
        return StreamRing(source, name, size, trace=trace), _nothing


def _open_path(path: str, size: int, trace: Trace | None, near: bool) -> tuple[Feed, Callable[[], None]]:
    """The bytes of a file, a pipe, a device, or what a URL names."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a named pipe, a device
        file = open(path, "rb", buffering=0)  # noqa: SIM115
        return StreamRing(file, path, size, trace=trace), file.close
    try:
        access = open_access(path)
    except NoRangesError:
        from rac.container.remote import open_body

        body = open_body(path)
        return StreamRing(body, path, size, trace=trace), body.close
    if near and access.near:
        return Near(access), access.close
    return RangeRing(access, [(0, access.size)], size, trace=trace), access.close


def _nothing() -> None:
    """The source is the caller's."""


class Objects:
    """What a forward reader keeps of the objects that went by."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0
        self._found: dict[str, tuple[Tensor, Array | None]] = {}

    def parse(self, record: Record) -> Tensor:
        """The head of a tensor or an object, checked."""
        t = parse_tensor(record, self._limits, lambda n: self._found[n][0].shape if n in self._found else None)
        if record.type == RECORD_OBJECT:
            if t.name in self._found:
                raise FormatError(f"object {t.name!r} is there twice", offset=record.at)
            self._held += t.nbytes
            if self._held > self._limits.objects:
                raise LimitError(f"objects of more than {self._limits.objects} bytes", offset=record.at)
        return t

    def keep(self, t: Tensor, words: Array | None) -> None:
        """Take in an object; without `words` only to check what others say of it."""
        if t.record.type == RECORD_OBJECT:
            self._found[t.name] = (t, words)

    def of(self, t: Tensor) -> list[F32]:
        """The matrices that a tensor uses."""
        out = []
        for name in t.uses:
            words = self._found[name][1]
            if words is None:
                raise ChecksumError(f"uses the object {name!r}, which is damaged", offset=t.record.at)
            out.append(words.view(np.float32))
        return out


def forward_items(forward: Forward, other: Callable[[Record], None] | None = None) -> Iterator[Item | None]:
    """Tensors and objects as they go by, None where the next has not arrived yet; `other` is called at attachments."""
    held = Objects(forward.limits)
    for record in forward.records():
        if record.type not in (RECORD_TENSOR, RECORD_OBJECT):
            if other:
                other(record)
            continue
        with InFile(str(forward.name), repr(record.head.get("name"))):
            t = held.parse(record)
        held.keep(t, None)
        late = partial(forward.feed.idle, record.payload_size)
        take = partial(take_units, forward, t)
        feed = forward.feed
        later = partial(later_units, forward, t, feed.access) if isinstance(feed, Near) else None
        yield Item(str(forward.name), t, take, partial(held.of, t), partial(held.keep, t), late, later)
        forward.skip(record)
        if forward.feed.idle(HEAD):
            yield None


Found = tuple[Tensor, Array, tuple[int, ...]]


def forward_tensors(
    forward: Forward,
    other: Callable[[Record], None] | None = None,
    of_object: Callable[[Found], None] | None = None,
    threads: int = 1,
) -> Iterator[Found]:
    """(tensor, words, parts) of every tensor record; `other` is called at attachments, `of_object` with objects."""
    heads: dict[int, list[bytes]] = {}

    def noted(item: Item | None) -> Item | None:
        """The item, whose tiles leave their directories behind."""
        if item is None:
            return None
        mine, size = heads.setdefault(item.t.record.at, []), item.t.chain.coder.directory

        def take(i: int, n: int = 1) -> Any:
            view, held = item.take(i, n)
            for unit in item.t.units[i : i + n]:
                at = unit.offset - item.t.units[i].offset
                mine.append(bytes(view[at : at + size]))
            return view, held

        return replace(item, take=take)

    for t, words in Cpu(threads).run(map(noted, forward_items(forward, other))):
        mine = heads.pop(t.record.at)
        with InFile(str(forward.name), repr(t.name)):
            sizes = [u.size for u in t.units]
            parts = tensor_parts(t.grid, t.chain, sizes, partial(_of, mine))
        if t.record.type == RECORD_TENSOR:
            yield t, words, parts
        elif of_object:
            of_object((t, words, parts))


def _of(heads: list[bytes], i: int, _: int) -> bytes:
    return heads[i]
