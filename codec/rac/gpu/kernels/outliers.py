"""Kernel: outliers to their places (format_spec/stages/trellis.md, section 5)."""

import triton
import triton.language as tl

from rac.gpu.kernels import common


@triton.jit
def outliers(out, jobs, JOB: tl.constexpr, FORM: tl.constexpr):
    """BLOCK outliers per program, of any tensors: jobs, a multiple of BLOCK, are the `place` of a `word` in `out`."""
    job = jobs + (tl.program_id(0) * FORM.BLOCK + tl.arange(0, FORM.BLOCK)) * JOB.size
    TYPE: tl.constexpr = common.word(FORM.WORD)
    word = tl.load(job + JOB.word).to(TYPE)
    tl.store((out + tl.load(job + JOB.place)).to(tl.pointer_type(TYPE)), word)
