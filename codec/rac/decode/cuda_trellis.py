"""Kernel: words to the numbers of trellis/1 (format_spec/stages/trellis.md, section 6).

A thread walks down a column. The state stands in the upper bits of a register, its lowest bit as the highest: that is
the sign of the number, and the state moves on by a shift to the left. The look-up entry of a word has its magnitude,
whose lowest eight bits are zero, and in these what the word does to the state.
"""

from __future__ import annotations

import triton
import triton.language as tl

DEEP = tl.constexpr(4)


@triton.jit
def _number(entry, state, col, row, step, TO: tl.constexpr):
    """(Number, state of the next row)."""
    magnitude = ((entry & 0xFFFFFF00) ^ (state & 0x80000000)).to(tl.float32, bitcast=True)
    turned = (state.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True) & step
    return (magnitude * col * row).to(TO), state << 1 ^ turned ^ entry << 24


@triton.jit
def trellis(
    source, aux, out, jobs, TO: tl.constexpr, CLASSES: tl.constexpr, VECTOR: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """COLS columns of a tile per program.

    Args:
        source: u8, holds the codes of the words, at the places that cuda_place.py explains.
        aux: u8, holds rows and columns of places as for cuda_place.py; entries of the codes (256,) u32; scales of the
            columns (w rounded up to COLS,) f32 and of the rows (h rounded up to DEEP,) f32.
        out: u8, takes the numbers.
        jobs: (n, 10) int64: offsets of rows, columns, entries, scales of columns, scales of rows, codes, numbers;
            numbers from row to row; h; w | step << 32, where step is the response of the code to a negative sign.
        TO: Type of the numbers.
        CLASSES: Classes of columns, rounded up to a power of two.
        VECTOR: Numbers that may be stored at once, as for cuda_place.py.
        COLS: Columns of the program.
    """
    job = jobs + tl.program_id(0).to(tl.int64) * 10
    last = tl.load(job + 9)
    h, w = tl.load(job + 8).to(tl.int32), tl.multiple_of((last & 0xFFFFFFFF).to(tl.int32), VECTOR)
    step = (last >> 32).to(tl.uint32)
    x = tl.program_id(1) * COLS + tl.arange(0, COLS)
    SIZE: tl.constexpr = 4 if TO == tl.float32 else 2
    if tl.program_id(1) * COLS < w:
        column = tl.load((aux + tl.load(job + 1)).to(tl.pointer_type(tl.uint32)) + x)
        col = tl.load((aux + tl.load(job + 3)).to(tl.pointer_type(tl.float32)) + x)
        rows = (aux + tl.load(job)).to(tl.pointer_type(tl.uint32)) + (column >> 24).to(tl.int32)
        entries = (aux + tl.load(job + 2)).to(tl.pointer_type(tl.uint32))
        scales = (aux + tl.load(job + 4)).to(tl.pointer_type(tl.float32))
        codes = source + tl.load(job + 5) + (column & 0xFFFFFF)
        stride = tl.multiple_of(tl.load(job + 7), VECTOR)
        dst = tl.multiple_of(out + tl.load(job + 6), VECTOR * SIZE).to(tl.pointer_type(TO))
        dst = tl.multiple_of(dst, VECTOR * SIZE) + x
        inside = x < w
        state = tl.zeros((COLS,), tl.uint32)
        for _ in range(0, h // DEEP):
            e0 = tl.load(entries + tl.load(codes + tl.load(rows)))
            e1 = tl.load(entries + tl.load(codes + tl.load(rows + CLASSES)))
            e2 = tl.load(entries + tl.load(codes + tl.load(rows + 2 * CLASSES)))
            e3 = tl.load(entries + tl.load(codes + tl.load(rows + 3 * CLASSES)))
            v0, state = _number(e0, state, col, tl.load(scales), step, TO)
            v1, state = _number(e1, state, col, tl.load(scales + 1), step, TO)
            v2, state = _number(e2, state, col, tl.load(scales + 2), step, TO)
            v3, state = _number(e3, state, col, tl.load(scales + 3), step, TO)
            tl.store(dst, v0, mask=inside)
            tl.store(dst + stride, v1, mask=inside)
            tl.store(dst + 2 * stride, v2, mask=inside)
            tl.store(dst + 3 * stride, v3, mask=inside)
            rows += DEEP * CLASSES
            scales += DEEP
            dst += DEEP * stride
        for _ in range(0, h % DEEP):
            v, state = _number(
                tl.load(entries + tl.load(codes + tl.load(rows))), state, col, tl.load(scales), step, TO
            )
            tl.store(dst, v, mask=inside)
            rows += CLASSES
            scales += 1
            dst += stride
