"""Second decoder of the RAC format, written from the text of format_spec alone.

Slow and plain on purpose. Clause ids in the code are those of the text.

    decode(source)        -> Archive, everything read forward and verified
    RandomAccess(source)  -> index first, then single tensors
    decode_set(path)      -> [Archive, ...], all shards of a set
"""

from .archive import Archive, RandomAccess, decode
from .errors import (
    ChecksumError,
    FormatError,
    LimitError,
    Limits,
    RacError,
    TruncatedError,
    UnsupportedError,
)
from .shards import decode_set

__all__ = [
    "Archive",
    "ChecksumError",
    "FormatError",
    "LimitError",
    "Limits",
    "RacError",
    "RandomAccess",
    "TruncatedError",
    "UnsupportedError",
    "decode",
    "decode_set",
]
