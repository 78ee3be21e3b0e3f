"""The mix of texts that comes with this package: what a language model is calibrated on where nobody names a text."""

from __future__ import annotations

import functools
from importlib import resources

from rac.container import zstd

FILE = "mix.txt.zst"  # its pieces, their sources and licences: texts/README.md; made by tools/calibration_mix.py


@functools.cache
def mix() -> str:
    """Prose, speech, code and several languages; any beginning of it is a mix of them already."""
    frame = (resources.files("rac.calibrate") / "texts" / FILE).read_bytes()
    return zstd.decompress(frame, zstd.content_size(frame)).decode()
