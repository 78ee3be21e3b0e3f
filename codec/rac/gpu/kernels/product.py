"""Kernel: the product of lowrank/1 and basis/1, in the order that the format asks for (stages/lowrank.md, section 3).

Every term is rounded before it is added, so that there are no tensor cores and no fused multiplication and addition:
launched with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

from rac.gpu.kernels import common


@triton.jit
def product(work, objects, out, jobs, JOB: tl.constexpr, FORM: tl.constexpr):
    """ROWS x COLS elements per program: t = start; t += a[i, k] * b[k, j] for k = 0, 1, ...; t to the data type.

    Args:
        work: u8, holds the numbers of the trellis, f32; they are the start (ADDED) or a.
        objects: u8, holds the objects, f32: a (ADDED) and b.
        out: u8, takes words.
        jobs: `numbers`, `a` (ADDED) and `b`, each with numbers from row to row; `terms`; `words` and `stride` of them
            from row to row; `h`; `w`.
        FORM: WORD, bytes of a word; HALF, two bytes are F16 and not BF16; ADDED, whether t starts as numbers
            (lowrank/1) or as 0 (basis/1); ROWS and COLS of the program.
    """
    job = jobs + tl.program_id(0).to(tl.int64) * JOB.size
    h, w = tl.load(job + JOB.h).to(tl.int32), tl.load(job + JOB.w).to(tl.int32)
    across = tl.cdiv(w, FORM.COLS)
    y = tl.program_id(1) // across * FORM.ROWS + tl.arange(0, FORM.ROWS)
    x = tl.program_id(1) % across * FORM.COLS + tl.arange(0, FORM.COLS)
    if tl.program_id(1) // across * FORM.ROWS < h:
        # what lies outside is computed from what lies inside, and not stored
        row, col = tl.minimum(y, h - 1).to(tl.int64), tl.minimum(x, w - 1)
        numbers = (work + tl.load(job + JOB.numbers)).to(tl.pointer_type(tl.float32))
        numbers += row * tl.load(job + JOB.number_stride)
        if FORM.ADDED:
            a = (objects + tl.load(job + JOB.a)).to(tl.pointer_type(tl.float32)) + row * tl.load(job + JOB.a_stride)
            t = tl.load(numbers[:, None] + col[None, :])
        else:
            a = numbers
            t = tl.full((FORM.ROWS, FORM.COLS), 0, tl.float32)
        b = (objects + tl.load(job + JOB.b)).to(tl.pointer_type(tl.float32)) + col
        stride = tl.load(job + JOB.b_stride)
        for _ in tl.range(tl.load(job + JOB.terms).to(tl.int32), loop_unroll_factor=1):
            t += tl.load(a)[:, None] * tl.load(b)[None, :]
            a += 1
            b += stride
        bits = t.to(tl.uint32, bitcast=True)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        TO: tl.constexpr = common.word(FORM.WORD)
        if FORM.WORD == 4:
            word = tl.where(nan, 0x7FC00000, bits)
        elif FORM.HALF:
            word = tl.where(nan, 0x7E00, t.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32))
        else:
            word = tl.where(nan, 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
        dst = (out + tl.load(job + JOB.words)).to(tl.pointer_type(TO)) + y.to(tl.int64) * tl.load(job + JOB.stride)
        tl.store(dst[:, None] + x[None, :], word.to(TO), mask=(y < h)[:, None] & (x < w)[None, :])
