"""`rac.safe_open`: the handle that programs written for safetensors know, over a `.rac` file."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

from rac import frameworks
from rac.decode.archive import RacFile
from rac.decode.slices import Slice
from rac.errors import SourceError

_FRAMEWORKS = {"pt": "pt", "torch": "pt", "pytorch": "pt", "np": "np", "numpy": "np"}
_BACKENDS = ("mmap", "pread")


class SafeOpen(AbstractContextManager["SafeOpen"]):
    """The tensors of a file, one at a time, under the method names of safetensors.

    `framework` is "pt" ("torch", "pytorch") or "np" ("numpy"). `device` is what torch takes: a name, a number, a
    `torch.device`. `filename` may also be a URL, bytes, or a file object that can seek. `backend` is accepted, and
    changes nothing: bytes are always read, never mapped.

    ValueError for an argument of another value. RacError where the file is missing (FileNotFoundError, too), damaged
    or closed; where a program has imported safetensors it is a SafetensorError as well.
    """

    def __init__(self, filename: Any, framework: str, device: Any = "cpu", *, backend: str = "mmap") -> None:
        self._file: RacFile | None = None  # where the next lines raise
        if framework not in _FRAMEWORKS:
            raise ValueError(f"framework must be 'pt' or 'np', not {framework!r}")
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be 'mmap' or 'pread', not {backend!r}")
        kind = _FRAMEWORKS[framework]
        self._name = os.fspath(filename) if isinstance(filename, str | os.PathLike) else type(filename).__name__
        self._file = RacFile(filename, kind, frameworks.device_name(device) if kind == "pt" else str(device))

    @property
    def _open(self) -> RacFile:
        if self._file is None:
            raise SourceError("is closed", file=self._name)
        return self._file

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; what is asked afterwards is refused."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def keys(self) -> list[str]:
        """Names of all tensors, sorted, as safetensors has them; `offset_keys` are in the order of the file."""
        return sorted(self._open.keys())

    def offset_keys(self) -> list[str]:
        """Names of all tensors in the order of the file."""
        return self._open.keys()

    def metadata(self) -> dict[str, str] | None:
        """Text to text, as the source had it; None where there is none."""
        return self._open.metadata() or None

    def get_tensor(self, name: str) -> Any:
        """A whole tensor; NameNotFoundError where it is not there."""
        return self._open.get_tensor(name)

    def get_tensors(self) -> dict[str, Any]:
        """All tensors by name, in the order of the file."""
        return self._open.load()

    def get_slice(self, name: str) -> Slice:
        """A view of a tensor: `f.get_slice(n)[10:20, :]` reads and decodes what it needs alone."""
        return self._open.get_slice(name)


safe_open = SafeOpen
"""The name of the class in safetensors."""
