"""Tiles to words on the CPU: many in one call of the kernel, the others in Python."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from rac import native
from rac.decoder import Decoder
from rac.grid import Band, Box, boxes
from rac.native.prototypes import Array
from rac.stages.base import OpenNumbers
from rac.tensor import Tensor, numbers


@dataclass(frozen=True, slots=True)
class Place:
    """Memory that tiles are written to: words (h, w) of the matrix, the first of them at (row, col)."""

    words: Array
    row: int = 0
    col: int = 0

    def part(self, box: Box) -> Array:
        """The words of a part of the matrix, a view."""
        return self.words[box.r0 - self.row : box.r1 - self.row, box.c0 - self.col : box.c1 - self.col]


def target(t: Tensor, band: Band, out: Place) -> Place:
    """Where the tiles of a band are decoded to: `out`, or in front of a product memory of its own."""
    if t.chain.product is None:
        return out
    return Place(numbers(t, band.box.r1 - band.box.r0, t.grid.cols), band.box.r0)


class _Scratch:
    """Memory for intermediate words, used again: fresh memory costs as much as what is done in it."""

    MOST = 16 << 20

    def __init__(self) -> None:
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)  # whoever held the lock has stayed with the parent

    def _begin(self) -> None:
        self._free: list[Array] = []
        self._size = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Array:
        """Memory of `size` bytes or more."""
        with self._lock:
            for i in reversed(range(len(self._free))):
                if size <= len(self._free[i]) <= 4 * size:
                    self._size -= len(self._free[i])
                    return self._free.pop(i)
        return np.empty(size, np.uint8)

    def give(self, held: list[Array]) -> None:
        """Take memory back, for the next who asks."""
        with self._lock:
            for array in held:
                if self._size + len(array) <= self.MOST:
                    self._free.append(array)
                    self._size += len(array)


_scratch = _Scratch()


class Work:
    """Tiles of one or more tensors that are decoded in one call of the kernel, so that threads rarely meet."""

    def __init__(self) -> None:
        self._jobs: list[Any] = []
        self._of: list[tuple[Decoder, int]] = []
        self._alive: list[Array] = []
        self._others: list[tuple[Decoder, int, Array, Array, bool]] = []
        self._numbers: list[tuple[Decoder, int, Array, Array]] = []
        self._patches: list[tuple[OpenNumbers, Box, Array]] = []
        self._joins: list[tuple[Decoder, Array, Array, Box]] = []
        self._held: list[Array] = []

    def add(self, dec: Decoder, tiles: range, data: Array, place: Place, plain: bool = False) -> None:
        """Check the bytes of tiles, whose numbers follow each other, and take them in.

        `data` (bytes,) are as they lie in the file, with the padding between them; they stay until `run` is done, as
        does the `place` where words go. `plain`: one tile, checked before, its Zstandard frames expanded.
        """
        t, kernel, out = dec.tensor, dec.coder.kernel(), place.words
        first, framed = t.first, t.chain.coder.framed
        base, size, stride = t.units[first + tiles.start].offset, out.itemsize, out.strides[0]
        at, to = native.address(data), native.address(out) - place.row * stride - place.col * size
        self._alive += (data, out)
        fused = None if kernel is None or dec.numbers is None else dec.numbers.fused
        patches = fused is not None and dec.numbers is not None and dec.numbers.patches
        for k, box in zip(tiles, boxes(t.grid)[tiles.start : tiles.stop], strict=True):
            unit = t.units[first + k]
            start, length = unit.offset - base, unit.size if len(tiles) > 1 else len(data)
            if not plain:
                dec.check(first + k, data.data[start : start + length])
            if dec.numbers is None or fused is not None:  # what the coder restores is all, or the kernel goes on
                where, words = (to + box.r0 * stride + box.c0 * size, stride // size), None
                if patches:
                    self._patches.append((dec.numbers, box, place.part(box)))  # type: ignore[arg-type]
            else:
                h, w = box.r1 - box.r0, box.c1 - box.c0
                self._held.append(_scratch.take(h * w))
                words = self._held[-1][: h * w].reshape(h, w)
                self._numbers.append((dec, k, words, place.part(box)))
                where = native.address(words), w
            if kernel is None:
                raw = data[start : start + length]
                self._others.append((dec, k, raw, place.part(box) if words is None else words, plain))
                continue
            source = at + start, length
            if framed:
                with dec.at(first + k):
                    raw = dec.coder.plain(data[start : start + length], box)
                self._alive.append(raw)
                source = native.address(raw), len(raw)
            self._jobs.append(kernel(source, box, where, fused))
            self._of.append((dec, k))

    def join(self, dec: Decoder, found: Array, dst: Array, box: Box) -> None:
        """`Decoder.join`, once all tiles are decoded."""
        self._joins.append((dec, found, dst, box))

    def run(self) -> None:
        """Decode all; FormatError or ChecksumError of the first tile that is wrong."""
        if self._jobs and (wrong := native.decode_tiles(self._jobs)):
            number, error, text = wrong
            dec, i = self._of[number]
            with dec.at(i + dec.tensor.first):
                raise error(text)
        for dec, i, data, dst, plain in self._others:
            with dec.at(i + dec.tensor.first):
                dec.coder.decode(data, dec.tensor.grid.box(i), dst, plain)
        for dec, i, words, dst in self._numbers:
            dec.finish(i, words, dst, dec.tensor.grid.box(i))
        for numbers_, box, dst in self._patches:
            numbers_.patch(box, dst)
        for dec, found, dst, box in self._joins:
            dec.join(found, dst, box)
        held, self._held, self._numbers = self._held, [], []
        _scratch.give(held)
