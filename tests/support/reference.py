"""Decoding by the reference: symbols by constriction, all else in numpy. Slow; the kernels are held to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

from rac import native
from rac.entropy.ans import Models, split
from rac.stages.lanes import layout


def ans_decode(luts, words, counts, segments, n):
    """`native.ans_decode`, one lane after the other."""
    first = [np.flatnonzero(lut >> 8 & 4095 == 0) for lut in luts]  # the first slot of each symbol
    codes = [lut[at].astype(np.uint8) for lut, at in zip(luts, first, strict=True)]
    freq = np.zeros((len(luts), 256), np.uint16)
    for row, lut, at in zip(freq, luts, first, strict=True):
        row[: len(at)] = lut[at] >> 20
    models, out, lanes = Models(freq), np.empty(n, np.uint8), len(counts)
    steps = layout.lane_steps_all(segments, lanes).tolist()
    for lane, stream in enumerate(split(words, counts, freq, segments)):
        symbols = models.decode(stream, list(zip(steps[lane], segments[:, 1].tolist(), strict=True)))
        done = start = 0
        for k, (size, table) in zip(steps[lane], segments.tolist(), strict=True):
            out[start + lane : start + size : lanes] = codes[table][symbols[done : done + k]]
            done, start = done + k, start + size
    return out


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """What is decoded in the block is decoded so."""
    with native.using(None), pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "ans_decode", ans_decode)
        yield
