"""Tensor and attachment records, container.md sections 7, 9 and 10."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from . import bits as planes
from . import groups, lanes, products, trellis
from . import online as transforms
from .errors import MAX_PRODUCT, ChecksumError, FormatError, LimitError, Limits, UnsupportedError
from .frames import decompress
from .structure import (
    Map,
    Value,
    as_aliases,
    as_array,
    as_binary,
    as_count,
    as_counts,
    as_int,
    as_map,
    as_text,
    check_keys,
)

# registry.md, "Data types": name -> (bits of an element, bytes of a word)
DTYPES = {
    "F64": (64, 8),
    "F32": (32, 4),
    "F16": (16, 2),
    "BF16": (16, 2),
    "C64": (64, 4),
    "F8_E4M3": (8, 1),
    "F8_E5M2": (8, 1),
    "F8_E4M3FNUZ": (8, 1),
    "F8_E5M2FNUZ": (8, 1),
    "F8_E8M0": (8, 1),
    "F4": (4, 1),
    "I64": (64, 8),
    "I32": (32, 4),
    "I16": (16, 2),
    "I8": (8, 1),
    "U64": (64, 8),
    "U32": (32, 4),
    "U16": (16, 2),
    "U8": (8, 1),
    "BOOL": (8, 1),
}
STAGES = ("raw/1", "zstd/1", "lanes/1", "bits/1")  # first of the stages; the second, if any, is trellis/1 or groups/1
USES = {"lowrank/1": 2, "basis/1": 1}  # third of the stages, if any, behind trellis/1 -> number of objects
Objects = Mapping[str, NDArray[np.float32]]  # those in front of a record


class Reader(Protocol):
    """Where the bytes of a payload come from."""

    def read(self, size: int) -> bytes:
        """Exactly size bytes, or TruncatedError."""

    def zeros(self, size: int) -> None:
        """Padding of size bytes, RAC-CNV-001."""


Unit = tuple[int, int]  # size, checksum


def unit_directory(value: bytes, payload: int) -> list[Unit]:
    """Section 7."""
    if len(value) % 16:
        raise FormatError("RAC-UNI-001: length of the unit directory")
    numbers = [int.from_bytes(value[i : i + 8], "little") for i in range(0, len(value), 8)]
    if sum(size + -size % 16 for size in numbers[::2]) != payload:
        raise FormatError("RAC-UNI-002: units do not fill the payload")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def read_unit(reader: Reader, unit: Unit) -> bytes:
    """The next unit of a payload and the padding behind it."""
    size, checksum = unit
    data = reader.read(size)
    if xxhash.xxh3_64_intdigest(data) != checksum:  # RAC-SEC-005: before anything looks at it
        raise ChecksumError("RAC-UNI-003: checksum of a unit")
    reader.zeros(-size % 16)
    return data


@dataclass(frozen=True)
class TensorHead:
    """A tensor head that passed all checks of section 9."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: int  # R
    cols: int  # C
    word: int
    coded_word: int  # of what the first stage restores
    tile_rows: int  # tr
    tile_cols: int  # tc
    first: str
    method: str
    parameters: lanes.Parameters | None
    planes: planes.Parameters | None  # of bits/1
    second: trellis.Parameters | groups.Parameters | None
    third: Map | None
    uses: list[str]
    units: list[Unit]
    digest: bytes
    aliases: list[tuple[str, bool]]
    online: transforms.Online | None

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Section 9, "Tiles", in order."""
        if self.rows * self.cols == 0:
            return
        for y in range(0, self.rows, self.tile_rows):
            for x in range(0, self.cols, self.tile_cols):
                yield (
                    slice(y, min(self.rows, y + self.tile_rows)),
                    slice(x, min(self.cols, x + self.tile_cols)),
                )


def check_shape(shape: list[int], limits: Limits) -> None:
    if len(shape) > limits.rank:
        raise LimitError("RAC-TEN-006: number of dimensions")
    if prod(max(1, size) for size in shape) > MAX_PRODUCT:
        raise FormatError("RAC-TEN-007: product of the shape")


def tensor_head(head: Map, payload: int, limits: Limits, objects: Objects | None) -> TensorHead:
    """Check the head of a tensor record, given the objects in front of it; of an object record with None.

    The order is that of section 9.
    """
    required = {"name", "dtype", "shape", "axis", "tile", "stages", "units", "digest"}
    optional = {"aliases", "extra", "needs", "online", "uses"} if objects is not None else set()
    check_keys(head, required, optional, ("RAC-TEN-001", "RAC-TEN-002, RAC-OBJ-001"))
    if head.get("needs", []) != []:
        raise UnsupportedError("RAC-TEN-003: needs")
    uses = [as_text(item, "RAC-TEN-004") for item in as_array(head.get("uses", []), "RAC-TEN-004")]
    name = as_text(head["name"], "RAC-TEN-004")
    dtype = as_text(head["dtype"], "RAC-TEN-004")
    shape = as_counts(head["shape"], "RAC-TEN-004")
    axis = as_int(head["axis"], "RAC-TEN-004")
    tile_rows, tile_cols = as_counts(head["tile"], "RAC-TEN-004", 2)
    stages = [as_map(stage, "RAC-TEN-004") for stage in as_array(head["stages"], "RAC-TEN-004")]
    digest = as_binary(head["digest"], "RAC-TEN-004", 16)
    aliases = as_aliases(head.get("aliases", []), "RAC-TEN-004")
    as_map(head.get("extra", {}), "RAC-TEN-004")
    as_map(head.get("online", {}), "RAC-TEN-004")
    directory = as_binary(head["units"], "RAC-UNI-001")
    if dtype not in DTYPES:
        raise UnsupportedError(f"RAC-TEN-005: data type {dtype!r}")
    bits, word = DTYPES[dtype]
    check_shape(shape, limits)
    if not stages:
        raise FormatError("RAC-TEN-008: no stage")
    first, *more = [stage.get("id") for stage in stages]
    chains: list[list[Value]] = [[], ["trellis/1"], ["groups/1"]]
    if objects is not None:
        chains += [["trellis/1", third] for third in USES]
    if not isinstance(first, str) or first not in STAGES or more not in chains:
        raise UnsupportedError("RAC-TEN-009, RAC-OBJ-003: stages")
    if objects is None and (dtype != "F32" or len(shape) != 2 or 0 in shape or axis != 1):
        raise FormatError("RAC-OBJ-002: not a matrix of F32")
    if not 0 <= axis <= len(shape):
        raise FormatError("RAC-TEN-011: axis")
    if dtype == "F4" and (not shape or shape[-1] % 2 or axis >= len(shape)):
        raise FormatError("RAC-TEN-010: shape or axis of F4")
    rows = prod(shape[:axis])
    cols = prod(shape[axis:]) * bits // (8 * word)
    if not (1 <= tile_rows <= max(1, rows) and 1 <= tile_cols <= max(1, cols)):
        raise FormatError("RAC-TEN-012: tile")
    if tile_rows * tile_cols * word > limits.tile:
        raise LimitError("RAC-TEN-013: tile")
    second: trellis.Parameters | groups.Parameters | None = None
    if more:
        is_trellis = more[0] == "trellis/1"
        second = trellis.parameters(stages[1], dtype) if is_trellis else groups.parameters(stages[1], dtype, cols)
    coded_word = 1 if second else word
    parameters = coded_bits = None
    if first == "bits/1":
        coded_bits = planes.parameters(stages[0], coded_word)
    elif first == "lanes/1":
        parameters = lanes.parameters(stages[0], coded_word)
    elif len(stages[0]) != 1:
        raise UnsupportedError("RAC-RAW-001, RAC-ZTD-001: keys in the stage map")
    third = stages[2] if len(more) > 1 else None
    if third and len(third) != 1:
        raise UnsupportedError("RAC-LOW-001, RAC-BAS-001: keys in the stage map")
    if len(uses) != (USES[as_text(third["id"], "")] if third else 0):
        raise FormatError("RAC-TEN-017: number of names in uses")
    if third and objects is not None:
        for name_of_object in uses:
            if name_of_object not in objects:
                raise FormatError(f"RAC-TEN-018: no object {name_of_object!r} in front of the tensor")
        products.check(third, [objects[n].shape for n in uses], rows, cols)
        second = replace(second, dtype="F32") if second else None  # trellis.md section 1
    online = transforms.check(head["online"], dtype, shape, objects or {}) if "online" in head else None
    units = unit_directory(directory, payload)
    special = [p.shared_size for p in (parameters,) if p] + [p.unit_size for p in (second,) if p]
    grid = -(-rows // tile_rows) * -(-cols // tile_cols) if rows * cols else 0
    if len(units) != len(special) + grid:
        raise FormatError("RAC-TEN-014: number of units")
    if special and rows * cols == 0:
        raise FormatError("RAC-LAN-006, RAC-TCQ-010, RAC-GRP-006: no elements")
    if rows * cols * word > limits.free_alloc + limits.expansion * payload:
        raise LimitError("RAC-TEN-015: tensor is too large for its payload")
    largest = 2 * tile_rows * tile_cols * coded_word + 65536
    if any(size > largest for size, _ in units[len(special) :]):
        raise FormatError("RAC-TEN-016: unit is too large for its tile")
    if [size for size, _ in units[: len(special)]] != special:
        raise FormatError("RAC-TEN-016, RAC-LAN-010, RAC-TCQ-007, RAC-GRP-007: size of a unit in front of the tiles")
    return TensorHead(
        name,
        dtype,
        tuple(shape),
        rows,
        cols,
        word,
        coded_word,
        tile_rows,
        tile_cols,
        first,
        as_text((third or stages[-1])["id"], ""),
        parameters,
        coded_bits,
        second,
        third,
        uses,
        units,
        digest,
        aliases,
        online,
    )


def read_tensor(reader: Reader, tensor: TensorHead, objects: Objects) -> tuple[bytes, list[int]]:
    """Decode a payload; return the dense bytes and `parts` (section 11)."""
    parts = [0] * 6
    p, shared = tensor.parameters, None
    q, scales = tensor.second, None
    grid: groups.Unit | None = None
    units = iter(tensor.units)
    if p:
        shared = lanes.shared_unit(read_unit(reader, next(units)), p, tensor.rows, tensor.cols)
        parts[0] += p.shared_size
        parts[5] += -p.shared_size % 16
    if q:
        data = read_unit(reader, next(units))
        if isinstance(q, trellis.Parameters):
            scales = trellis.trellis_unit(data, q, tensor.rows, tensor.cols)
        else:
            grid = groups.groups_unit(data, q, tensor.rows, tensor.cols)
        parts[0] += q.unit_size
        parts[5] += -q.unit_size % 16
    dense = b""
    if tensor.rows * tensor.cols:
        stored = 4 if tensor.third else tensor.word
        matrix: NDArray[np.unsignedinteger] = np.zeros((tensor.rows, tensor.cols), f"<u{stored}")
        word = tensor.coded_word
        tile: NDArray[np.unsignedinteger]
        for (ys, xs), unit in zip(tensor.tiles(), units, strict=True):
            h, w = ys.stop - ys.start, xs.stop - xs.start
            if tensor.first == "raw/1" and unit[0] != h * w * word:
                raise FormatError("RAC-RAW-002: size of a unit")
            data = read_unit(reader, unit)
            if p and shared:
                tile, kinds = lanes.decode_tile(data, p, shared, shared.row_classes[ys], shared.col_classes[xs])
                for i, size in enumerate((kinds.directory, kinds.words, kinds.escapes, kinds.planes, kinds.padding), 1):
                    parts[i] += size
            else:
                if tensor.first == "zstd/1":
                    tile = unsort(decompress(data, h * w * word), h, w)  # RAC-ZTD-002
                elif tensor.planes:
                    tile = planes.decode_tile(data, tensor.planes, h, w)
                else:
                    tile = np.frombuffer(data, f"<u{word}").reshape(h, w)
                parts[4] += len(data)
            parts[5] += -len(data) % 16
            if isinstance(q, trellis.Parameters) and scales:
                tile = trellis.decode_tile(tile, q, scales, ys, xs)
            elif isinstance(q, groups.Parameters) and grid:
                tile = groups.decode_tile(tile, q, grid, ys, xs)
            matrix[ys, xs] = tile
        if tensor.third:
            used = [objects[name] for name in tensor.uses]
            matrix = products.decode(tensor.third, matrix.view(np.float32), used, tensor.dtype)
        dense = matrix.tobytes()
    if xxhash.xxh3_128_digest(dense) != tensor.digest:
        raise ChecksumError("RAC-DIG-002: digest of a tensor")
    return dense, parts


def unsort(data: bytes, h: int, w: int) -> NDArray[np.unsignedinteger]:
    """stages/zstd.md, "Decoding": word k is the sum of D[b n + k] 256^b."""
    word = len(data) // (h * w)
    columns = np.frombuffer(data, np.uint8).reshape(word, h * w)
    return np.ascontiguousarray(columns.T).view(f"<u{word}").reshape(h, w)


@dataclass(frozen=True)
class AttachmentHead:
    """An attachment head that passed all checks of section 10."""

    name: str
    size: int
    method: str
    unit: Unit
    digest: bytes


def attachment_head(head: Map, payload: int, limits: Limits) -> AttachmentHead:
    """Check the head of an attachment record."""
    required = {"name", "size", "stages", "units", "digest"}
    check_keys(head, required, set(), ("RAC-ATT-001", "RAC-ATT-002"))
    name = as_text(head["name"], "RAC-ATT-003")
    size = as_count(head["size"], "RAC-ATT-003")
    digest = as_binary(head["digest"], "RAC-ATT-003", 16)
    units = unit_directory(as_binary(head["units"], "RAC-UNI-001"), payload)
    if len(units) != 1:
        raise FormatError("RAC-ATT-003: number of units")
    if head["stages"] == [{"id": "raw/1"}]:
        method = "raw/1"
    elif head["stages"] == [{"id": "zstd/1"}]:
        method = "zstd/1"
    else:
        raise UnsupportedError("RAC-ATT-004: stages")
    if max(size, units[0][0]) > limits.attachment:
        raise LimitError("RAC-ATT-005: attachment")
    if units[0][0] > size + 1024:
        raise FormatError("RAC-ATT-006: unit is too large")
    if method == "raw/1" and units[0][0] != size:
        raise FormatError("RAC-ATT-007: size of the unit")
    return AttachmentHead(name, size, method, units[0], digest)


def read_attachment(reader: Reader, attachment: AttachmentHead) -> bytes:
    """Decode a payload."""
    data = read_unit(reader, attachment.unit)
    content = decompress(data, attachment.size) if attachment.method == "zstd/1" else data
    if xxhash.xxh3_128_digest(content) != attachment.digest:
        raise ChecksumError("RAC-ATT-007: digest of an attachment")
    return content
