"""Kernel: the escapes of a tile (format_spec/stages/lanes.md, sections 3, 9 and 11).

Escapes are rare, and the byte of one is found by counting those before it. A warp looks through the symbols of a tile,
four in a register, and notes the places of those that escape; then it deals with these, one per thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rac.decode.cuda_lanes import popcount


@triton.jit
def escapes(units, aux, work, out, status, jobs, WORD: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr):
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
            limit of tops; place in status; offset of codes or blocks; number of blocks; offsets of the lists of rows
            and of columns, of words; words from row to row; bits below the top; offset in `work` of as many i32 as
            there are escape bytes.
        WORD: Bytes of a word.
        PLACED: Whether words stand in their places already.
        BLOCK: Registers of four symbols at once.
    """
    job = jobs + tl.program_id(0).to(tl.int64) * 16
    symbols, n, first = work + tl.load(job), tl.load(job + 1).to(tl.int32), tl.load(job + 2).to(tl.uint32)
    bases, data = (aux + tl.load(job + 3)).to(tl.pointer_type(tl.uint32)), units + tl.load(job + 4)
    count, limit, mark = tl.load(job + 5).to(tl.int32), tl.load(job + 6).to(tl.uint32), status + tl.load(job + 7)
    places = (work + tl.load(job + 15)).to(tl.pointer_type(tl.int32))
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
        if tl.max(flags, 0) != 0:
            k = base + index * 4
            rest = tl.maximum(tl.minimum(n - k, 4), 0)
            flags = tl.where(rest > 0, flags & (0x80808080 >> ((4 - rest) * 8).to(tl.uint32) % 32), 0)
            mine = popcount(flags).to(tl.int32)
            at = found + tl.cumsum(mine, 0) - mine
            for j in tl.static_range(4):
                here = (flags >> (8 * j + 7) & 1).to(tl.int32)
                tl.store(places + at, k + j, mask=(here != 0) & (at < count))
                at += here
            found += tl.sum(mine, 0)
    if found != count:
        tl.store(mark, 5)
    tl.debug_barrier()  # the places were written by other threads
    for base in range(0, tl.minimum(found, count), BLOCK):
        some = base + index < tl.minimum(found, count)
        k = tl.load(places + base + index, mask=some, other=0)
        symbol = tl.load(symbols + k).to(tl.uint32)
        top = tl.load(bases + (symbol - first), mask=some, other=0)
        top += tl.load(data + base + index, mask=some, other=0).to(tl.uint32)
        tl.store(mark + tl.zeros((BLOCK,), tl.int32), 6, mask=top >= limit)
        some = some & (top < limit)
        if PLACED:
            _add(aux, out, job, k, top, some, WORD)
        else:
            code = tl.load(aux + tl.load(job + 8) + top.to(tl.int32), mask=some, other=0)
            tl.store(symbols + k, code, mask=some)


@triton.jit
def _add(aux, out, job, k, top, some, WORD: tl.constexpr):
    """Put `top` into the words of elements `k`."""
    TYPE: tl.constexpr = tl.uint64 if WORD == 8 else tl.uint32 if WORD == 4 else tl.uint16 if WORD == 2 else tl.uint8
    blocks = (aux + tl.load(job + 8)).to(tl.pointer_type(tl.int32))
    n = tl.load(job + 9).to(tl.int32)
    low = tl.zeros_like(k)
    step = 2048
    while step > 0:  # the last block that begins at `k` or before
        next_ = low + step
        low = tl.where((next_ < n) & (tl.load(blocks + next_ * 4, mask=next_ < n, other=0) <= k), next_, low)
        step = step // 2
    block = blocks + low * 4
    k -= tl.load(block)
    cols = tl.load(block + 3)
    y = tl.load((aux + tl.load(job + 10)).to(tl.pointer_type(tl.int32)) + tl.load(block + 1) + k // cols, mask=some)
    x = tl.load((aux + tl.load(job + 11)).to(tl.pointer_type(tl.int32)) + tl.load(block + 2) + k % cols, mask=some)
    word = (out + tl.load(job + 12)).to(tl.pointer_type(TYPE)) + y * tl.load(job + 13) + x
    bits = top.to(tl.uint64) << tl.load(job + 14).to(tl.uint64)
    tl.store(word, tl.load(word, mask=some) | bits.to(TYPE), mask=some)
