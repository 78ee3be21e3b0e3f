"""Error classes (container.md section 17) and limits (security.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class RacError(Exception):
    """Any failure of this decoder."""


class FormatError(RacError):
    """The bytes break the specification."""


class TruncatedError(FormatError):
    """The bytes end too early."""


class ChecksumError(FormatError):
    """A checksum, a digest or a final coder state does not match."""


class UnsupportedError(RacError):
    """Well-formed as far as can be seen, but needs a newer reader."""


class LimitError(RacError):
    """Larger than this reader allows."""


@dataclass(frozen=True)
class Limits:
    """The limits of security.md with their defaults."""

    header: int = 16 << 20
    head: int = 64 << 20
    index: int = 256 << 20
    tile: int = 16 << 20
    attachment: int = 1 << 30
    objects: int = 1 << 30
    free_alloc: int = 64 << 20
    expansion: int = 65536
    rank: int = 64


DEPTH = 8  # a property of the format, RAC-MSG-006
MAX_PRODUCT = 1 << 59  # RAC-TEN-007
MAX_PAYLOAD = 1 << 62  # RAC-REC-005
MAX_COUNT = 1 << 62  # container.md section 3


@contextmanager
def only_rac_errors() -> Iterator[None]:
    """Name the two failures that no single check can foresee."""
    try:
        yield
    except MemoryError as error:
        raise LimitError("out of memory") from error
    except RecursionError as error:
        raise FormatError("RAC-MSG-006: nested too deep") from error
