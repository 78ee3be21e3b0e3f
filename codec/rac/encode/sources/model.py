"""What a source consists of. Everything pickles, so that worker processes can read for themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from rac.errors import SourceError
from rac.records import Online

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
REFUSE_PICKLE = (
    "pickled weights are refused because loading them runs code; convert them to .safetensors first, or name the file "
    "or its folder with --allow-pickle-weights, in Python pickles=True, which loads nothing but tensors "
    "(torch.load, weights_only)"
)


class Bytes(Protocol):
    """Bytes that are read when they are asked for; it pickles."""

    @property
    def size(self) -> int:
        """How many there are."""

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), in a fresh writable array."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a file."""

    path: str
    offset: int
    size: int
    pinned: ClassVar[bool] = False  # whether the bytes follow from the address

    @property
    def whole(self) -> int:
        """Bytes of the file."""
        return os.path.getsize(self.path)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of the range, in a fresh writable array."""
        out = np.empty(stop - start, np.uint8)
        left, at = out.data, self.offset + start
        try:
            # A descriptor of its own, so that threads and processes never share a file position.
            with open(self.path, "rb", buffering=0) as f:
                f.seek(at)
                while left:
                    got = f.readinto(left)
                    if not got:
                        raise SourceError("file became shorter", file=self.path, offset=at)
                    left, at = left[got:], at + got
        except OSError as e:
            raise SourceError(e.strerror or str(e), file=self.path, offset=at) from e
        return out


Data = Bytes | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor; its bytes are in C order and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Data
    extra: dict[str, Any] | None = None
    tie: int | None = None  # shared by the tensors of a memory source that are one memory
    online: Online | None = None  # what the layer does to its input before this weight (rac.linalg.transform)
    matrix: NDArray[np.float32] | None = None  # (h, h) the object that `online` names, one for each name
    table: bool | None = None  # whether it is an embedding or an output layer; None: its name says (tables.py)

    @property
    def nbytes(self) -> int:
        """All its bytes."""
        return self.data.size

    def matches(self, pattern: str) -> bool:
        """Whether a pattern (fnmatch) is that of the name, or of FOLDER/FILE::NAME where its file lies in a folder."""
        file = str((self.extra or {}).get("shard", ""))
        full = "/" in file and "::" not in self.name and fnmatchcase(f"{file}::{self.name}", pattern)
        return full or fnmatchcase(self.name, pattern)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop): fresh and writable out of a file, a view of an array in memory."""
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"bytes {start}..{stop} are not inside the {self.nbytes} of tensor {self.name!r}")
        return self.data[start:stop] if isinstance(self.data, np.ndarray) else self.data.read(start, stop)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that travels with the tensors."""

    name: str
    data: Extent | bytes

    def read(self) -> bytes:
        """All its bytes."""
        return self.data if isinstance(self.data, bytes) else self.data.read(0, self.data.size).tobytes()


class Tape(Protocol):
    """Brings the data of tensors near, one after the other, before they are read."""

    check: bool
    """Whether whole files are read and compared with what they are listed as."""

    @property
    def limit(self) -> int:
        """Bytes of tensors that it holds at once."""

    def start(self, tensors: Sequence[SourceTensor], beside: str) -> None:
        """Bring these from now on; what is kept of them lies in the folder of the path `beside`."""

    def release(self, tensor: SourceTensor) -> None:
        """A tensor is done with."""

    def finish(self) -> None:
        """Wait for what is left; ChangedError where files are not what they are listed as."""

    def close(self) -> None:
        """End it, and leave nothing."""


@dataclass(frozen=True, slots=True)
class Source:
    """The input of a pack. `kind` is "safetensors", "hf", "gguf", "memory", or one of `sources.others`."""

    kind: str
    tensors: tuple[SourceTensor, ...]
    attachments: tuple[Attachment, ...]
    metadata: dict[str, str]
    skipped: tuple[str, ...] = ()  # files that are not packed: too large, or bookkeeping of downloads
    headers: Mapping[str, bytes] = field(default_factory=dict)
    """Bytes in front of the tensors of each safetensors file, by its name; "" for a file that was named itself."""
    links: Mapping[str, str] = field(default_factory=dict)  # of a directory, to targets inside it
    folders: tuple[str, ...] = ()  # directories with nothing in them
    dequantised: tuple[str, ...] = ()  # what the stored weights are, where tensors are the numbers that they stand for
    frames: Mapping[str, bytes] = field(default_factory=dict)
    """Size and all bytes but those of tensors of each file of another kind, by its name (rac.encode.sources.others)."""
    lost: str = ""  # why the source does not come back as the file that it is
    every: tuple[SourceTensor, ...] = ()  # all, where files are not what a model is loaded from
    pieces: Mapping[str, int] = field(default_factory=dict)  # large files, and of how many attachments each consists
    hub: Mapping[str, str] = field(default_factory=dict)  # "repository" and "revision", where it came from the Hub
    sha256: Mapping[str, str] = field(default_factory=dict)  # of files, by name
    tape: Tape | None = None  # what brings the tensors in their order, where they are far away
