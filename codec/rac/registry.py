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
    signed_float: bool  # true where the top bit of a word is a sign and the rest orders by magnitude
    native: str  # name of the type in torch, and where there is one in numpy or ml_dtypes


DTYPES = {
    d.name: d
    for d in (
        DType("F64", 64, 8, True, "float64"),
        DType("F32", 32, 4, True, "float32"),
        DType("F16", 16, 2, True, "float16"),
        DType("BF16", 16, 2, True, "bfloat16"),
        DType("C64", 64, 4, True, "complex64"),
        DType("F8_E4M3", 8, 1, False, "float8_e4m3fn"),
        DType("F8_E5M2", 8, 1, False, "float8_e5m2"),
        DType("F8_E4M3FNUZ", 8, 1, False, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, 1, False, "float8_e5m2fnuz"),
        DType("F8_E8M0", 8, 1, False, "float8_e8m0fnu"),
        DType("F4", 4, 1, False, "float4_e2m1fn_x2"),
        DType("I64", 64, 8, False, "int64"),
        DType("I32", 32, 4, False, "int32"),
        DType("I16", 16, 2, False, "int16"),
        DType("I8", 8, 1, False, "int8"),
        DType("U64", 64, 8, False, "uint64"),
        DType("U32", 32, 4, False, "uint32"),
        DType("U16", 16, 2, False, "uint16"),
        DType("U8", 8, 1, False, "uint8"),
        DType("BOOL", 8, 1, False, "bool"),
    )
}

RECORD_TENSOR, RECORD_ATTACHMENT, RECORD_OBJECT, RECORD_INDEX = 1, 2, 3, 4
FLAG_ANCILLARY = 1

ONLINE = {"hadamard/1": {"id", "inner", "seed", "size"}, "matrix/1": {"id", "inner", "object"}}
"""Maps that a layer applies to its input, and the keys that state them."""
