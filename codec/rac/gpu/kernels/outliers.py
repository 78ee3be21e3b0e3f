"""Kernel: outliers to their places (format_spec/stages/trellis.md, section 5)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def outliers(aux, out, jobs, n, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK outliers per program, of any tensors.

    Args:
        aux: u8, unused.
        out: u8, takes words.
        jobs: (n, 2) int64: offset, word.
        n: Outliers.
        WORD: Bytes of a word.
        BLOCK: Outliers of a program.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    TYPE: tl.constexpr = tl.uint32 if WORD == 4 else tl.uint16
    offset = tl.load(jobs + 2 * i, mask=i < n, other=0)
    value = tl.load(jobs + 2 * i + 1, mask=i < n, other=0)
    tl.store((out + offset).to(tl.pointer_type(TYPE)), value.to(TYPE), mask=i < n)
