"""Checksums of zip files whose members were given other bytes of the same length."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from typing import BinaryIO

from rac.errors import FormatError

_LOCAL, _CENTRAL = 30, 46  # bytes of a header, without name, extra field and comment
_DESCRIBED = 8  # flag: the checksum stands behind the data, too
_CHUNK = 1 << 22


def mend(file: BinaryIO, changed: Sequence[tuple[int, int]]) -> None:
    """Put the checksums of the members in which an (offset, size) range lies right; FormatError for no zip file."""
    try:
        with zipfile.ZipFile(file) as z:
            members, at = z.infolist(), z.start_dir
        left = file.seek(0, 2)  # members that lie on each other would be read again and again
        for info in members:
            begin = info.header_offset + _LOCAL + sum(_numbers(file, info.header_offset + 26, 2))
            end = begin + info.compress_size
            if info.compress_type == zipfile.ZIP_STORED and any(begin <= a < end for a, _ in changed):
                left -= info.compress_size
                if left < 0:
                    raise ValueError("members lie on each other")
                crc = _crc(file, begin, info.compress_size).to_bytes(4, "little")
                _put(file, at + 16, crc)
                if info.flag_bits & _DESCRIBED:
                    signed = _read(file, end, 4) == b"PK\7\x08"
                    _put(file, end + 4 * signed, crc)
                else:
                    _put(file, info.header_offset + 14, crc)
            at += _CENTRAL + sum(_numbers(file, at + 28, 3))
    except OSError:  # of the disk
        raise
    except Exception as e:  # zipfile checks little before it uses it
        raise FormatError(f"the frame is not that of a zip file: {e}") from e


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    data = file.read(size)
    if len(data) != size:
        raise ValueError("it ends early")
    return data


def _numbers(file: BinaryIO, at: int, count: int) -> list[int]:
    data = _read(file, at, 2 * count)
    return [int.from_bytes(data[i : i + 2], "little") for i in range(0, 2 * count, 2)]


def _crc(file: BinaryIO, at: int, size: int) -> int:
    crc = 0
    for begin in range(at, at + size, _CHUNK):
        crc = zlib.crc32(_read(file, begin, min(_CHUNK, at + size - begin)), crc)
    return crc


def _put(file: BinaryIO, at: int, crc: bytes) -> None:
    file.seek(at)
    file.write(crc)
