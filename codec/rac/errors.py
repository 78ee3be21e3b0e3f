"""One exception tree for everything that can go wrong: all errors are RacErrors.

Where a program has imported safetensors, they are SafetensorErrors as well: who catches those catches these.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from typing import Any, Self


@functools.cache
def _as_theirs(kind: type[RacError], theirs: type[Exception]) -> type[RacError]:
    """A subclass of both under the name of the first, which is what copies and pickles are made of."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "_ours": kind}
    return type(kind.__name__, (kind, theirs), names)


class RacError(Exception):
    """Base of all errors of this package; names file, unit and offset where they are known."""

    _ours: type[RacError] | None = None  # of a subclass that is a SafetensorError too: the class without that

    def __new__(cls, *args: Any, **_: Any) -> Self:
        """An error of this class, and of safetensors' where that is imported: else nobody can be waiting for it."""
        theirs = getattr(sys.modules.get("safetensors"), "SafetensorError", None)
        both = isinstance(theirs, type) and cls._ours is None and not issubclass(cls, theirs)
        return super().__new__(_as_theirs(cls, theirs) if both else cls, *args)  # type: ignore[arg-type, return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        return (self._ours or type(self), self.args, self.__dict__)

    def __init__(
        self, message: str, *, file: str | None = None, unit: str | None = None, offset: int | None = None
    ) -> None:
        self.message, self.file, self.unit, self.offset = message, file, unit, offset
        super().__init__(message)

    def __str__(self) -> str:
        where = [w for w in (self.file, self.unit) if w]
        if self.offset is not None:
            where.append(f"offset {self.offset}")
        return f"{self.message} [{', '.join(where)}]" if where else self.message


class FormatError(RacError):
    """The bytes break the specification."""


class TruncatedError(FormatError):
    """The bytes end before the structure does."""


class ChecksumError(FormatError):
    """A checksum, a digest or a final coder state does not match."""


class DamagedError(FormatError):
    """All that was found damaged by a reader that was asked to go on; `damaged` maps each name to its error."""

    def __init__(self, damaged: dict[str, RacError], *, file: str | None = None, more: str = "") -> None:
        self.damaged = dict(damaged)
        some = ", ".join(f"{n!r} ({e.message})" for n, e in list(damaged.items())[:5])
        super().__init__(
            f"{len(damaged)} damaged: {some}{', ...' if len(damaged) > 5 else ''}{more}; they were not handed out",
            file=file,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (self._ours or type(self), (self.damaged,), self.__dict__)


class UnsupportedError(RacError):
    """The file is well formed but needs something that this version does not know."""


class LimitError(RacError):
    """A size exceeds the limit that protects the reader."""


class SourceError(RacError):
    """The input of a pack is missing, damaged, or not a model."""


class MissingFileError(SourceError, FileNotFoundError):
    """No file has that name."""

    def __str__(self) -> str:
        return f"{self.message}: {self.file}" if self.file else self.message

    def __init__(self, message: str = os.strerror(errno.ENOENT), *, file: str | None = None) -> None:
        super().__init__(message, file=file)
        self.errno, self.strerror, self.filename = errno.ENOENT, message, file


class UnstorableError(SourceError, ValueError):
    """A value that cannot be stored: no tensor, or one without plain memory."""


class StateDictError(SourceError, RuntimeError):
    """Tensors that a file or a model cannot take as they are: common memory, none at all, other names."""


class SliceError(RacError, IndexError):
    """An index that selects no part of a tensor."""


class OutputError(RacError):
    """The output already exists or cannot be written."""


class TransformError(RacError):
    """A transform of a model does not fit its architecture, or has changed what the model computes."""


class DivergedError(RacError):
    """Learning a transform diverged: the loss is no number, or stays above that of the start."""


class BudgetError(RacError):
    """No file of the wanted size or quality can be made."""


class NameNotFoundError(RacError, KeyError):
    """The archive holds nothing of that name."""

    __str__ = RacError.__str__


class MismatchError(RacError):
    """A comparison with the source found a difference."""


class MissingDependencyError(RacError, ImportError):
    """An optional package is needed for this."""

    __str__ = RacError.__str__
