"""Kernel: symbols and raw planes to words in their places (format_spec/stages/lanes.md, sections 8, 9 and 11)."""

import triton
import triton.language as tl

from rac.gpu.kernels import common


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
def _word(units, planes, tops, symbols, k, FORM: tl.constexpr):
    """Words of elements `k`."""
    TYPE: tl.constexpr = tl.uint64 if FORM.WORD == 8 else tl.uint32
    raw = (k * 0).to(TYPE)
    at = 0
    for b in tl.static_range(6):
        if FORM.RAW & (32 >> b):
            raw = _plane(units + tl.load(planes + at), k, FORM.RAW, 32 >> b, raw, TYPE)
            at += 1
    if not FORM.CODED:
        return raw
    word = tl.load(tops + tl.load(symbols + k)).to(TYPE) << FORM.SHIFT
    if FORM.SHIFT > 0:
        word = word | (raw & ((1 << FORM.SHIFT) - 1))
    if FORM.SIGN:
        word = word | raw >> FORM.SHIFT << (8 * FORM.WORD - FORM.ZERO - 1)
    return word << FORM.ZERO


@triton.jit
def place(units, aux, work, out, jobs, JOB: tl.constexpr, FORM: tl.constexpr):
    """ROWS x COLS words of a tile per program.

    Element (y, x) of a tile stands at place row[class of x, y] + rank of x of its sequence: a tile in row-major order
    is one of one class.

    Args:
        units: u8, holds the raw planes.
        aux: u8, holds the rows of places (classes, h rounded up to 4) u32, the columns (w rounded up to COLS,) u32:
            rank | class << 24, and the tops of the symbols (256,) u16, 0 for escapes.
        work: u8, holds the symbols, u8.
        out: u8, takes the words.
        jobs: `rows`, `columns`, `tops`, `symbols`, `words` and `stride` of them from row to row; `h`; `w`; `planes`,
            largest first.
        FORM: WORD, bytes of a word; SHIFT, raw bits below the top; SIGN, ZERO, RAW as in the stage map; CODED, False
            where there are no symbols, and the one plane holds whole words; ROWS, a multiple of 4, and COLS of the
            program.
    """
    job = jobs + tl.program_id(0).to(tl.int64) * JOB.size
    h, w = tl.load(job + JOB.h).to(tl.int32), tl.load(job + JOB.w).to(tl.int32)
    across = tl.cdiv(w, FORM.COLS)
    first = tl.program_id(1) // across * FORM.ROWS
    x = tl.program_id(1) % across * FORM.COLS + tl.arange(0, FORM.COLS)
    TO: tl.constexpr = common.word(FORM.WORD)
    if first < h:
        column = tl.load((aux + tl.load(job + JOB.columns)).to(tl.pointer_type(tl.uint32)) + x)
        rank = column & 0xFFFFFF
        rows = (aux + tl.load(job + JOB.rows)).to(tl.pointer_type(tl.uint64)) + first // 2
        rows += (column >> 24).to(tl.int32) * ((h + 3) // 4 * 2)
        tops = (aux + tl.load(job + JOB.tops)).to(tl.pointer_type(tl.uint16))
        symbols = work + tl.load(job + JOB.symbols)
        stride = tl.load(job + JOB.stride)
        dst = (out + tl.load(job + JOB.words)).to(tl.pointer_type(TO)) + first * stride + x
        planes = job + JOB.planes
        inside = x < w
        rest = tl.minimum(h - first, FORM.ROWS)
        for _ in range(rest // 4):
            k, more = tl.load(rows), tl.load(rows + 1)
            # all loads of four rows are under way before the first store
            a = _word(units, planes, tops, symbols, k.to(tl.uint32) + rank, FORM)
            k = (k >> 32).to(tl.uint32)
            b = _word(units, planes, tops, symbols, k + rank, FORM)
            c = _word(units, planes, tops, symbols, more.to(tl.uint32) + rank, FORM)
            k = (more >> 32).to(tl.uint32)
            d = _word(units, planes, tops, symbols, k + rank, FORM)
            four = (a, b, c, d)
            for y in tl.static_range(4):
                tl.store(dst, four[y].to(TO), mask=inside)
                dst += stride
            rows += 2
        one = rows.to(tl.pointer_type(tl.uint32))
        for y in range(rest % 4):
            word = _word(units, planes, tops, symbols, tl.load(one + y) + rank, FORM)
            tl.store(dst, word.to(TO), mask=inside)
            dst += stride
