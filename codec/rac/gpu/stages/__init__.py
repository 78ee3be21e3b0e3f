"""The stages of the format for a GPU: one row each, an object that lays out the jobs of its tiles."""

from __future__ import annotations

from collections.abc import Sequence

from rac.decoder import Decoder
from rac.errors import UnsupportedError
from rac.gpu.layout import Batch, CoderLayout, NumbersLayout, Place, Rows, Tile
from rac.gpu.stages.lanes import Lanes
from rac.gpu.stages.numbers import Groups, Product, Trellis
from rac.gpu.stages.plain import Bits, Plain
from rac.grid import Band
from rac.native.prototypes import Array
from rac.stages.base import Chain

CODERS: dict[str, CoderLayout] = {"raw/1": Plain(), "zstd/1": Plain(), "lanes/1": Lanes(), "bits/1": Bits()}
NUMBERS: dict[str, NumbersLayout] = {"trellis/1": Trellis(), "groups/1": Groups()}
PRODUCTS: dict[str, Product] = {"lowrank/1": Product(True), "basis/1": Product(False)}


def require(chain: Chain) -> None:
    """UnsupportedError where no kernel is for a stage of a tensor."""
    tables = ((CODERS, chain.coder), (NUMBERS, chain.numbers), (PRODUCTS, chain.product))
    for table, stage in tables:
        if stage is not None and stage.id not in table:
            raise UnsupportedError(f"there is no kernel for {stage.id}; load the tensor on the CPU")


class BandLayout:
    """Where the tiles of a band go, and what follows them; `at`: offset of the tensor in `out`.

    Where the tensor has a product, `batch` takes in the whole band; else any batch may take each tile.
    """

    def __init__(self, batch: Batch, dec: Decoder, band: Band, at: int) -> None:
        self._dec, self._band = dec, band
        t, rows = dec.tensor, band.box.r1 - band.box.r0
        self._out = self._to = Place("out", at + band.box.r0 * t.grid.cols * t.word, t.grid.cols)
        self._word = t.word
        if t.chain.product is not None:
            self._word = 4
            self._to = Place("work", batch.room(4 * rows * t.grid.cols), t.grid.cols)

    def tile(self, batch: Batch, i: int, unit: Array, at: int | None = None) -> None:
        """Make tile `i` a part of a batch; FormatError where it breaks the format, LimitError where it is too large.

        `unit` (bytes,) uint8 was checked against its checksum, and has no frames (`OpenCoder.plain`). `at`: its offset
        in `units`, a multiple of 16; None: it goes to `aux`, which is `units` too.
        """
        dec, chain, to = self._dec, self._dec.tensor.chain, self._to
        with dec.at(i + dec.tensor.first):
            box = dec.tensor.grid.box(i)
            to = Place(to.memory, to.at + ((box.r0 - self._band.box.r0) * to.stride + box.c0) * self._word, to.stride)
            at = batch.put(unit) if at is None else at
            tile, coder = Tile(batch, dec, box, unit, at, len(batch.status)), CODERS[chain.coder.id]
            batch.status.append((dec, i))
            if chain.numbers is None:
                coder.words(dec.coder, tile, to)
                return
            numbers = NUMBERS[chain.numbers.id]
            numbers.lay(dec.numbers, tile, coder.codes(dec.coder, tile, numbers.anywhere), to)

    def finish(self, batch: Batch, objects: Sequence[tuple[int, int]]) -> None:
        """The product behind all tiles, if there is one; `objects`: see `Product.lay`."""
        product = self._dec.tensor.chain.product
        if product is not None:
            rows = Rows(batch, self._dec, self._band.box, self._to.at)
            PRODUCTS[product.id].lay(rows, objects, self._out)
