"""Kernel: words to the numbers of trellis/1 (format_spec/stages/trellis.md, section 6).

A thread walks down two neighbouring columns. The state stands in the upper bits of a register, its lowest bit as the
highest: that is the sign of the number, and the state moves on by a shift to the left. The look-up entry of a word has
its magnitude and what the word does to the state; the entries are copied into shared memory.
"""

import triton
import triton.language as tl

from rac.gpu.kernels import common


@triton.jit
def rounded(v, TO: tl.constexpr):
    """Numbers of the data type, to the nearest, ties to even."""
    return v.to(TO)


@triton.jit
def _rounded(v, TO: tl.constexpr):
    """`rounded` for the interpreter, which cuts BF16 off."""
    if tl.bfloat16 == TO:
        bits = v.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(TO)


@triton.jit
def packed(low, high, TO: tl.constexpr):
    """Two numbers of 16 bits, rounded as above, as one word."""
    text: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if tl.bfloat16 == TO else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return tl.inline_asm_elementwise(text, "=r,f,f", [low, high], tl.uint32, is_pure=True, pack=1)


@triton.jit
def _packed(low, high, TO: tl.constexpr):
    one = rounded(low, TO).to(tl.uint16, bitcast=True).to(tl.uint32)
    return one | rounded(high, TO).to(tl.uint16, bitcast=True).to(tl.uint32) << 16


if common.INTERPRETED:
    rounded, packed = _rounded, _packed


@triton.jit
def _number(code, state, lut, col, row, step):
    """(Number as a float, state of the next row)."""
    magnitude, turn = common.shared_pair(lut + (code.to(tl.uint32) << 3), 0)
    turned = (state.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True) & step
    number = (magnitude ^ (state & 0x80000000)).to(tl.float32, bitcast=True)
    return number * col * row.to(tl.float32, bitcast=True), state << 1 ^ turned ^ turn


@triton.jit
def put(dst, v0, v1, inside0, inside1, TO: tl.constexpr, PAIRS: tl.constexpr):
    """Store the numbers of two neighbours in a row."""
    if PAIRS:
        tl.store(dst.to(tl.pointer_type(tl.uint32)), packed(v0, v1, TO), mask=inside0)
    else:
        tl.store(dst, rounded(v0, TO), mask=inside0)
        tl.store(dst + 1, rounded(v1, TO), mask=inside1)


@triton.jit
def trellis(source, aux, out, jobs, JOB: tl.constexpr, FORM: tl.constexpr):
    """COLS columns of a tile per program.

    Args:
        source: u8, holds the codes of the words, at the places that place.py explains.
        aux: u8, holds rows and columns of places as for place.py; entries of the codes (256, 2) u32: magnitude, a
            float, and an XOR for the state; scales of the columns (w rounded up to COLS,) f32 and of the rows
            (h rounded up to 4,) f32.
        out: u8, takes the numbers.
        jobs: `rows`, `columns`, `entries`, `column_scales`, `row_scales`, `codes`, `numbers` and `stride` of them from
            row to row; `h`; `w`; `step`, what a negative sign does to the state.
        FORM: TO, the data type of the numbers; COLS of the program, 64 per warp, since a thread reserves shared memory
            once per column pair; PAIRS, whether two numbers have 32 bits and lie at multiples of that: one store.
    """
    NUMBER: tl.constexpr = common.number(FORM.TO)
    job = jobs + tl.program_id(0).to(tl.int64) * JOB.size
    h, w = tl.load(job + JOB.h).to(tl.int32), tl.load(job + JOB.w).to(tl.int32)
    step = tl.load(job + JOB.step).to(tl.uint32)
    index = tl.arange(0, FORM.COLS // 2)
    x = tl.program_id(1) * FORM.COLS + index * 2
    if tl.program_id(1) * FORM.COLS < w:
        lut = common.reserve(FORM.COLS // 2, 2048)
        entries = (aux + tl.load(job + JOB.entries)).to(tl.uint64)
        for k in tl.range(0, 2048, FORM.COLS * 8, loop_unroll_factor=1):
            at = index * 16 + k
            common.copy(lut + at.to(tl.uint32), entries + at.to(tl.uint64), at < 2048)
        common.arrived(index)
        tl.debug_barrier()
        column = (aux + tl.load(job + JOB.columns)).to(tl.pointer_type(tl.uint32)) + x
        column0, column1 = tl.load(column), tl.load(column + 1)
        col = (aux + tl.load(job + JOB.column_scales)).to(tl.pointer_type(tl.float32)) + x
        col0, col1 = tl.load(col), tl.load(col + 1)
        rows = (aux + tl.load(job + JOB.rows)).to(tl.uint64)
        rows0 = rows + (column0 >> 24).to(tl.uint64) * ((h + 3) // 4 * 16).to(tl.uint64)
        rows1 = rows + (column1 >> 24).to(tl.uint64) * ((h + 3) // 4 * 16).to(tl.uint64)
        scales = (aux + tl.load(job + JOB.row_scales)).to(tl.uint64)
        codes = source + tl.load(job + JOB.codes)
        codes0, codes1 = codes + (column0 & 0xFFFFFF), codes + (column1 & 0xFFFFFF)
        stride = tl.load(job + JOB.stride)
        dst = (out + tl.load(job + JOB.numbers)).to(tl.pointer_type(NUMBER)) + x
        inside0, inside1 = x < w, x + 1 < w
        state0 = tl.full((FORM.COLS // 2,), 0, tl.uint32)
        state1 = state0
        for _ in range(h // 4):
            k0, k1, k2, k3, rows0 = common.next4(rows0)
            m0, m1, m2, m3, rows1 = common.next4(rows1)
            # all loads of four rows are under way before the first store
            a0, b0 = tl.load(codes0 + k0), tl.load(codes1 + m0)
            a1, b1 = tl.load(codes0 + k1), tl.load(codes1 + m1)
            a2, b2 = tl.load(codes0 + k2), tl.load(codes1 + m2)
            a, b = (a0, a1, a2, tl.load(codes0 + k3)), (b0, b1, b2, tl.load(codes1 + m3))
            s0, s1, s2, s3, scales = common.next4(scales)
            s = (s0, s1, s2, s3)
            for y in tl.static_range(4):
                v0, state0 = _number(a[y], state0, lut, col0, s[y], step)
                v1, state1 = _number(b[y], state1, lut, col1, s[y], step)
                put(dst, v0, v1, inside0, inside1, NUMBER, FORM.PAIRS)
                dst += stride
        one0, one1 = rows0.to(tl.pointer_type(tl.uint32)), rows1.to(tl.pointer_type(tl.uint32))
        last = scales.to(tl.pointer_type(tl.uint32))
        for y in range(h % 4):
            a0 = tl.load(codes0 + tl.load(one0 + y))
            b0 = tl.load(codes1 + tl.load(one1 + y))
            row = tl.load(last + y)
            v0, state0 = _number(a0, state0, lut, col0, row, step)
            v1, state1 = _number(b0, state1, lut, col1, row, step)
            put(dst, v0, v1, inside0, inside1, NUMBER, FORM.PAIRS)
            dst += stride
