"""Randomised Hadamard transforms (format_spec/stages/online.md): a sign for each element, then an orthonormal matrix.

The matrix of order m is the Kronecker product of Sylvester's of the largest fitting power of two and a small one: by
Paley from quadratic residues, by Williamson of order 172, or, where neither exists, the DCT-II of the odd part, which
is orthonormal but has entries of several magnitudes. Weights are rotated by such matrices in QuaRot (arXiv 2404.00456).

All functions take numpy arrays and torch tensors; torch is met through its tensors, never imported.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BASE = 512  # largest order of a Paley matrix that is used: it costs so many multiplications for each element
MOST_DCT = 4096  # largest odd part whose DCT is: any weight may state any order, and its matrix takes memory
RADIX = 64  # Sylvester factors are multiplied in pieces of this order: one product, not six passes over memory
_WILLIAMSON = ("pppmmppmpmppmpmmmpmpp", "pmpmppppmmmmpmmmmpmmp", "pmmmpppppppmpmmppmmpm", "mmpppmmppmpmpmpmmpppp")
"""Order 43: elements 1 to 21 of the first rows of A, B, C, D; element 0 is 1, element 43 - i is element i."""


@dataclass(frozen=True, slots=True)
class Order:
    """How the matrix of order `size` = 2**power * base is made."""

    size: int
    power: int
    base: int
    kind: str  # how the base is made: "sylvester" (base 1), "paley1", "paley2", "williamson", or "dct"

    @property
    def hadamard(self) -> bool:
        """Whether all entries have the same magnitude."""
        return self.kind != "dct"

    def describe(self) -> str:
        """For people."""
        paley = {"paley1": f"Paley I of {self.base - 1}", "paley2": f"Paley II of {self.base // 2 - 1}"}
        names = {**paley, "williamson": "Williamson of 43", "dct": "DCT-II"}
        parts = [f"Sylvester {1 << self.power}"] if self.power or self.base == 1 else []
        parts += [f"{names[self.kind]} (order {self.base})"] if self.base > 1 else []
        known = f"Hadamard of order {self.size}"
        other = f"order {self.size}, no Hadamard matrix known here; orthonormal instead"
        return f"{known if self.hadamard else other}: {' x '.join(parts)}"


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def order(m: int) -> Order:
    """The construction for order `m`; ValueError below 1, and where none is defined."""
    if m < 1:
        raise ValueError(f"a matrix of order {m}")
    power = (m & -m).bit_length() - 1
    odd = m >> power
    if odd == 1:
        return Order(m, power, 1, "sylvester")
    for two in range(2, power + 1):
        base = odd << two
        if base > MOST_BASE:
            break
        if base == 172:
            return Order(m, power - two, base, "williamson")
        if _prime(base - 1):
            return Order(m, power - two, base, "paley1")
        if base % 8 == 4 and _prime(base // 2 - 1):
            return Order(m, power - two, base, "paley2")
    if odd > MOST_DCT:
        raise ValueError(f"no matrix of order {m}: its odd part {odd} is above {MOST_DCT}")
    return Order(m, power, odd, "dct")


def signs(seed: int | None, n: int) -> NDArray[np.int8]:
    """(n,) of 1 and -1: bit i mod 64 of output i // 64 of SplitMix64 from `seed`, 0 being 1; None: all 1."""
    if seed is None:
        return np.ones(n, np.int8)
    if not 0 <= seed <= 1 << 62:
        raise ValueError(f"seed {seed} is not within 0 and 2**62")
    z = np.arange(1, -(-n // 64) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    bits = np.unpackbits(z.astype("<u8").view(np.uint8), bitorder="little")[:n]
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


def _residues(q: int) -> NDArray[np.int8]:
    """(q, q): the quadratic character of i - j modulo the prime q."""
    chi = np.full(q, -1, np.int8)
    chi[[k * k % q for k in range(q)]] = 1
    chi[0] = 0
    i = np.arange(q)
    return np.asarray(chi[(i[:, None] - i) % q])


def _base(o: Order) -> NDArray[Any]:
    """The small factor: int8 of 1 and -1; of "dct" float64, orthonormal."""
    b = o.base
    if o.kind == "paley1":
        h = np.ones((b, b), np.int8)
        h[1:, 0] = -1
        h[1:, 1:] = _residues(b - 1) + np.eye(b - 1, dtype=np.int8)
        return h
    if o.kind == "paley2":
        c = np.ones((b // 2, b // 2), np.int8)
        c[1:, 1:] = _residues(b // 2 - 1)
        c[0, 0] = 0
        two = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
        return np.asarray(np.kron(c, two[0]) + np.kron(np.eye(b // 2, dtype=np.int8), two[1]))
    if o.kind == "williamson":
        i = np.arange(43)
        rows = [[1, *half, *half[::-1]] for half in ([1 if s == "p" else -1 for s in w] for w in _WILLIAMSON)]
        x, y, z, w = (np.array(row, np.int8)[(i[:, None] - i) % 43] for row in rows)
        return np.block([[x, y, z, w], [-y, x, -w, z], [-z, w, x, -y], [-w, -z, y, x]])
    if o.kind == "dct":
        k, j = np.arange(b)[:, None], np.arange(b)
        out = math.sqrt(2 / b) * np.cos(np.pi / (2 * b) * ((2 * j + 1) * k % (4 * b)))
        out[0] = math.sqrt(1 / b)
        return np.asarray(out)
    return np.ones((1, 1), np.int8)


def matrix(m: int) -> NDArray[np.float64]:
    """(m, m) the orthonormal matrix of order `m`. For tests, and where m is small: it has m * m elements."""
    o = order(m)
    two = np.array([[1, 1], [1, -1]], np.int8)
    h = functools.reduce(np.kron, [*[two] * o.power, _base(o)]).astype(np.float64)
    return np.asarray(h / math.sqrt(m if o.hadamard else 1 << o.power))


@functools.lru_cache(64)
def factors(m: int) -> tuple[NDArray[np.float64], ...]:
    """Orthonormal matrices whose Kronecker product is `matrix(m)`, none of them large."""
    o, step = order(m), RADIX.bit_length() - 1
    out = [matrix(1 << min(left, step)) for left in range(o.power, 0, -step)]
    if o.base > 1 or not out:
        b = _base(o).astype(np.float64)
        out.append(b / math.sqrt(o.base) if o.hadamard else b)
    return tuple(out)


def like(a: NDArray[Any], x: Any) -> Any:
    """The numbers `a` as an array of the library, data type and device of `x`."""
    if isinstance(x, np.ndarray):
        return a.astype(x.dtype)
    torch: Any = sys.modules["torch"]
    with torch.inference_mode(False):  # it may be kept, and then serve where there are gradients
        return torch.from_numpy(np.array(a)).to(x.device, x.dtype)


def kronecker(y: Any, by: Sequence[Any], inner: int, transposed: bool = False) -> Any:
    """Multiply `y` (..., n) by I_a (x) F_1 (x) F_2 ... (x) I_inner, matrices of its library and type; or transposed."""
    shape = tuple(y.shape)
    after = inner
    for f in reversed(by):
        f_, n = f.T if transposed else f, len(f)
        y = y.reshape(-1, n) @ f_.T if after == 1 else f_ @ y.reshape(-1, n, after)
        after *= n
    return y.reshape(shape)


def widen(x: Any) -> Any:
    """float32 in the place of narrower floats."""
    if x.dtype.itemsize >= 4:
        return x
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()


def cast(y: Any, kind: Any) -> Any:
    """In another data type of the same library."""
    return y.astype(kind) if isinstance(y, np.ndarray) else y.to(kind)
