"""How the tiles of a stage are laid out for the kernels: what a coder, numbers and a product are for a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rac.decoder import Decoder
from rac.gpu.layout import PLACE_COLS, PLACE_ROWS, Array, Batch, Call, Place, across, up
from rac.grid import Box


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of a batch, its unit checked against its checksum and without Zstandard frames."""

    batch: Batch
    dec: Decoder
    box: Box
    unit: Array
    at: int
    """Offset of the unit in `units`, a multiple of 16."""
    status: int
    """Place of the tile in the status array."""

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        r0, r1, c0, c1 = self.box
        return r1 - r0, c1 - c0


@dataclass(frozen=True, slots=True)
class Codes:
    """Words of one byte, or codes of them, that a coder leaves for numbers."""

    source: str
    """The memory that holds them."""
    at: int
    places: tuple[int, int] | None = None
    """Offsets of rows and columns of places, see `kernels/place.py`; None: row by row."""
    words: Array | None = None
    """(256,) the word of each code; None: the codes are the words."""


class CoderLayout(Protocol):
    """Lays out the jobs that restore the words of a tile; `opened` is the coder of its tensor, `Decoder.coder`."""

    def words(self, opened: Any, tile: Tile, to: Place) -> None:
        """Words of the bytes that the record states, in their places; FormatError where the unit breaks the format."""

    def codes(self, opened: Any, tile: Tile, anywhere: bool) -> Codes:
        """Words of one byte for numbers; `anywhere`: as codes, in whichever order the coder has them."""


class NumbersLayout(Protocol):
    """Lays out the jobs that make numbers of words; `opened` is `Decoder.numbers`."""

    anywhere: bool
    """Whether it takes codes that are not words, and not in the order of rows."""

    def lay(self, opened: Any, tile: Tile, codes: Codes, to: Place) -> None:
        """Numbers of the data type that the stage was opened with, in their places."""


class ProductLayout(Protocol):
    """Lays out the jobs of a product."""

    def lay(self, band: Band, objects: Sequence[tuple[int, int]], to: Place) -> None:
        """Words of the tensor in their places; of each object, its offset in `objects` and numbers from row to row."""


@dataclass(frozen=True, slots=True)
class Band:
    """Whole rows of a tensor whose numbers are there, C from row to row."""

    batch: Batch
    dec: Decoder
    box: Box
    numbers: int
    """Their offset in `work`, float32."""


def by_row(coder: CoderLayout, opened: Any, tile: Tile) -> Codes:
    """The words of a tile in `work`, row by row."""
    h, w = tile.shape
    at = tile.batch.room(up(h * w, 16))
    coder.words(opened, tile, Place("work", at, w))
    return Codes("work", at)


def place(
    tile: Tile, to: Place, form: Mapping[str, int], shape: tuple[int, int], planes: list[int], **fields: Any
) -> None:
    """A job of the kernel `place`: `form` has WORD to CODED of it, `fields` is without words, stride, h and w."""
    options = (*form.items(), ("ROWS", PLACE_ROWS), ("COLS", across(PLACE_COLS, shape[1])))
    fields |= {"h": shape[0], "w": shape[1], "planes": planes + [0] * (6 - len(planes))}
    tile.batch.add(Call("place", options, out=to.memory), words=to.at, stride=to.stride, **fields)
