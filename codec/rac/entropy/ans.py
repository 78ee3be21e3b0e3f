"""ANS lanes through constriction, its only door, and the order in which the words of several lanes are read.

A lane alone is a stream of constriction; a tile holds the words of all its lanes in the order in which a decoder that
steps them side by side asks for them (format_spec/stages/lanes.md, "Lanes"). Plain numpy, a row of lanes at a time: the
kernels are held to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.entropy import tables
from rac.errors import ChecksumError, FormatError, MissingDependencyError

Array = NDArray[Any]
Segment = tuple[int, int]  # (steps of this lane, table) of one run of symbols under one table


def _stream() -> Any:
    """The coders of constriction, which some platforms have no wheel of: only what runs without C kernels needs it."""
    try:
        from constriction import stream
    except ImportError as e:
        what = "coding without the C kernels needs constriction: pip install 'constriction>=0.5,<0.6'"
        raise MissingDependencyError(f"{what}, or install rac-codec's wheel or a compiler, for the kernels") from e
    return stream


class Models:
    """One constriction model per frequency table; zero frequencies are left out of it and mapped around."""

    def __init__(self, freq: NDArray[np.uint16]) -> None:
        self.symbols = [np.flatnonzero(t).astype(np.int32) for t in freq]
        self.index = np.zeros((len(freq), 256), np.uint8)  # (T, 256) place of a symbol in the model of a table
        for row, s in zip(self.index, self.symbols, strict=True):
            row[s] = np.arange(len(s), dtype=np.uint8)
        self._stack = (stream := _stream()).stack
        self._models: list[Any] = [
            stream.model.Categorical(t[s].astype(np.float64) / 4096.0, perfect=True)
            for t, s in zip(freq, self.symbols, strict=True)
        ]

    def encode(self, places: NDArray[np.int32], segments: list[Segment]) -> NDArray[np.uint32]:
        """Words of one lane, in decode order; `places` (n,) are its symbols by their place in the model."""
        coder = self._stack.AnsCoder()
        end = len(places)
        for steps, table in reversed(segments):
            if steps:
                coder.encode_reverse(places[end - steps : end], self._models[table])
                end -= steps
        words: NDArray[np.uint32] = coder.get_compressed()[::-1]
        return words

    def decode(self, words: NDArray[np.uint32], segments: list[Segment]) -> NDArray[np.uint8]:
        """Symbols of one lane; ChecksumError unless it ends empty, as its encoder began."""
        if len(words) and words[0] == 0:
            raise FormatError("lane starts with a zero word")
        coder = self._stack.AnsCoder(np.ascontiguousarray(words[::-1]))
        out = [self.symbols[table][coder.decode(self._models[table], steps)] for steps, table in segments if steps]
        if not coder.is_empty():
            raise ChecksumError("ANS lane does not end in its initial state")
        return np.concatenate(out).astype(np.uint8) if out else np.empty(0, np.uint8)


def merge(streams: list[NDArray[np.uint32]], freq: NDArray[np.uint16], segments: NDArray[np.int64]) -> Array:
    """Words (W,) uint32 of all lanes in the order of reading; `streams` holds the words of each."""
    counts = np.array([len(s) for s in streams], np.int64)
    words = np.concatenate(streams)
    lane = _order(words, counts, freq, segments, merged=False)
    out = np.empty(len(words), np.uint32)
    out[np.argsort(lane, kind="stable")] = words  # lane by lane, the k-th word of each keeps its place among its own
    return out


def split(
    words: NDArray[np.uint32], counts: Array, freq: NDArray[np.uint16], segments: NDArray[np.int64]
) -> list[NDArray[np.uint32]]:
    """Inverse of `merge`; ChecksumError where words are left over."""
    lane = _order(words, counts.astype(np.int64), freq, segments, merged=True)
    if len(lane) != len(words):
        raise ChecksumError("ANS lane does not end in its initial state")
    by_lane = words[np.argsort(lane, kind="stable")]
    return np.split(by_lane, np.cumsum(counts, dtype=np.int64)[:-1])


def _order(words: Array, counts: Array, freq: Array, segments: Array, merged: bool) -> NDArray[np.int64]:
    """Lane of each word in the order of reading; `words` are in that order already, or lane after lane."""
    lanes, lut = len(counts), tables.lookup(freq, np.zeros(freq.shape[1], np.uint8))
    place = np.cumsum(counts) - counts  # of the next word of each lane, where they lie lane after lane
    head = np.minimum(counts, 2)
    order, at = [np.repeat(np.arange(lanes), head)], int(head.sum())
    x = np.zeros(lanes, np.uint64)
    start = np.cumsum(head) - head if merged else place
    for k in range(2):
        has = head > k
        x[has] = x[has] << np.uint64(32) | words[start[has] + k].astype(np.uint64)
    left = counts - head
    place += head
    for total, table in segments.tolist():
        for n in range(total, 0, -lanes):
            v = x[:n]
            e = lut[table, (v >> np.uint64(12)) & np.uint64(4095)].astype(np.uint64)
            slot = e >> np.uint64(8) & np.uint64(4095)
            v = ((v >> np.uint64(24)) * (e >> np.uint64(20)) + slot) << np.uint64(12) | (v & np.uint64(4095))
            need = np.flatnonzero((v >> np.uint64(32) == 0) & (left[:n] > 0))
            if len(need):
                new = words[at : at + len(need)] if merged else words[place[need]]
                v[need] = v[need] << np.uint64(32) | new.astype(np.uint64)
                left[need] -= 1
                place[need] += 1
                at += len(need)
                order.append(need)
            x[:n] = v
    return np.concatenate(order)
