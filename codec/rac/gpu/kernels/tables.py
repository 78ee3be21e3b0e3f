"""Kernel: frequency tables to look-up tables (format_spec/stages/lanes.md, section 6)."""

import triton
import triton.language as tl


@triton.jit
def tables(aux, work, jobs, JOB: tl.constexpr, FORM: tl.constexpr):
    """One table per program.

    Args:
        aux: u8, holds per job (257,) u32 starts, 4096 behind the last symbol, and (256,) u8 codes.
        work: u8, takes the code of each of 4096 slots, u8, and for each code that has a frequency (256, 2) u32:
            frequency << 12, -start << 12.
        jobs: `starts`, `codes`, `table`.
        FORM: BLOCK, slots at once.
    """
    job = jobs + tl.program_id(0) * JOB.size
    starts = (aux + tl.load(job + JOB.starts)).to(tl.pointer_type(tl.uint32))
    codes = aux + tl.load(job + JOB.codes)
    table = work + tl.load(job + JOB.table)
    for base in range(0, 4096, FORM.BLOCK):
        slot = (base + tl.arange(0, FORM.BLOCK)).to(tl.uint32)
        symbol = tl.full((FORM.BLOCK,), 0, tl.int32)
        for k in tl.static_range(8):  # the last symbol whose start is not above the slot
            next_ = symbol + (128 >> k)
            symbol = tl.where(tl.load(starts + next_) <= slot, next_, symbol)
        tl.store(table + slot, tl.load(codes + symbol))
    symbol = tl.arange(0, 256)
    start, end = tl.load(starts + symbol), tl.load(starts + symbol + 1)
    entry = (table + 4096).to(tl.pointer_type(tl.uint32)) + tl.load(codes + symbol).to(tl.int32) * 2
    tl.store(entry, end - start << 12, mask=end > start)
    tl.store(entry + 1, 0 - (start << 12), mask=end > start)
