"""Kernel: the escapes of a tile (format_spec/stages/lanes.md, sections 3, 9 and 11).

Escapes are rare, and the byte of one is found by counting those before it. A warp looks through the symbols of a tile,
four in a register, and stops at each that escapes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rac.decode.cuda_lanes import popcount

FAR = tl.constexpr(1 << 30)


@triton.jit
def _any(a, b):
    return a | b


@triton.jit
def escapes(
    units, aux, work, out, status, jobs, WORD: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr
):
    """One tile per program.

    Args:
        units: u8, holds the escape bytes.
        aux: u8, holds the bases of the escapes (256,) u32; the codes of words (256,) u8 or, PLACED, blocks (n, 4) i32:
            place of the first element, of its row and column in the lists, columns; and the lists of rows and of
            columns, i32, sorted by class.
        work: u8, holds the symbols, u8, and takes codes unless PLACED.
        out: u8, PLACED, holds the words, to which tops are added.
        status: i32, 5 where the number of escapes is another than that of bytes, 6 where a top is out of range.
        jobs: (n, 16) int64: offset of symbols; elements; first symbol that escapes; offsets of bases, of bytes; bytes;
            limit of tops; place in status; offset of codes or blocks; number of blocks; offsets of the lists of rows and
            columns, of words; words from row to row; bits below the top.
        WORD: Bytes of a word.
        PLACED: Whether words stand in their places already.
        BLOCK: Registers of four symbols at once.
    """
    job = jobs + tl.program_id(0).to(tl.int64) * 16
    symbols, n, first = work + tl.load(job), tl.load(job + 1).to(tl.int32), tl.load(job + 2).to(tl.uint32)
    bases, data = (aux + tl.load(job + 3)).to(tl.pointer_type(tl.uint32)), units + tl.load(job + 4)
    count, limit, mark = tl.load(job + 5).to(tl.int32), tl.load(job + 6).to(tl.uint32), status + tl.load(job + 7)
    index = tl.arange(0, BLOCK)
    words = symbols.to(tl.pointer_type(tl.uint32)) + index
    half = first <= 128
    more = tl.where(half, 128 - first, 256 - first) * 0x01010101
    found = 0
    for base in range(0, n, 4 * BLOCK):
        v = tl.load(words, mask=index * 4 < n - base, other=0)
        words += BLOCK
        # the highest bit of each byte that is `first` or more
        flags = (v & 0x7F7F7F7F) + more
        flags = tl.where(half, flags | v, flags & v) & 0x80808080
        some = tl.reduce(flags, 0, _any)
        while some != 0:
            low = (popcount((flags & (0 - flags)) - 1) >> 3).to(tl.int32)
            k = tl.min(tl.where(flags != 0, index * 4 + low, FAR), 0)
            flags = tl.where(index == k // 4, flags & (flags - 1), flags)
            some = tl.reduce(flags, 0, _any)
            k += base
            if k < n:
                if found < count:
                    symbol = tl.load(symbols + k).to(tl.int32)
                    top = tl.load(bases + symbol - first.to(tl.int32)) + tl.load(data + found).to(tl.uint32)
                    if top >= limit:
                        tl.store(mark, 6)
                    else:
                        if PLACED:
                            _add(aux, out, job, k, top, WORD)
                        else:
                            tl.store(symbols + k, tl.load(aux + tl.load(job + 8) + top.to(tl.int32)))
                found += 1
    if found != count:
        tl.store(mark, 5)


@triton.jit
def _add(aux, out, job, k, top, WORD: tl.constexpr):
    """Put `top` into the word of element `k`."""
    TYPE: tl.constexpr = tl.uint64 if WORD == 8 else tl.uint32 if WORD == 4 else tl.uint16 if WORD == 2 else tl.uint8
    blocks = (aux + tl.load(job + 8)).to(tl.pointer_type(tl.int32))
    low, high = 0, tl.load(job + 9).to(tl.int32)
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(blocks + middle * 4) <= k
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    block = blocks + low * 4
    k -= tl.load(block)
    cols = tl.load(block + 3)
    y = tl.load((aux + tl.load(job + 10)).to(tl.pointer_type(tl.int32)) + tl.load(block + 1) + k // cols)
    x = tl.load((aux + tl.load(job + 11)).to(tl.pointer_type(tl.int32)) + tl.load(block + 2) + k % cols)
    word = (out + tl.load(job + 12)).to(tl.pointer_type(TYPE)) + y * tl.load(job + 13) + x
    bits = top.to(tl.uint64) << tl.load(job + 14).to(tl.uint64)
    tl.store(word, tl.load(word) | bits.to(TYPE))
