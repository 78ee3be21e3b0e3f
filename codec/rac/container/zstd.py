"""Bounded zstd and XXH3: the only doors to zstandard and xxhash."""

from __future__ import annotations

import xxhash
import zstandard

from rac.errors import FormatError


def compress(data: bytes | memoryview, level: int = 9) -> bytes:
    """One zstd frame with its content size and no checksum (units carry their own)."""
    return zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True).compress(data)


def decompress(data: bytes | memoryview, size: int) -> bytes:
    """Decode one zstd frame of exactly `size` bytes; nothing is allocated for any other claim."""
    try:
        if zstandard.frame_content_size(bytes(data[:18])) != size:
            raise FormatError("zstd frame does not hold the size that the record states")
        d = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(read_across_frames=False)
        out = d.decompress(bytes(data))
    except zstandard.ZstdError as e:
        raise FormatError(f"zstd frame is damaged: {e}") from None
    if len(out) != size or not d.eof or d.unused_data:
        raise FormatError("zstd frame is damaged or followed by bytes")
    return out


def xxh3(*parts: bytes | memoryview) -> int:
    """XXH3-64, seed 0, of the concatenated parts."""
    h = xxhash.xxh3_64()
    for p in parts:
        h.update(p)
    return h.intdigest()


class Digest:
    """XXH3-128, fed piece by piece. Recognises equal content; it is not a cryptographic signature."""

    def __init__(self) -> None:
        self._h = xxhash.xxh3_128()

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        self._h.update(data)

    def value(self) -> bytes:
        """16 bytes, big-endian as XXH3 canonical form."""
        return self._h.digest()


def digest(data: bytes | memoryview) -> bytes:
    """XXH3-128 of `data`, 16 bytes."""
    return xxhash.xxh3_128_digest(data)
