"""Kernel: the lanes of many tiles to their symbols, in sequence order (format_spec/stages/lanes.md, section 10).

One warp steps 32 lanes: one tile of 32, two of 16, four of 8 and so on. Which lanes take a word in a row is a vote of
the warp; the bits below a lane count the words before its own.

A look-up has two steps: the slot to its code, a byte, and the code to frequency and start. Threads read at random, so
that the table is copied into shared memory, where they wait for banks and not for cache lines; where a warp has more
than two tiles, each with a table of its own, it stays in global memory.
"""

import triton
import triton.language as tl

from rac.gpu.kernels import common

END = tl.constexpr(1 << 30)


@triton.jit
def _row(hi, lo, left, words, symbols, top, lut, on, second, below, mine, bit, FORM: tl.constexpr, WHOLE: tl.constexpr):
    """One row of every tile of the program. WHOLE: all lanes decode, and each has a word left."""
    SHARED: tl.constexpr = FORM.SPAN >= 16
    m = common.low24(lo)
    if SHARED:
        code = common.shared_byte(lut + (m >> 12))
        if not WHOLE:
            code &= FORM.ENTRIES - 1  # of lanes that do not decode
        f, start = common.shared_pair(lut + (code << 3), 4096)
    else:
        code = common.global_byte(lut + (m >> 12))
        f, start = common.global_pair(lut + (code << 3), 4096)
    # x = (x >> 24) * (f << 12) + x % 2^24 - (start << 12)
    x, h = common.multiply_add(lo >> 24 | hi << 8, f, m + start, (hi >> 24) * f)
    need = h == 0
    if not WHOLE:
        need = need & on & (left > 0)
    if FORM.BLOCK == 32:
        taking = common.ballot(need, bit)
        rank, taken = common.popcount(taking & below), common.popcount(taking & mine)
    else:
        one = need.to(tl.uint32)
        rank = (tl.cumsum(one, 0) - one).to(tl.uint32)
        taken = tl.sum(one, 0).to(tl.uint32)
    w = tl.load(words + rank)  # lanes that take none read the next one or behind the last, which is there too
    words += taken
    if WHOLE:
        hi = tl.where(need, x, h)
        lo = tl.where(need, w, x)
        left = common.less_if_zero(left, h)
    else:
        hi = tl.where(on, tl.where(need, x, h), hi)
        lo = tl.where(on, tl.where(need, w, x), lo)
        left -= need.to(tl.int32)
    if FORM.PER == 1:
        tl.store(symbols, code.to(tl.uint8), mask=None if WHOLE else on)
        top = tl.maximum(top, code)
    else:
        two = code >> 4
        one = (code ^ two) & 15
        tl.store(symbols, one.to(tl.uint8), mask=None if WHOLE else on)
        tl.store(symbols + 1, two.to(tl.uint8), mask=None if WHOLE else on & second)
        top = tl.maximum(tl.maximum(top, one), two)
    return hi, lo, left, words, top


@triton.jit
def _note(job, work, piece, symbols, found, n, first, lane, below, mine, bit, JOB: tl.constexpr, FORM: tl.constexpr):
    """Note the escapes among the `n` rows in front of `symbols`; the new number of those found."""
    on, step = lane < tl.load(piece + 1), tl.load(piece + 2)
    second = on & (lane * FORM.PER + 1 < step)
    at = symbols - n * step
    k = (at.to(tl.uint64) - (work + tl.load(job + JOB.symbols)).to(tl.uint64)).to(tl.int32)
    places = (work + tl.load(job + JOB.places)).to(tl.pointer_type(tl.int32))
    count = tl.load(job + JOB.escapes).to(tl.int32)
    for _ in tl.range(n, loop_unroll_factor=1):
        one = on & (tl.load(at, mask=on, other=0).to(tl.uint32) >= first)
        two = one & (on != on)
        if FORM.PER == 2:
            two = second & (tl.load(at + 1, mask=second, other=0).to(tl.uint32) >= first)
        if FORM.BLOCK == 32:
            b = common.ballot(one, bit)
            rank, number = common.popcount(b & below), common.popcount(b & mine)
            if FORM.PER == 2:
                b = common.ballot(two, bit)
                rank += common.popcount(b & below)
                number += common.popcount(b & mine)
        else:
            both = one.to(tl.uint32) + two.to(tl.uint32)
            rank = (tl.cumsum(both, 0) - both).to(tl.uint32)
            number = tl.sum(both, 0).to(tl.uint32)
        p = found + rank.to(tl.int32)
        tl.store(places + p, k, mask=one & (p < count))
        if FORM.PER == 2:
            p += one.to(tl.int32)
            tl.store(places + p, k + 1, mask=two & (p < count))
        found += number.to(tl.int32)
        at += step
        k += step
    return found


