"""What a file holds: tensors by name, read when asked for; of archives and of everything that can be packed."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container.access import InFile
from rac.container.wire import MAGIC
from rac.decode.archive import RacFile, of_repository
from rac.decode.spool import at_random
from rac.decode.unpack import GGUF_HEADER, names_of_files, tensor_bytes
from rac.encode.sources import SourceTensor, open_source
from rac.errors import SourceError
from rac.frameworks import to_framework
from rac.provenance import Provenance


@dataclass(frozen=True, slots=True)
class Stated:
    """A tensor: what is known of it, and what reads it as a numpy array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], NDArray[Any]]
    stored: int | None = None  # bytes of its record; 0: stored with another name; None: not in an archive
    method: str | None = None  # that of the record
    digest: Callable[[], bytes | None] = lambda: None  # XXH3-128 of its bytes, where stated


@dataclass(frozen=True, slots=True)
class Contents:
    """Tensors and attached files by name."""

    tensors: dict[str, Stated] = field(default_factory=dict)
    files: dict[str, Callable[[], bytes]] = field(default_factory=dict)
    numbers: bool = False  # whether tensors are numbers that codes and scales stood for where they came from


@dataclass(frozen=True, slots=True)
class Difference:
    """How a tensor differs: `what` in words, and of tensors of numbers the error of the second against the first."""

    name: str
    what: str
    snr: float | None = None  # signal to noise, dB
    largest: float | None = None  # largest difference of two values
    unequal: int = 0  # values that are not equal


def is_archive(path: str) -> bool:
    """Whether a path is that of an archive, a folder of shards of one, a URL, or "-", standard input.

    A repository of the Hub is one where it has an archive.
    """
    if path == "-" or "://" in path:
        return True
    if not os.path.lexists(path):
        with contextlib.suppress(SourceError):  # a source says what is wrong
            return of_repository(path) != path
        return False
    if os.path.isdir(path):
        return any(f.endswith(".rac") for f in os.listdir(path))
    return begins_as_archive(path)


def begins_as_archive(path: str) -> bool:
    """Whether a path is that of a file which begins as an archive does."""
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, "rb") as f:  # whoever reads it says what is wrong
            return f.read(len(MAGIC)) == MAGIC
    return False


@contextlib.contextmanager
def contents(path: str, pickles: bool = False, dequantise: bool = False) -> Iterator[Contents]:
    """The content of an archive (all its shards), or of a source; RacError where it is neither, or damaged.

    `pickles` allows weights that torch pickled, `dequantise` reads the codes of a source as what they stand for.
    """
    if not is_archive(path):
        source = open_source(path, pickles=pickles, dequantise=dequantise)
        tensors = {t.name: Stated(t.name, t.dtype, t.shape, t.nbytes, partial(dense, t)) for t in source.tensors}
        yield Contents(tensors, {a.name: a.read for a in source.attachments}, bool(source.dequantised))
        return
    with at_random(path, os.path.join(tempfile.gettempdir(), "-")) as archives, RacFile(archives) as f:
        numbers = bool(Provenance.of(f.archives[0].header, path).dequantised)
        files = [*names_of_files(f), *({GGUF_HEADER} & set(f.attachments()))]  # a source has the latter as it is
        yield Contents(dict(_stated(f)), {n: partial(f.attachment, n) for n in files}, numbers)


@contextlib.contextmanager
def both(a: str, b: str, pickles: bool = False) -> Iterator[tuple[Contents, Contents]]:
    """Two contents to be compared: where one has the numbers of codes, a source gives the other's numbers too."""
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(contents(path, pickles)) for path in (a, b))
        if one.numbers != two.numbers:
            again = (stack.enter_context(contents(path, pickles, dequantise=True)) for path in (a, b))
            one, two = again
        yield one, two


def _stated(f: RacFile) -> Iterator[tuple[str, Stated]]:
    for name, (archive, e) in f._tensors.items():
        n = tensor_bytes(e) // (1 + len(e.aliases))
        stored = e.size if name == e.name else 0

        def digest(archive: Any = archive, e: Any = e) -> bytes | None:
            with InFile(archive.access.name, repr(e.name)):
                found = archive.record(e).head.get("digest")
            return found if isinstance(found, bytes) else None

        yield name, Stated(name, e.dtype, e.shape, n, partial(f.get_tensor, name), stored, e.method, digest)


def dense(t: SourceTensor) -> NDArray[Any]:
    """A tensor of a source as a numpy array."""
    return to_framework(t.read(0, t.nbytes), t.dtype, t.shape, "np")  # type: ignore[no-any-return]


def by_digest(a: Stated | None, b: Stated | None) -> bool:
    """Whether two tensors are equal as far as their archives state: of type, shape and digest."""
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    known = a.digest()
    return known is not None and known == b.digest()


def difference(a: Stated | None, b: Stated | None) -> Difference | None:
    """How the second differs from the first; None: in no bit. Equal digests are taken for equal bytes."""
    if a is None or b is None:
        one = a or b
        assert one is not None  # noqa: S101
        return Difference(one.name, "only in A" if b is None else "only in B")
    what = "differs" if a.dtype == b.dtype else f"{a.dtype} in A, {b.dtype} in B"
    if a.shape != b.shape:
        return Difference(a.name, f"{a.dtype} {list(a.shape)} in A, {b.dtype} {list(b.shape)} in B")
    if by_digest(a, b):
        return None
    if "F4" in (a.dtype, b.dtype) and a.dtype != b.dtype:  # packed, two values in a byte
        return Difference(a.name, what)
    x, y = a.read(), b.read()
    if a.dtype == b.dtype and x.tobytes() == y.tobytes():
        return None
    return _numbers(Difference(a.name, what), x, y)


def _numbers(found: Difference, x: NDArray[Any], y: NDArray[Any]) -> Difference:
    """The error of numbers, in float64 (complex128), piece by piece; NaN in both places is no difference."""
    energy = error = largest = 0.0
    unequal, wide = 0, np.complex128 if "c" in x.dtype.kind + y.dtype.kind else np.float64
    x, y = x.reshape(-1), y.reshape(-1)
    for i in range(0, x.size, 1 << 20):
        p, q = x[i : i + (1 << 20)].astype(wide), y[i : i + (1 << 20)].astype(wide)
        same = (p == q) | (np.isnan(p) & np.isnan(q))
        off = np.where(same, 0, np.abs(p - q))
        energy, error = energy + float((np.abs(p) ** 2).sum()), error + float((off**2).sum())
        largest, unequal = max(largest, float(off.max())), unequal + int((~same).sum())
    if not unequal:
        return replace(found, what="equal numbers of other bits" if found.what == "differs" else found.what)
    snr = 10 * math.log10(energy / error) if energy and error and math.isfinite(energy / error) else None
    return replace(found, snr=snr, largest=largest, unequal=unequal)
