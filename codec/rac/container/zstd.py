"""Bounded zstd and XXH3: the only doors to zstandard and xxhash."""

from __future__ import annotations

import threading

import xxhash
import zstandard

from rac.errors import FormatError

WINDOW = 1 << 27
_MAGIC = b"\x28\xb5\x2f\xfd"  # a skippable frame is not a frame of 0 bytes
_local = threading.local()  # a (de)compressor for each thread: making one costs more than a small frame


def compress(data: bytes | memoryview, level: int = 9) -> bytes:
    """One zstd frame with its content size and no checksum (units carry their own)."""
    held: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in held:
        held[level] = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
    return held[level].compress(data)


def decompress(data: bytes | memoryview, size: int) -> bytes:
    """Decode one zstd frame of exactly `size` bytes; nothing is allocated for any other claim."""
    try:
        if data[:4] != _MAGIC or (stated := zstandard.get_frame_parameters(data)).content_size != size:
            raise FormatError("zstd frame does not hold the size that the record states")
        if stated.window_size > WINDOW:
            raise FormatError("zstd frame needs a window of more than 128 MiB")
        if not hasattr(_local, "zstd"):
            _local.zstd = zstandard.ZstdDecompressor(max_window_size=WINDOW)
        if size == 0:  # the one-call decoder does not look into a frame that says it is empty
            frame = _local.zstd.decompressobj(read_across_frames=False)
            if frame.decompress(data) or not frame.eof or frame.unused_data:
                raise FormatError("zstd frame is damaged or followed by bytes")
            return b""
        out: bytes = _local.zstd.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise FormatError(f"zstd frame is damaged: {e}") from None
    if len(out) != size:
        raise FormatError("zstd frame is damaged")
    return out


def content_size(data: bytes) -> int:
    """The size of content that the head of a frame states; FormatError where there is none."""
    try:
        size = zstandard.frame_content_size(data)
    except zstandard.ZstdError as e:
        raise FormatError(f"zstd frame is damaged: {e}") from None
    if size < 0:
        raise FormatError("zstd frame does not state the size of its content")
    return int(size)


def shorter(data: bytes, level: int = 9) -> bytes:
    """A frame of `data`, or `data` itself where that is no longer."""
    frame = compress(data, level)
    return frame if len(frame) < len(data) else data


def expand(data: bytes, size: int) -> bytes:
    """Inverse of `shorter` for content of `size` bytes: data of that length is taken as it is."""
    return data if len(data) == size else decompress(data, size)


def xxh3(*parts: bytes | memoryview) -> int:
    """XXH3-64, seed 0, of the concatenated parts."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
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
