"""One exception tree for everything that can go wrong: all errors are RacErrors."""

from __future__ import annotations


class RacError(Exception):
    """Base of all errors of this package; names file, unit and offset where they are known."""

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


class UnsupportedError(RacError):
    """The file is well formed but needs something that this version does not know."""


class LimitError(RacError):
    """A size exceeds the limit that protects the reader."""


class SourceError(RacError):
    """The input of a pack is missing, damaged, or not a model."""


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
