"""raw/1, zstd/1 and bits/1 for a GPU: words as they are, or in bit planes."""

from __future__ import annotations

from rac.gpu.layout import Codes, Place, Tile, by_row, place
from rac.stages import bits
from rac.stages.plain import Raw, Zstd


def _words(tile: Tile, word: int, raw: int, planes: list[int], to: Place) -> None:
    """Words of `word` bytes and `raw` bits out of the planes at these offsets."""
    h, w = tile.shape
    many = max(1, word // 4)  # there is no plane of 64 bits
    rows, columns = tile.batch.plain_map(h, w * many)
    form = {"WORD": word // many, "SHIFT": 0, "SIGN": 0, "ZERO": 0, "RAW": raw // many, "CODED": False}
    fields = {"rows": rows, "columns": columns, "tops": 0, "symbols": 0}
    place(tile, Place(to.memory, to.at, to.stride * many), form, (h, w * many), planes, **fields)


class Plain:
    """raw/1, and zstd/1, whose frames the host expands."""

    def words(self, opened: Raw | Zstd, tile: Tile, to: Place) -> None:
        """Words in their places."""
        word = tile.dec.tensor.grid.word
        _words(tile, word, 8 * word, [tile.at], to)

    def codes(self, opened: Raw | Zstd, tile: Tile, anywhere: bool) -> Codes:
        """The unit itself."""
        return Codes("units", tile.at)


class Bits:
    """bits/1."""

    def words(self, opened: bits.Bits, tile: Tile, to: Place) -> None:
        """Words in their places; FormatError unless the unit is that of so many words."""
        h, w = tile.shape
        bits.check(tile.unit, h * w, opened.bits)
        _words(tile, 1, opened.bits, [tile.at + start for _, _, start in bits.planes(h * w, opened.bits)[0]], to)

    def codes(self, opened: bits.Bits, tile: Tile, anywhere: bool) -> Codes:
        """Words row by row."""
        return by_row(self, opened, tile)
