"""Kernel: codes to the numbers of groups/1 (format_spec/stages/groups.md, section 4).

A thread walks down two neighbouring columns. Codes and zeros become floats as the lowest bits of 2^23, which takes no
conversion, and whose difference is exact.
"""

import triton
import triton.language as tl

from rac.gpu.kernels import common
from rac.gpu.kernels.trellis import put


@triton.jit
def _codes(at, inside1, PAIRS: tl.constexpr):
    """The codes of two neighbours."""
    if PAIRS:
        both = tl.load(at.to(tl.pointer_type(tl.uint16))).to(tl.uint32)
        return both & 255, both >> 8
    return tl.load(at).to(tl.uint32), tl.load(at + 1, mask=inside1, other=0).to(tl.uint32)


@triton.jit
def _number(code, entry):
    """The number of a code, a float; `entry`: scale and 2^23 + zero."""
    scale = entry.to(tl.uint32).to(tl.float32, bitcast=True)
    zero = (entry >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return ((code | 0x4B000000).to(tl.float32, bitcast=True) - zero) * scale


@triton.jit
def groups(source, aux, out, status, jobs, JOB: tl.constexpr, FORM: tl.constexpr):
    """ROWS x COLS codes per program.

    Args:
        source: u8, holds the codes in row-major order.
        aux: u8, holds the groups of the matrix (R, G, 2) f32: scale, 2^23 + zero.
        out: u8, takes the numbers.
        status: i32, 9 where a code is too large.
        jobs: `codes` and `code_stride` of them from row to row; the `entries` from the group on in which the tile
            begins, G `lists` of them a row, `group` columns each, `left` of the first are left of the tile; `numbers`
            and `stride` of them from row to row; `h`; `w`; `bits_status`, bits of a code | place in status << 8.
        FORM: TO, the data type of the numbers; PAIRS, whether two codes and two numbers lie at multiples of their
            bytes, so that each are moved as one word; SAME, whether columns 2 k and 2 k + 1 have one group; ROWS, a
            multiple of 4, and COLS of the program.
    """
    NUMBER: tl.constexpr = common.number(FORM.TO)
    job = jobs + tl.program_id(0).to(tl.int64) * JOB.size
    h, w = tl.load(job + JOB.h).to(tl.int32), tl.load(job + JOB.w).to(tl.int32)
    across = tl.cdiv(w, FORM.COLS)
    first = tl.program_id(1) // across * FORM.ROWS
    x = tl.program_id(1) % across * FORM.COLS + tl.arange(0, FORM.COLS // 2) * 2
    if first < h:
        inside0, inside1 = x < w, x + 1 < w
        from_, step, stride = tl.load(job + JOB.code_stride), tl.load(job + JOB.lists), tl.load(job + JOB.stride)
        near = tl.minimum(x, (w - 1) // 2 * 2)  # what lies outside is computed from what lies inside, and not stored
        codes = source + tl.load(job + JOB.codes) + first * from_ + near
        left, group = tl.load(job + JOB.left).to(tl.int32), tl.load(job + JOB.group).to(tl.int32)
        entries = (aux + tl.load(job + JOB.entries)).to(tl.pointer_type(tl.uint64)) + first * step
        entries += (near + left) // group
        next_ = (tl.minimum(x + 1, w - 1) + left) // group - (near + left) // group  # from one column's to the other's
        dst = (out + tl.load(job + JOB.numbers)).to(tl.pointer_type(NUMBER)) + first * stride + x
        seen = tl.full((FORM.COLS // 2,), 0, tl.uint32)
        rest = tl.minimum(h - first, FORM.ROWS)
        fours = rest // 4 if FORM.SAME else 0  # registers are too few for four rows of groups that are apart
        for _ in range(fours):
            # all loads of four rows are under way before the first store
            a0, b0 = _codes(codes, inside1, FORM.PAIRS)
            a1, b1 = _codes(codes + from_, inside1, FORM.PAIRS)
            codes += 2 * from_
            a2, b2 = _codes(codes, inside1, FORM.PAIRS)
            a3, b3 = _codes(codes + from_, inside1, FORM.PAIRS)
            codes += 2 * from_
            p0, p1 = tl.load(entries), tl.load(entries + step)
            entries += 2 * step
            p2, p3 = tl.load(entries), tl.load(entries + step)
            entries += 2 * step
            seen |= a0 | a1 | a2 | a3 | b0 | b1 | b2 | b3
            a, b, p = (a0, a1, a2, a3), (b0, b1, b2, b3), (p0, p1, p2, p3)
            for y in tl.static_range(4):
                put(dst, _number(a[y], p[y]), _number(b[y], p[y]), inside0, inside1, NUMBER, FORM.PAIRS)
                dst += stride
        for _ in range(fours * 4, rest):
            a0, b0 = _codes(codes, inside1, FORM.PAIRS)
            p0 = tl.load(entries)
            q0 = p0 if FORM.SAME else tl.load(entries + next_)
            seen |= a0 | b0
            put(dst, _number(a0, p0), _number(b0, q0), inside0, inside1, NUMBER, FORM.PAIRS)
            codes += from_
            entries += step
            dst += stride
        last = tl.load(job + JOB.bits_status)
        mark = status + (last >> 8) + tl.full((FORM.COLS // 2,), 0, tl.int32)
        tl.store(mark, 9, mask=seen >> (last & 255).to(tl.uint32) != 0)