@triton.jit
def lanes(units, aux, work, status, jobs, JOB: tl.constexpr, FORM: tl.constexpr):
    """Decode the tiles of BLOCK // SPAN jobs.

    Args:
        units: u8, holds the words, u32, that follow the start of the lanes.
        aux: u8, holds (LANES, 3) u32 per job: high and low half of the state after the start, and words left; and
            pieces, 4 i32 each: rows, lanes that decode, elements of a row, table; the first has no rows and no table
            (-1), the last END rows without lanes, and the table of the one before it.
        work: u8, holds the tables (tables.py); the symbols go there, u8, one per element, and the places of those
            that escape, i32, in order.
        status: i32, 4 is written to where a lane does not end empty in state 0, 5 where the number of escapes is
            another than that of their bytes.
        jobs: A multiple of BLOCK // SPAN: `states`, `words`, `tables`, `symbols`, `pieces`; place in `status`; `rows`
            of the tile, for the host to sort by; the `first` symbol that escapes; `places` of `escapes` elements.
        FORM: LANES of a tile; SPAN, these rounded up to a power of two; PER, elements in a symbol, where the code of a
            pair is a ^ b | b << 4, for which fewer threads meet in a bank; BLOCK, lanes of the program, 32 or a larger
            SPAN; ENTRIES, which codes are below, a power of two, at least 16.
    """
    index = tl.arange(0, FORM.BLOCK)
    lane = index % FORM.SPAN
    job = jobs + (tl.program_id(0) * (FORM.BLOCK // FORM.SPAN) + index // FORM.SPAN) * JOB.size
    exists = lane < FORM.LANES
    state = (aux + tl.load(job + JOB.states)).to(tl.pointer_type(tl.uint32)) + lane * 3
    hi = tl.load(state, mask=exists, other=0)
    lo = tl.load(state + 1, mask=exists, other=0)
    left = tl.load(state + 2, mask=exists, other=0).to(tl.int32)
    words = (units + tl.load(job + JOB.words)).to(tl.pointer_type(tl.uint32))
    symbols = work + tl.load(job + JOB.symbols) + lane * FORM.PER
    piece = (aux + tl.load(job + JOB.pieces)).to(tl.pointer_type(tl.int32))
    escape = tl.load(job + JOB.first).to(tl.uint32)
    TABLE: tl.constexpr = 4096 + 8 * FORM.ENTRIES
    SHARED: tl.constexpr = FORM.SPAN >= 16
    ROUND: tl.constexpr = 8 if SHARED else 4  # rows that the quick loop decodes before it looks for escapes
    if SHARED:
        lut = common.reserve(FORM.BLOCK, TABLE * (FORM.BLOCK // FORM.SPAN)) + (index // FORM.SPAN * TABLE).to(tl.uint32)
    else:
        lut = (work + tl.load(job + JOB.tables)).to(tl.uint64)
    one = tl.full((FORM.BLOCK,), 1, tl.uint32)
    first = (index // FORM.SPAN * FORM.SPAN % 32).to(tl.uint32)
    mine = tl.full((FORM.BLOCK,), 0xFFFFFFFF, tl.uint32)
    if FORM.SPAN < 32:
        mine = ((one << FORM.SPAN) - 1) << first
    below = ((one << (lane % 32).to(tl.uint32)) - 1) << first
    bit = one << index.to(tl.uint32) % 32

    rows = tl.full((FORM.BLOCK,), 0, tl.int32)
    found = rows
    n = 0
    while n < END:
        new = rows == 0
        piece = tl.where(new, piece + 4, piece)
        rows = tl.where(new, tl.load(piece), rows)
        on, width = lane < tl.load(piece + 1), tl.load(piece + 2)
        second = lane * FORM.PER + 1 < width
        table = tl.load(piece + 3)
        changed = new & (table != tl.load(piece - 1))
        if tl.max(changed.to(tl.int32), 0) != 0:
            source = (work + tl.load(job + JOB.tables)).to(tl.uint64) + table.to(tl.uint64) * 6144
            if SHARED:
                tl.debug_barrier()  # nobody reads the last one any more
                for k in tl.range(0, TABLE, FORM.SPAN * 16, loop_unroll_factor=1):
                    at = lane * 16 + k
                    common.copy(lut + at.to(tl.uint32), source + at.to(tl.uint64), changed & (at < TABLE))
                common.arrived(lane)
                tl.debug_barrier()
            else:
                lut = source
        n = tl.min(rows, 0)
        if n < END:
            whole = 0
            if FORM.BLOCK == 32:  # more lanes than a warp has are rare, and need fewer registers without
                whole = tl.min(tl.where(on & (width == FORM.LANES * FORM.PER), tl.minimum(left, rows), 0), 0)
            top = tl.full((FORM.BLOCK,), 0, tl.uint32)
            hit = 0
            if whole >= ROUND:
                while (whole >= ROUND) & (hit == 0):
                    top = tl.full((FORM.BLOCK,), 0, tl.uint32)
                    for _ in tl.static_range(ROUND):
                        hi, lo, left, words, top = _row(
                            hi, lo, left, words, symbols, top, lut, on, second, below, mine, bit, FORM, True
                        )
                        symbols += FORM.LANES * FORM.PER
                    whole -= ROUND
                    rows -= ROUND
                    hit = tl.max((top >= escape).to(tl.int32), 0)
                last = ROUND
            else:
                n = tl.minimum(n, 32)
                for _ in tl.range(n, loop_unroll_factor=1):
                    hi, lo, left, words, top = _row(
                        hi, lo, left, words, symbols, top, lut, on, second, below, mine, bit, FORM, False
                    )
                    symbols += width
                hit = tl.max((top >= escape).to(tl.int32), 0)
                last = n
                rows = tl.where(rows < END, rows - n, rows)
            if hit != 0:
                found = _note(job, work, piece, symbols, found, last, escape, lane, below, mine, bit, JOB, FORM)
    mark = status + tl.load(job + JOB.status)
    tl.store(mark, 4, mask=exists & ((hi | lo | left.to(tl.uint32)) != 0))
    tl.debug_barrier()
    tl.store(mark, 5, mask=found != tl.load(job + JOB.escapes).to(tl.int32))
