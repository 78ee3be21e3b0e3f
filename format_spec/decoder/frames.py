"""Zstandard frames, container.md section 4."""

import zstandard

from .errors import FormatError

MAX_WINDOW = 1 << 27  # RAC-ZST-003


def decompress(frame: bytes, size: int) -> bytes:
    """Return the size bytes that the one frame holds."""
    _check_layout(frame, size)
    decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    try:
        if size:
            # The output buffer has the stated size, which is `size` by now (RAC-SEC-006).
            content = decoder.decompress(frame, max_output_size=size, read_across_frames=False)
        else:
            # The call above does not look at the blocks of an empty frame; this one does.
            with decoder.stream_reader(frame) as reader:
                content = reader.read(1)
    except zstandard.ZstdError as error:
        raise FormatError(f"RAC-ZST-005: {error}") from error
    if len(content) != size:
        raise FormatError("RAC-ZST-005: frame yields another number of bytes")
    return content


def _check_layout(frame: bytes, size: int) -> None:
    """Frame header and ends of blocks (RFC 8878 sections 3.1.1.1 and 3.1.1.2)."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 5:
        raise FormatError("RAC-ZST-001: not a Zstandard frame")
    descriptor = frame[4]
    if descriptor & 0x08:
        raise FormatError("RAC-ZST-001: reserved bit of the frame header")
    single_segment = bool(descriptor & 0x20)
    window_bytes = 0 if single_segment else 1
    id_bytes = (0, 1, 2, 4)[descriptor & 3]
    size_bytes = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    at = 5 + window_bytes + id_bytes + size_bytes
    if len(frame) < at:
        raise FormatError("RAC-ZST-001: frame header is cut off")
    if any(frame[5 + window_bytes : 5 + window_bytes + id_bytes]):
        raise FormatError("RAC-ZST-004: frame uses a dictionary")
    if size_bytes == 0:
        raise FormatError("RAC-ZST-002: frame does not state its content size")
    stated = int.from_bytes(frame[at - size_bytes : at], "little") + (256 if size_bytes == 2 else 0)
    if stated != size:
        raise FormatError(f"RAC-ZST-002: content size is {stated}, not {size}")
    if single_segment:
        window = stated
    else:
        base = 1 << (10 + (frame[5] >> 3))
        window = base + base // 8 * (frame[5] & 7)
    if window > MAX_WINDOW:
        raise FormatError("RAC-ZST-003: window is too large")
    last = False
    while not last:
        block = int.from_bytes(frame[at : at + 3], "little")
        if len(frame) < at + 3:
            raise FormatError("RAC-ZST-001: frame is cut off")
        last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        at += 3 + (1 if kind == 1 else length)
    if descriptor & 0x04:
        at += 4
    if at != len(frame):
        raise FormatError("RAC-ZST-001: frame does not end with its unit")
