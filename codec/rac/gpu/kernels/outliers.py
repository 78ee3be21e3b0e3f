"""Kernel: outliers to their places (format_spec/stages/trellis.md, section 5)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def outliers(out, jobs, JOB: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK outliers per program, of any tensors.

    Args:
        out: u8, takes words.
        jobs: A multiple of BLOCK; `place` of a `word`.
        WORD: Bytes of a word.
        BLOCK: Outliers of a program.
    """
    job = jobs + (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * JOB.size
    TYPE: tl.constexpr = tl.uint32 if WORD == 4 else tl.uint16
    word = tl.load(job + JOB.word).to(TYPE)
    tl.store((out + tl.load(job + JOB.place)).to(tl.pointer_type(TYPE)), word)
