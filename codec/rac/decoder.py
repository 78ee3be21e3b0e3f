"""A tensor whose front units were parsed: what decodes its tiles, on the CPU or for a GPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rac.container.access import InFile
from rac.container.zstd import xxh3
from rac.errors import ChecksumError
from rac.grid import Box
from rac.stages.words import put_words
from rac.tensor import Tensor

Array = NDArray[Any]


class Decoder:
    """Decodes the units of one tensor, in any order and from any thread: `coder`, and `numbers` behind it, are open."""

    def __init__(
        self, t: Tensor, first: Sequence[bytes | memoryview], objects: Sequence[NDArray[np.float32]] = ()
    ) -> None:
        """`first` has the units in front of the tiles, `objects` the matrices that the tensor uses."""
        self.tensor, self._objects = t, objects
        for i, unit in enumerate(first):
            self.check(i, unit)
        chain = t.chain
        with self.at(0):
            shared = b"" if chain.coder.front is None else bytes(first[0])
            self.coder = chain.coder.open(shared, t.grid)
        self.numbers: Any = None  # OpenNumbers where the chain has numbers; who calls `finish` knows
        if chain.numbers is not None:
            with self.at(t.first - 1):
                self.numbers = chain.numbers.open(bytes(first[-1]), t.context)

    @functools.cached_property
    def units(self) -> Array:
        """(units, 2) uint64 length and checksum of each unit, for the CPU kernel."""
        return np.frombuffer(self.tensor.record.head["units"], "<u8").reshape(-1, 2)

    def bare(self) -> Self:
        """A copy without the large tables of the coder, which it makes when it first decodes: to keep, or to use."""
        out = copy.copy(self)
        out.coder = self.coder.bare()
        return out

    def at(self, i: int) -> InFile:
        """Context that names unit `i` in the errors that pass."""
        t = self.tensor
        offset = t.units[i].offset if i < len(t.units) else 0
        return InFile(None, t.name, t.record.payload + offset, i)

    def check(self, i: int, data: bytes | memoryview) -> None:
        """ChecksumError unless the bytes of unit `i` are those that were written."""
        if xxh3(data) != self.tensor.units[i].check:
            with self.at(i):
                raise ChecksumError("checksum does not match")

    def finish(self, i: int, words: Array, dst: Array, box: Box) -> None:
        """Make numbers of the words of tile `i`, decoded before."""
        with self.at(i + self.tensor.first):
            self.numbers.decode(words, box, dst)

    def join(self, found: Array, dst: Array, box: Box) -> None:
        """Words `dst` of the part `box` from binary32 `found` (h, w), or (h, C) for whole rows, which may change."""
        product: Any = self.tensor.chain.product
        v = np.ascontiguousarray(found).view(np.float32)
        put_words(product.join(v, self._objects, box), self.tensor.dtype, dst)
