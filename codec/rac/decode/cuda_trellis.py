"""Kernel: words to the numbers of trellis/1 (format_spec/stages/trellis.md, section 6).

A thread walks down a column. The state stands in the upper bits of a register, its lowest bit as the highest: that is
the sign of the number, and the state moves on by a shift to the left. The look-up entry of a word has its magnitude,
whose lowest eight bits are zero, and in these what the word does to the state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rac.decode.cuda_shared import INTERPRETED


@triton.jit
def rounded(v, TO: tl.constexpr):
    """Numbers of the data type, to the nearest, ties to even."""
    return v.to(TO)


@triton.jit
def _rounded(v, TO: tl.constexpr):
    """The same for the interpreter, which cuts BF16 off."""
    if tl.bfloat16 == TO:
        bits = v.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(TO)


if INTERPRETED:
    rounded = _rounded


@triton.jit
def _number(entry, state, col, row, step, TO: tl.constexpr):
    """(Number, state of the next row)."""
    magnitude = ((entry & 0xFFFFFF00) ^ (state & 0x80000000)).to(tl.float32, bitcast=True)
    turned = (state.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True) & step
    return rounded(magnitude * col * row, TO), state << 1 ^ turned ^ entry << 24


@triton.jit
def trellis(source, aux, out, jobs, TO: tl.constexpr, COLS: tl.constexpr):
    """COLS columns of a tile per program.

    Args:
        source: u8, holds the codes of the words, at the places that cuda_place.py explains.
        aux: u8, holds rows and columns of places as for cuda_place.py; entries of the codes (256,) u32; scales of the
            columns (w rounded up to COLS,) f32 and of the rows (h rounded up to 4,) f32.
        out: u8, takes the numbers.
        jobs: (n, 11) int64: offsets of rows, columns, entries, scales of columns, scales of rows, codes, numbers;
            numbers from row to row; h; w; what a negative sign does to the state.
        TO: Type of the numbers.
        COLS: Columns of the program.
    """
    job = jobs + tl.program_id(0).to(tl.int64) * 11
    h, w, step = tl.load(job + 8).to(tl.int32), tl.load(job + 9).to(tl.int32), tl.load(job + 10).to(tl.uint32)
    x = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if tl.program_id(1) * COLS < w:
        column = tl.load((aux + tl.load(job + 1)).to(tl.pointer_type(tl.uint32)) + x)
        col = tl.load((aux + tl.load(job + 3)).to(tl.pointer_type(tl.float32)) + x)
        rows = (aux + tl.load(job)).to(tl.pointer_type(tl.uint64)) + (column >> 24).to(tl.int32) * ((h + 3) // 4 * 2)
        entries = (aux + tl.load(job + 2)).to(tl.pointer_type(tl.uint32))
        scales = (aux + tl.load(job + 4)).to(tl.pointer_type(tl.float32))
        codes = source + tl.load(job + 5) + (column & 0xFFFFFF)
        stride = tl.load(job + 7)
        dst = (out + tl.load(job + 6)).to(tl.pointer_type(TO)) + x
        inside = x < w
        state = tl.zeros((COLS,), tl.uint32)
        for _ in range(0, h // 4):
            k, more = tl.load(rows), tl.load(rows + 1)
            # all loads of four rows are under way before the first store
            e0 = tl.load(entries + tl.load(codes + k.to(tl.uint32)))
            e1 = tl.load(entries + tl.load(codes + (k >> 32).to(tl.uint32)))
            e2 = tl.load(entries + tl.load(codes + more.to(tl.uint32)))
            e3 = tl.load(entries + tl.load(codes + (more >> 32).to(tl.uint32)))
            v0, state = _number(e0, state, col, tl.load(scales), step, TO)
            v1, state = _number(e1, state, col, tl.load(scales + 1), step, TO)
            v2, state = _number(e2, state, col, tl.load(scales + 2), step, TO)
            v3, state = _number(e3, state, col, tl.load(scales + 3), step, TO)
            tl.store(dst, v0, mask=inside)
            dst += stride
            tl.store(dst, v1, mask=inside)
            dst += stride
            tl.store(dst, v2, mask=inside)
            dst += stride
            tl.store(dst, v3, mask=inside)
            dst += stride
            rows += 2
            scales += 4
        one = rows.to(tl.pointer_type(tl.uint32))
        for y in range(0, h % 4):
            e = tl.load(entries + tl.load(codes + tl.load(one + y)))
            v, state = _number(e, state, col, tl.load(scales + y), step, TO)
            tl.store(dst, v, mask=inside)
            dst += stride
