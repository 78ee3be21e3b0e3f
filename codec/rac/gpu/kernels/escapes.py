"""Kernel: the escapes of a tile (format_spec/stages/lanes.md, sections 3, 9 and 11).

The kernel of the lanes has noted the places of the symbols that escape; here each of them gets its byte, one per
thread.
"""

import triton
import triton.language as tl

from rac.gpu.kernels import common


@triton.jit
def escapes(units, aux, work, out, status, jobs, JOB: tl.constexpr, FORM: tl.constexpr):
    """One tile per program.

    Args:
        units: u8, holds the escape bytes.
        aux: u8, holds the bases of the escapes (256,) u32; the codes of words (256,) u8 or, PLACED, blocks (n, 4) i32:
            place of the first element, of its row and column in the lists, columns; and the lists of rows and of
            columns, i32, sorted by class.
        work: u8, holds the symbols, u8, and takes codes unless PLACED; and the places of those that escape, i32, one
            per escape byte.
        out: u8, PLACED, holds the words, to which tops are added.
        status: i32, 6 where a top is out of range; a tile that is not 0 there is left as it is.
        jobs: `symbols`, the `first` that escapes, `bases`, `count` of `bytes`, `limit` that tops are below, place in
            `status`, `codes` unless PLACED; `n` `blocks`, lists of `rows` and `columns`, `words` and `stride` of them
            from row to row, `shift`, the bits below a top; `places`.
        FORM: WORD, bytes of a word; PLACED, whether words stand in their places already; BLOCK, escapes at once.
    """
    job = jobs + tl.program_id(0).to(tl.int64) * JOB.size
    symbols, first = work + tl.load(job + JOB.symbols), tl.load(job + JOB.first).to(tl.uint32)
    bases, data = (aux + tl.load(job + JOB.bases)).to(tl.pointer_type(tl.uint32)), units + tl.load(job + JOB.bytes)
    count, limit = tl.load(job + JOB.count).to(tl.int32), tl.load(job + JOB.limit).to(tl.uint32)
    mark = status + tl.load(job + JOB.status)
    places = (work + tl.load(job + JOB.places)).to(tl.pointer_type(tl.int32))
    if tl.load(mark) == 0:  # else there may be too few places
        for base in range(0, count, FORM.BLOCK):
            index = base + tl.arange(0, FORM.BLOCK)
            some = index < count
            k = tl.load(places + index, mask=some, other=0)
            symbol = tl.load(symbols + k).to(tl.uint32)
            top = tl.load(bases + (symbol - first), mask=some, other=0)
            top += tl.load(data + index, mask=some, other=0).to(tl.uint32)
            tl.store(mark + tl.full((FORM.BLOCK,), 0, tl.int32), 6, mask=top >= limit)
            some = some & (top < limit)
            if FORM.PLACED:
                _add(aux, out, job, k, top, some, JOB, FORM)
            else:
                code = tl.load(aux + tl.load(job + JOB.codes) + top.to(tl.int32), mask=some, other=0)
                tl.store(symbols + k, code, mask=some)


@triton.jit
def _add(aux, out, job, k, top, some, JOB: tl.constexpr, FORM: tl.constexpr):
    """Put `top` into the words of elements `k`."""
    TYPE: tl.constexpr = common.word(FORM.WORD)
    blocks = (aux + tl.load(job + JOB.blocks)).to(tl.pointer_type(tl.int32))
    n = tl.load(job + JOB.n).to(tl.int32)
    low = tl.zeros_like(k)
    step = 2048
    while step > 0:  # the last block that begins at `k` or before
        next_ = low + step
        low = tl.where((next_ < n) & (tl.load(blocks + next_ * 4, mask=next_ < n, other=0) <= k), next_, low)
        step = step // 2
    block = blocks + low * 4
    k -= tl.load(block)
    cols = tl.load(block + 3)
    rows = (aux + tl.load(job + JOB.rows)).to(tl.pointer_type(tl.int32)) + tl.load(block + 1)
    y = tl.load(rows + k // cols, mask=some)
    columns = (aux + tl.load(job + JOB.columns)).to(tl.pointer_type(tl.int32)) + tl.load(block + 2)
    x = tl.load(columns + k % cols, mask=some)
    word = (out + tl.load(job + JOB.words)).to(tl.pointer_type(TYPE)) + y * tl.load(job + JOB.stride) + x
    bits = top.to(tl.uint64) << tl.load(job + JOB.shift).to(tl.uint64)
    tl.store(word, tl.load(word, mask=some) | bits.to(TYPE), mask=some)
