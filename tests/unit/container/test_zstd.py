"""Zstandard frames under the rules of container.md, section 4."""

from __future__ import annotations

import tracemalloc

import pytest
import zstandard

from rac.container.zstd import Digest, compress, decompress, digest
from rac.errors import FormatError


@pytest.mark.parametrize("data", [b"", b"a", bytes(100_000), bytes(range(256)) * 500])
def test_round_trip(data):
    for level in (1, 3, 9, 19):
        frame = compress(data, level)
        assert decompress(frame, len(data)) == decompress(memoryview(frame), len(data)) == data
        parameters = zstandard.get_frame_parameters(frame)
        assert (parameters.content_size, parameters.has_checksum, parameters.dict_id) == (len(data), False, 0)


def test_frames_that_are_refused():
    data = b"hello " * 1000
    frame = compress(data)
    bad = {
        "other size": (frame, len(data) + 1),
        "cut off": (frame[:-1], len(data)),
        "bytes behind": (frame + b"\0", len(data)),
        "two frames": (frame * 2, len(data)),
        "no frame": (b"", 0),
        "skippable": (b"\x50\x2a\x4d\x18\x00\x00\x00\x00", 0),
        "skippable in front": (b"\x50\x2a\x4d\x18\x00\x00\x00\x00" + frame, len(data)),
        "no size": (zstandard.ZstdCompressor(write_content_size=False).compress(data), len(data)),
        "dictionary": (
            zstandard.ZstdCompressor(dict_data=zstandard.ZstdCompressionDict(data[:2000])).compress(data),
            len(data),
        ),
        "more than it states": (b"\x28\xb5\x2f\xfd\x20\x04\x53\x00\x00a", 4),
    }
    for what, (frame_, size) in bad.items():
        with pytest.raises(FormatError):
            decompress(frame_, size)
        assert what


def test_a_window_is_at_most_128_MiB():
    """RAC-ZST-003. One block of 1000 times "a", under window descriptors of 2**27 and 2**28 bytes."""
    for descriptor, fits in ((17 << 3, True), (18 << 3, False)):
        frame = b"\x28\xb5\x2f\xfd\x80" + bytes([descriptor]) + (1000).to_bytes(4, "little") + b"\x43\x1f\x00a"
        if fits:
            assert decompress(frame, 1000) == b"a" * 1000
        else:
            with pytest.raises(FormatError):
                decompress(frame, 1000)


def test_a_false_size_allocates_nothing():
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 45).to_bytes(8, "little") + b"\x01\x00\x00"
    tracemalloc.start()
    try:
        for size in (10, 1 << 20):
            with pytest.raises(FormatError):
                decompress(frame, size)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_digest_in_pieces():
    d = Digest()
    d.update(b"ab")
    d.update(memoryview(b"c"))
    assert d.value() == digest(b"abc")
