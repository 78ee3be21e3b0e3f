"""Tiles to words on the CPU: many in one call of the kernel, the others in Python."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
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


scratch = _Scratch()


def _each(dec: Decoder, tiles: range, data: Array) -> Iterator[tuple[int, Array, Box]]:
    """Number, unit (bytes,) and place of each of the tiles in `data`; of one alone all of it."""
    units, grid = dec.tensor.units[dec.tensor.first :], boxes(dec.tensor.grid)
    if len(tiles) == 1:
        yield tiles.start, data, grid[tiles.start]
        return
    base = units[tiles.start].offset
    for k in tiles:
        start = units[k].offset - base
        yield k, data[start : start + units[k].size], grid[k]


class Work:
    """Tiles of one or more tensors that are decoded in one call of the kernel, so that threads rarely meet."""

    def __init__(self) -> None:
        self._spans: list[native.TileSpan] = []
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
        t, kernel = dec.tensor, dec.coder.kernel()
        self._alive += (data, place.words)
        if kernel is None:
            self._alone(dec, tiles, data, place, plain)
            return
        fused = None if dec.numbers is None else dec.numbers.fused
        apart = dec.numbers is not None and fused is None  # words first, numbers behind the kernel
        if not apart and not t.chain.coder.framed:
            self._span(dec, tiles, data, place, fused)
        else:
            for k, raw, box in _each(dec, tiles, data):
                to = self._apart(dec, k, box, place) if apart else place
                if not plain:
                    dec.check(t.first + k, raw.data)
                with dec.at(t.first + k):
                    whole = dec.coder.plain(raw, box)
                self._alive.append(whole)
                self._span(dec, range(k, k + 1), whole, to, fused, checked=True)
        if fused is not None and dec.numbers.patches:
            patches = boxes(t.grid)[tiles.start : tiles.stop]
            self._patches += [(dec.numbers, box, place.part(box)) for box in patches]

    def _alone(self, dec: Decoder, tiles: range, data: Array, place: Place, plain: bool) -> None:
        """Take in tiles of a coder that decodes them in Python."""
        for k, raw, box in _each(dec, tiles, data):
            if not plain:
                dec.check(dec.tensor.first + k, raw.data)
            to = place if dec.numbers is None else self._apart(dec, k, box, place)
            self._others.append((dec, k, raw, to.part(box), plain))

    def _apart(self, dec: Decoder, k: int, box: Box, place: Place) -> Place:
        """Memory for the words of a tile that become numbers in `place` when all are decoded."""
        h, w = box.r1 - box.r0, box.c1 - box.c0
        self._held.append(scratch.take(h * w))
        words = self._held[-1][: h * w].reshape(h, w)
        self._numbers.append((dec, k, words, place.part(box)))
        return Place(words, box.r0, box.c0)

    def _span(self, dec: Decoder, tiles: range, data: Array, place: Place, fused: Any, checked: bool = False) -> None:
        """Take in tiles that the kernel checks and decodes, straight to `place`; `checked`: it need not check them."""
        t, grid, out = dec.tensor, dec.tensor.grid, place.words
        first, size, stride = t.first + tiles.start, out.itemsize, out.strides[0]
        to = native.address(out) - place.row * stride - place.col * size
        kernel: Any = dec.coder.kernel()
        whole = kernel((native.address(data), len(data)), Box(0, grid.rows, 0, grid.cols), (to, stride // size), fused)
        units = 0 if checked else native.address(dec.units) + 16 * first
        self._spans.append(native.TileSpan(whole, units, tiles.start, len(tiles), grid.tr, grid.tc, size))
        self._of.append((dec, tiles.start))

    def join(self, dec: Decoder, found: Array, dst: Array, box: Box) -> None:
        """`Decoder.join`, once all tiles are decoded."""
        self._joins.append((dec, found, dst, box))

    def run(self) -> None:
        """Decode all; FormatError or ChecksumError of the first tile that is wrong."""
        if self._spans and (wrong := native.decode_spans(self._spans)):
            number, tile, error, text = wrong
            dec, i = self._of[number]
            with dec.at(i + tile + dec.tensor.first):
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
        scratch.give(held)
