"""Kernel: the lanes of many tiles to their symbols, in sequence order (format_spec/stages/lanes.md, section 10).

One warp steps 32 lanes: one tile of 32, two of 16, four of 8 and so on. Which lanes take a word in a row is a vote of
the warp; the bits below a lane count the words before its own.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
END = tl.constexpr(1 << 30)
WORTH = tl.constexpr(8)
"""Rows from which on the quick loop is entered."""


@triton.jit
def _popcount(v):
    """Bits that are set, for the interpreter, which has no libdevice."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (v * 0x01010101) >> 24


@triton.jit
def popcount(v):
    """Bits that are set."""
    return libdevice.popc(v.to(tl.int32, bitcast=True)).to(tl.uint32)


@triton.jit
def _ballot(flags, bit):
    """One bit per lane of the warp, for the interpreter, which knows no assembly."""
    return tl.sum(tl.where(flags, bit, 0), 0)


@triton.jit
def ballot(flags, bit):
    """One bit per lane of the warp, lane 0 the lowest."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "=r,r",
        [flags.to(tl.uint32)], dtype=tl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


if INTERPRETED:
    popcount, ballot = _popcount, _ballot


@triton.jit
def halves(address):
    """(high half in its place, low half) of addresses."""
    address = address.to(tl.uint64)
    return address & 0xFFFFFFFF00000000, address.to(tl.uint32)


@triton.jit
def at(high, low, to: tl.constexpr):
    """Pointers out of both halves of an address: a 32-bit addition moves them, which is half the work."""
    return (high | low.to(tl.uint64)).to(tl.pointer_type(to))


@triton.jit
def _rows(
    n, hi, lo, left, words, symbols, lut, table, on, second, width, below, mine, STEP: tl.constexpr,
    PER: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`n` rows of every tile of the program. WHOLE: all lanes decode, and each has a word left for every row."""
    bit = tl.full((BLOCK,), 1, tl.uint32) << tl.arange(0, BLOCK).to(tl.uint32) % 32
    for _ in tl.range(n, loop_unroll_factor=8 if WHOLE and BLOCK == 32 else 1):
        e = tl.load(at(table, lut | ((lo >> 10) & 0x3FFC), tl.uint32), mask=None if WHOLE else on)
        # x = (x >> 24) * (f << 12) + (slot - start << 12) + low bits, the entry being code, slot - start, f
        f = e & 0xFFF
        y = ((lo >> 12) | (hi << 20)) & 0xFFFFF000
        x = y.to(tl.uint64) * f.to(tl.uint64) + ((e & 0xFFF000) | (lo & 0xFFF)).to(tl.uint64)
        h = (x >> 32).to(tl.uint32) + (hi >> 12) * f
        need = h == 0
        if not WHOLE:
            need = need & on & (left > 0)
        if BLOCK == 32:
            taking = ballot(need, bit)
            rank, taken = popcount(taking & below), popcount(taking & mine)
        else:
            one = need.to(tl.uint32)
            rank = (tl.cumsum(one, 0) - one).to(tl.uint32)
            taken = tl.sum(one, 0).to(tl.uint32)
        w = tl.load(words + rank)  # lanes that take none read the next one or behind the last, which is there too
        words += taken
        if WHOLE:
            hi = tl.where(need, x.to(tl.uint32), h)
            lo = tl.where(need, w, x.to(tl.uint32))
        else:
            hi = tl.where(on, tl.where(need, x.to(tl.uint32), h), hi)
            lo = tl.where(on, tl.where(need, w, x.to(tl.uint32)), lo)
        left -= need.to(tl.int32)
        if PER == 1:
            tl.store(symbols, (e >> 24).to(tl.uint8), mask=None if WHOLE else on)
        else:
            tl.store(symbols, (e >> 24 & 15).to(tl.uint8), mask=None if WHOLE else on)
            tl.store(symbols + 1, (e >> 28).to(tl.uint8), mask=None if WHOLE else on & second)
        symbols += STEP if WHOLE else width
    return hi, lo, left, words, symbols


