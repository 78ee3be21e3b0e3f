"""Steps of the kernel of the lanes that are one or two instructions, and what stands for them in the interpreter.

Plain triton cannot index shared memory, count a population or vote; the interpreter knows no assembly. There, shared
memory is an array of numpy, and the same addresses are computed.
"""

import os

import numpy as np
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_memory = np.zeros(1 << 15 if INTERPRETED else 0, np.uint8)
_address = -(-_memory.ctypes.data // 16) * 16
BALLOT = tl.constexpr("{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }")
MULTIPLY_ADD = tl.constexpr("{ .reg .b64 t; mov.b64 t, {$4, $5}; mad.wide.u32 t, $2, $3, t; mov.b64 {$0, $1}, t; }")
LESS_IF_ZERO = tl.constexpr("{ .reg .pred p; setp.eq.u32 p, $2, 0; mov.b32 $0, $1; @p add.s32 $0, $0, -1; }")
COPY = tl.constexpr(
    "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p cp.async.ca.shared.global [$1], [$2], 16; mov.u32 $0, 0; }"
)
ARRIVED = tl.constexpr("cp.async.wait_all; mov.u32 $0, 0;")
NEXT4 = tl.constexpr("ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$5]; add.u64 $4, $5, 16;")


@triton.constexpr_function
def number(dtype):
    """The type of numbers of a data type of the format."""
    return {"F32": tl.float32, "F16": tl.float16, "BF16": tl.bfloat16}[dtype]


@triton.constexpr_function
def word(size):
    """The type of words of so many bytes."""
    return {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}[size]


@triton.jit
def popcount(v):
    """Bits that are set."""
    return libdevice.popc(v.to(tl.int32, bitcast=True)).to(tl.uint32)


@triton.jit
def ballot(flags, bit):
    """One bit per lane of the warp, lane 0 the lowest; `bit` is that of the lane."""
    return tl.inline_asm_elementwise(BALLOT, "=r,r", [flags.to(tl.uint32)], tl.uint32, is_pure=False, pack=1)


@triton.jit
def low24(v):
    """The lowest 24 bits. Assembly, since the compiler would compute a part of them twice."""
    return tl.inline_asm_elementwise("and.b32 $0, $1, 0xffffff;", "=r,r", [v], tl.uint32, is_pure=True, pack=1)


@triton.jit
def multiply_add(a, b, low, high):
    """(Low, high half) of a * b + low + high * 2^32, all of 32 bits."""
    return tl.inline_asm_elementwise(
        MULTIPLY_ADD, "=r,=r,r,r,r,r", [a, b, low, high], (tl.uint32, tl.uint32), is_pure=True, pack=1
    )


@triton.jit
def less_if_zero(n, v):
    """One less than `n` where `v` is 0."""
    return tl.inline_asm_elementwise(LESS_IF_ZERO, "=r,r,r", [n, v], tl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def _reservation(size):
    return f"{{ .shared .align 16 .b8 held[{size}]; mov.u32 $0, held; }}"


@triton.jit
def reserve(BLOCK: tl.constexpr, BYTES: tl.constexpr):
    """Address of so many bytes of static shared memory, a multiple of 16, for every thread."""
    each = tl.full((BLOCK,), 0, tl.uint32)
    return tl.inline_asm_elementwise(_reservation(BYTES), "=r,r", [each], tl.uint32, is_pure=False, pack=1)


@triton.jit
def copy(to, source, flags):
    """Begin to copy 16 bytes of global memory into shared memory, in threads whose flag is set."""
    flags = flags.to(tl.uint32)
    tl.inline_asm_elementwise(COPY, "=r,r,l,r", [to, source, flags], tl.uint32, is_pure=False, pack=1)


@triton.jit
def arrived(threads):
    """Wait for what this thread copies."""
    tl.inline_asm_elementwise(ARRIVED, "=r,r", [threads], tl.uint32, is_pure=False, pack=1)


@triton.jit
def shared_byte(address):
    """A byte of shared memory."""
    return tl.inline_asm_elementwise("ld.shared.u8 $0, [$1];", "=r,r", [address], tl.uint32, is_pure=False, pack=1)


@triton.jit
def shared_pair(address, OFFSET: tl.constexpr):
    """Two words of 32 bits of shared memory, OFFSET bytes behind an address."""
    return tl.inline_asm_elementwise(_pair(OFFSET), "=r,=r,r", [address], (tl.uint32, tl.uint32), is_pure=False, pack=1)


@triton.constexpr_function
def _pair(offset):
    return f"ld.shared.v2.u32 {{$0, $1}}, [$2+{offset}];"


@triton.jit
def next4(address):
    """(Four words of 32 bits at an address that is a multiple of 16, the address behind them). Nobody writes there."""
    return tl.inline_asm_elementwise(
        NEXT4,
        "=r,=r,=r,=r,=l,l",
        [address],
        (tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint64),
        is_pure=True,
        pack=1,
    )


@triton.jit
def global_byte(address):
    """A byte of global memory."""
    return tl.load(address.to(tl.pointer_type(tl.uint8))).to(tl.uint32)


@triton.jit
def global_pair(address, OFFSET: tl.constexpr):
    """Two words of 32 bits of global memory, OFFSET bytes behind an address."""
    both = tl.load((address + OFFSET).to(tl.pointer_type(tl.uint64)))
    return both.to(tl.uint32), (both >> 32).to(tl.uint32)


@triton.jit
def _popcount(v):
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (v * 0x01010101) >> 24


@triton.jit
def _ballot(flags, bit):
    return tl.sum(tl.where(flags, bit, 0), 0)


@triton.jit
def _low24(v):
    return v & 0xFFFFFF


@triton.jit
def _multiply_add(a, b, low, high):
    x = a.to(tl.uint64) * b.to(tl.uint64) + (high.to(tl.uint64) << 32) + low.to(tl.uint64)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def _less_if_zero(n, v):
    return n - (v == 0).to(tl.int32)


@triton.jit
def _reserve(BLOCK: tl.constexpr, BYTES: tl.constexpr):
    return tl.full((BLOCK,), _address, tl.uint64)


@triton.jit
def _copy(to, source, flags):
    here, there = to.to(tl.pointer_type(tl.uint64)), source.to(tl.pointer_type(tl.uint64))
    tl.store(here, tl.load(there, mask=flags, other=0), mask=flags)
    tl.store(here + 1, tl.load(there + 1, mask=flags, other=0), mask=flags)


@triton.jit
def _next4(address):
    p = address.to(tl.pointer_type(tl.uint32))
    return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), address + 16


@triton.jit
def _arrived(threads):
    pass


if INTERPRETED:
    popcount, ballot, low24, multiply_add, less_if_zero = _popcount, _ballot, _low24, _multiply_add, _less_if_zero
    reserve, copy, arrived, shared_byte, shared_pair = _reserve, _copy, _arrived, global_byte, global_pair
    next4 = _next4
