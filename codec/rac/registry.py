"""The literal tables of the format (format_spec/registry.md): data types, record types, methods."""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class DType:
    """A data type: `bits` per element, and the little-endian `word` (bytes) that the coder works on."""

    name: str
    bits: int
    word: int
    signed_float: bool
    """True where the top bit of a word is a sign and the rest orders by magnitude."""


DTYPES = {
    d.name: d
    for d in (
        DType("F64", 64, 8, True),
        DType("F32", 32, 4, True),
        DType("F16", 16, 2, True),
        DType("BF16", 16, 2, True),
        DType("C64", 64, 4, True),
        DType("F8_E4M3", 8, 1, False),
        DType("F8_E5M2", 8, 1, False),
        DType("F8_E8M0", 8, 1, False),
        DType("F4", 4, 1, False),
        DType("I64", 64, 8, False),
        DType("I32", 32, 4, False),
        DType("I16", 16, 2, False),
        DType("I8", 8, 1, False),
        DType("U64", 64, 8, False),
        DType("U32", 32, 4, False),
        DType("U16", 16, 2, False),
        DType("U8", 8, 1, False),
        DType("BOOL", 8, 1, False),
    )
}

RECORD_TENSOR, RECORD_ATTACHMENT, RECORD_OBJECT, RECORD_INDEX = 1, 2, 3, 4
FLAG_ANCILLARY = 1

ONLINE = {"hadamard/1": {"id", "inner", "seed", "size"}, "matrix/1": {"id", "inner", "object"}}
"""Maps that a layer applies to its input, and the keys that state them."""