@triton.jit
def lanes(
    units, aux, work, status, jobs, LANES: tl.constexpr, SPAN: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr
):
    """Decode the tiles of BLOCK // SPAN jobs.

    Args:
        units: u8, holds the words, u32, that follow the start of the lanes.
        aux: u8, holds (LANES, 3) u32 per job: high and low half of the state after the start, and words left; and
            pieces, 4 i32 each: rows, lanes that decode, elements of a row, table.
        work: u8, holds the tables, 4096 u32 each (cuda_tables.py), at addresses that are multiples of 16384; the
            symbols go there, u8, one per element.
        status: i32, 4 is written to where a lane does not end empty in state 0.
        jobs: (n, 8) int64, n a multiple of BLOCK // SPAN: offsets of state, words, tables, symbols, pieces, the number
            of pieces, place in status.
        LANES: Lanes of a tile.
        SPAN: `LANES` rounded up to a power of two.
        PER: Elements in a symbol; the code of a pair is a | b << 4.
        BLOCK: Lanes of the program: 32, or SPAN where that is more.
    """
    index = tl.arange(0, BLOCK)
    lane = index % SPAN
    job = jobs + (tl.program_id(0) * (BLOCK // SPAN) + index // SPAN) * 8
    exists = lane < LANES
    state = (aux + tl.load(job)).to(tl.pointer_type(tl.uint32)) + lane * 3
    hi = tl.load(state, mask=exists, other=0)
    lo = tl.load(state + 1, mask=exists, other=0)
    left = tl.load(state + 2, mask=exists, other=0).to(tl.int32)
    words = (units + tl.load(job + 1)).to(tl.pointer_type(tl.uint32))
    tables = (work + tl.load(job + 2)).to(tl.uint64)
    symbols = work + tl.load(job + 3) + lane * PER
    piece = (aux + tl.load(job + 4)).to(tl.pointer_type(tl.int32))
    pieces = tl.load(job + 5).to(tl.int32)
    one = tl.full((BLOCK,), 1, tl.uint32)
    first = (index // SPAN * SPAN % 32).to(tl.uint32)
    mine = (((one << (SPAN % 32)) - 1) << first) if SPAN < 32 else tl.full((BLOCK,), 0xFFFFFFFF, tl.uint32)
    below = ((one << (lane % 32).to(tl.uint32)) - 1) << first

    rows = tl.zeros((BLOCK,), tl.int32)
    width = rows
    on = index < 0
    second = on
    table, lut = halves(tables)
    n = 0
    while n < END:
        new = rows == 0
        some = new & (pieces > 0)
        rows = tl.where(new, tl.load(piece, mask=some, other=END), rows)
        on = tl.where(new, lane < tl.load(piece + 1, mask=some, other=0), on)
        width = tl.where(new, tl.load(piece + 2, mask=some, other=0), width)
        found = tables + tl.load(piece + 3, mask=some, other=0).to(tl.uint64) * 16384
        table = tl.where(new, found & 0xFFFFFFFF00000000, table)
        lut = tl.where(new, found.to(tl.uint32), lut)
        piece = tl.where(some, piece + 4, piece)
        pieces -= some.to(tl.int32)
        second = lane * PER + 1 < width
        n = tl.min(rows, 0)
        if n < END:
            whole = 0
            if BLOCK == 32:  # more lanes than a warp has are rare, and need fewer registers without
                whole = tl.min(tl.where(on & (width == LANES * PER), tl.minimum(left, rows), 0), 0)
            if whole >= WORTH:
                n = whole
                hi, lo, left, words, symbols = _rows(
                    n, hi, lo, left, words, symbols, lut, table, on, second, width, below, mine,
                    LANES * PER, PER, BLOCK, True,
                )  # fmt: skip
            else:
                n = tl.minimum(n, 4 * WORTH)
                hi, lo, left, words, symbols = _rows(
                    n, hi, lo, left, words, symbols, lut, table, on, second, width, below, mine,
                    LANES * PER, PER, BLOCK, False,
                )  # fmt: skip
            rows = tl.where(rows < END, rows - n, rows)
    tl.store(status + tl.load(job + 6), 4, mask=exists & ((hi | lo | left.to(tl.uint32)) != 0))
