"""Kernel: frequency tables to look-up tables (format_spec/stages/lanes.md, section 6)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tables(aux, work, jobs, BLOCK: tl.constexpr):
    """One table per program.

    Args:
        aux: u8, holds per job (257,) u32 starts, 4096 behind the last symbol, and (256,) u8 codes.
        work: u8, takes 4096 u32: frequency | slot - start << 12 | code << 24.
        jobs: (n, 3) int64: offsets of starts, codes, table.
        BLOCK: Slots at once.
    """
    job = jobs + tl.program_id(0) * 3
    starts = (aux + tl.load(job)).to(tl.pointer_type(tl.uint32))
    codes = aux + tl.load(job + 1)
    table = (work + tl.load(job + 2)).to(tl.pointer_type(tl.uint32))
    for base in range(0, 4096, BLOCK):
        slot = (base + tl.arange(0, BLOCK)).to(tl.uint32)
        symbol = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(8):  # the last symbol whose start is not above the slot
            next_ = symbol + (128 >> k)
            symbol = tl.where(tl.load(starts + next_) <= slot, next_, symbol)
        start = tl.load(starts + symbol)
        code = tl.load(codes + symbol).to(tl.uint32)
        tl.store(table + slot, (tl.load(starts + symbol + 1) - start) | (slot - start) << 12 | code << 24)
