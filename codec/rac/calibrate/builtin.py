"""The mix of texts that comes with this package: what a language model is calibrated on where nobody names a text."""

from __future__ import annotations

import functools
from importlib import resources

from rac.container import zstd

FILE = "mix.txt.zst"  # its pieces, their sources and licences: texts/README.md; made by tools/calibration_mix.py
AUTO = "auto"
"""What names this mix where a text file is named otherwise."""


@functools.cache
def whole() -> str:
    """Prose, speech, code and several languages; any part of it is a mix of them already."""
    frame = (resources.files("rac.calibrate") / "texts" / FILE).read_bytes()
    return zstd.decompress(frame, zstd.content_size(frame)).decode()


def _end() -> int:
    return whole().index("\n\n", len(whole()) * 4 // 5) + 2


def learned() -> str:
    """The first four fifths, to calibrate on."""
    return whole()[: _end()]


def measured() -> str:
    """The last fifth, which no calibration has seen: to measure on."""
    return whole()[_end() :]
