"""Kernel: symbols and raw planes to words in their places (format_spec/stages/lanes.md, sections 8, 9 and 11)."""

from __future__ import annotations

import triton
import triton.language as tl

DEEP = tl.constexpr(4)
"""Rows at once: all their loads are under way before the first store."""


@triton.jit
def _plane(plane, k, RAW: tl.constexpr, BITS: tl.constexpr, raw, TYPE: tl.constexpr):
    """`raw` with the bits of elements `k` out of the plane of BITS bits; the larger planes hold the lower bits."""
    LOW: tl.constexpr = RAW & (63 & ~(2 * BITS - 1))
    if BITS >= 8:
        KIND: tl.constexpr = tl.uint32 if BITS == 32 else tl.uint16 if BITS == 16 else tl.uint8
        piece = tl.load(plane.to(tl.pointer_type(KIND)) + k).to(TYPE)
    else:
        PER: tl.constexpr = 8 // BITS
        piece = (tl.load(plane + k // PER).to(tl.uint32) >> (k % PER * BITS).to(tl.uint32) & ((1 << BITS) - 1)).to(TYPE)
    return raw | piece << LOW


@triton.jit
def place(
    units, aux, work, out, jobs, WORD: tl.constexpr, SHIFT: tl.constexpr, SIGN: tl.constexpr, ZERO: tl.constexpr,
    RAW: tl.constexpr, CODED: tl.constexpr, CLASSES: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLS words of a tile per program.

    Element (y, x) of a tile stands at place row[y, class of x] + rank of x of its sequence: a tile in row-major order
    is one of one class.

    Args:
        units: u8, holds the raw planes.
        aux: u8, holds the rows of places (h rounded up to DEEP, CLASSES) u32, the columns (w rounded up to COLS,) u32:
            rank | class << 24, and the tops of the symbols (256,) u16, 0 for escapes.
        work: u8, holds the symbols, u8.
        out: u8, takes the words.
        jobs: (n, 14) int64: offsets of rows, columns, tops, symbols, words; words from row to row; h, w; offsets of
            the planes, largest first.
        WORD: Bytes of a word.
        SHIFT: Raw bits below the top; SIGN, ZERO, RAW as in the stage map.
        CODED: False where there are no symbols, and the one plane holds whole words.
        CLASSES: Classes of columns, rounded up to a power of two.
        VECTOR: Words that may be stored at once: w, the offset and the distance of rows are multiples.
        ROWS: Rows of the program, a multiple of DEEP.
        COLS: Columns of the program.
    """
    job = jobs + tl.program_id(0).to(tl.int64) * 14
    h, w = tl.load(job + 6).to(tl.int32), tl.multiple_of(tl.load(job + 7).to(tl.int32), VECTOR)
    across = tl.cdiv(w, COLS)
    top_row = tl.program_id(1) // across * ROWS
    x = tl.program_id(1) % across * COLS + tl.arange(0, COLS)
    bits: tl.constexpr = RAW
    TYPE: tl.constexpr = tl.uint64 if WORD == 8 else tl.uint32
    TO: tl.constexpr = tl.uint64 if WORD == 8 else tl.uint32 if WORD == 4 else tl.uint16 if WORD == 2 else tl.uint8
    if top_row < h:
        column = tl.load((aux + tl.load(job + 1)).to(tl.pointer_type(tl.uint32)) + x)
        rank = column & 0xFFFFFF
        deep = tl.arange(0, DEEP)[:, None]
        rows = (aux + tl.load(job)).to(tl.pointer_type(tl.uint32)) + (top_row + deep) * CLASSES
        rows = rows + (column >> 24)[None, :].to(tl.int32)
        tops = (aux + tl.load(job + 2)).to(tl.pointer_type(tl.uint16))
        symbols = work + tl.load(job + 3)
        stride = tl.multiple_of(tl.load(job + 5), VECTOR)
        dst = tl.multiple_of(out + tl.load(job + 4), VECTOR * WORD).to(tl.pointer_type(TO))
        dst = tl.multiple_of(dst, VECTOR * WORD) + (top_row + deep) * stride + x[None, :]
        inside = (x < w)[None, :]
        for y in range(top_row, tl.minimum(h, top_row + ROWS), DEEP):
            k = tl.load(rows) + rank[None, :]
            raw = tl.zeros((DEEP, COLS), TYPE)
            at = 0
            for b in tl.static_range(6):
                if bits & (32 >> b):
                    raw = _plane(units + tl.load(job + 8 + at), k, RAW, 32 >> b, raw, TYPE)
                    at += 1
            word = raw
            if CODED:
                top = tl.load(tops + tl.load(symbols + k)).to(TYPE)
                word = top << SHIFT
                if SHIFT > 0:
                    word = word | (raw & ((1 << SHIFT) - 1))
                if SIGN:
                    word = word | raw >> SHIFT << (8 * WORD - ZERO - 1)
                word = word << ZERO
            tl.store(dst, word.to(TO), mask=inside & (y + deep < h))
            rows += DEEP * CLASSES
            dst += DEEP * stride
