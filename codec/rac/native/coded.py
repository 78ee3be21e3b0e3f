"""Products of float32 inputs with weights of int8 codes or of BF16 words, in C or numpy, and the threads for them.

A weight of codes is bf16(code * column * row), or for float32 weights without the rounding, and 0 where a number lies
beside the codes; a sum has 16 parts, part i the terms k = i, i + 16, ... one after the other. The parts are added in
pairs, i and i + 8, then i + 4, i + 2, i + 1, and then come the numbers beside the codes, in the order of their rows.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from enum import IntEnum
from typing import Any

import numpy as np

from rac.native import library as kernels
from rac.native.prototypes import F32, Array, Coded, address
from rac.native.prototypes import Team as Shared

_PARTS = 16
SMALLEST, GREATEST = 2.0**-100, 2.0**100
"""Between these a number is rounded to BF16 by what the kernel does."""
TURNS = 1 << 15
"""Looks for a product, some 50 us to a millisecond, before a thread goes to sleep."""


class Kind(IntEnum):
    """What a weight is made of, as in src/coded.h."""

    EXACT = 0
    """int8 codes of float32 weights"""
    ROUNDED = 1
    """int8 codes of BF16 weights, which lie between `SMALLEST` and `GREATEST` where they are not 0"""
    WORDS = 2
    """BF16 words"""


class Weight:
    """A weight (out, in), whose arrays stay as they are while this is used. All are C-contiguous.

    `codes` are int8, or uint16 words, which have no scales; `rows` (out,) and `columns` (in,) float32; `places` (N, 2)
    int64, rows ascending, and `values` (N,) float32 are the numbers beside the codes.
    """

    def __init__(
        self,
        kind: Kind,
        codes: Array,
        rows: Array | None = None,
        columns: Array | None = None,
        places: Array | None = None,
        values: Array | None = None,
    ) -> None:
        self.kind, self.shape, self.codes, self.rows, self.columns = kind, codes.shape, codes, rows, columns
        self.places = np.empty((0, 2), np.int64) if places is None else places
        self.values = np.empty(0, np.float32) if values is None else values
        arrays = [codes, rows, columns, self.places, self.values]
        self.structure = Coded(*map(address, arrays), *codes.shape, len(self.values), kind)
        self.at = ctypes.addressof(self.structure)

    def __reduce__(self) -> tuple[Any, ...]:
        return Weight, (self.kind, self.codes, self.rows, self.columns, self.places, self.values)

    def dense(self) -> F32:
        """(out, in) float32, without the numbers beside the codes."""
        if self.kind == Kind.WORDS:
            return (self.codes.astype(np.uint32) << 16).view(np.float32)
        rows: Any
        columns: Any
        rows, columns = self.rows, self.columns
        with np.errstate(all="ignore"):  # an infinity or a NaN is a result like any other
            w: F32 = self.codes.astype(np.float32) * columns * rows[:, None]
        if self.kind == Kind.ROUNDED:
            bits = w.view(np.uint32)
            w = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        return w


def multiply(w: Weight, x: F32, y: F32, team: Team | None = None) -> None:
    """The product y (n, out) = x (n, in) W', both C-contiguous."""
    multiply_at(w, address(x), len(x), address(y), team)


def multiply_at(w: Weight, x: int, n: int, y: int, team: Team | None = None) -> None:
    """As `multiply`, of arrays at these addresses."""
    lib = kernels.library()
    if lib is None:
        with np.errstate(all="ignore"):
            _twin_at(w, x, n, y)
    elif team is None:
        lib.rac_multiply(w.at, x, n, y, None)
    else:
        if team.asleep:
            team.wake()
        lib.rac_multiply(w.at, x, n, y, team.at)


def _twin_at(w: Weight, x: int, n: int, y: int) -> None:
    """`multiply_at` in numpy."""

    def array(at: int, width: int) -> F32:
        return np.ctypeslib.as_array((ctypes.c_float * (n * width)).from_address(at)).reshape(n, width)

    array(y, w.shape[0])[:] = _twin(w, array(x, w.shape[1]))


def _twin(w: Weight, x: F32) -> F32:
    """`multiply` in numpy."""
    (out, width), n = w.shape, len(x)
    steps = -(-width // _PARTS)
    wide, given = np.zeros((out, steps * _PARTS), np.float32), np.zeros((n, steps * _PARTS), np.float32)
    wide[:, :width], given[:, :width] = w.dense(), x
    sums = np.zeros((n, out, _PARTS), np.float32)
    for k in range(0, steps * _PARTS, _PARTS):
        sums += given[:, None, k : k + _PARTS] * wide[:, k : k + _PARTS]
    for half in (8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half : 2 * half]
    y: F32 = sums[..., 0]
    for (row, column), value in zip(w.places, w.values, strict=True):
        y[:, row] += x[:, column] * value
    return y


class Team:
    """Threads that make parts of the products of other threads, one product at a time; others are made alone.

    `parallel` is the address of a function like GOMP_parallel, whose threads they are: those of a program that has such
    threads anyway, for two sets of them that wait for work side by side take the processor from each other. Else, and
    in a forked process, they are of this object: they look for products for a while after each, outside of the
    interpreter, and then sleep; and they end with it.
    """

    def __init__(self, helpers: int, parallel: int = 0) -> None:
        self._memory = np.empty(ctypes.sizeof(Shared) + 64, np.uint8)
        self.at = -(-address(self._memory) // 64) * 64
        self.helpers = helpers
        self._begin(parallel)
        _alive.add(self)

    def _begin(self, parallel: int = 0) -> None:
        """Without threads, until they are wanted."""
        self._memory[:] = 0
        shared = Shared.from_address(self.at)
        shared.threads, shared.parallel = 1 + self.helpers, parallel
        self.asleep, self._wake, self._started = 0 if parallel else self.helpers, threading.Semaphore(0), False
        self._lock = threading.Lock()

    def wake(self) -> None:
        """Have threads that are `asleep` look for products."""
        with self._lock:
            if not self._started:
                self._started = True
                for _ in range(self.helpers):
                    threading.Thread(target=_help, args=(weakref.ref(self), self._wake), daemon=True).start()
                weakref.finalize(self, self._wake.release, self.helpers).atexit = False
            self._wake.release(self.asleep or 1)
            self.asleep = 0

    def _slept(self) -> None:
        with self._lock:
            self.asleep += 1


def _help(of: weakref.ref[Team], wake: threading.Semaphore) -> None:
    """What a thread of a team does, as long as that is there."""
    while wake.acquire() and (team := of()) is not None:
        lib = kernels.library()
        if lib is not None:
            lib.rac_help(team.at, TURNS)
        team._slept()
        del team


_alive: weakref.WeakSet[Team] = weakref.WeakSet()


def _forked() -> None:
    """The threads have stayed with the parent."""
    for team in list(_alive):
        team._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
