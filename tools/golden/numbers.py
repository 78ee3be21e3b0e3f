"""A fixed integer generator and the bit patterns that floats are tested with."""

from collections.abc import Callable

from rac.registry import DTYPES

MASK = (1 << 64) - 1


class Numbers:
    """splitmix64."""

    def __init__(self, seed: int) -> None:
        self.x = seed

    def word(self) -> int:
        """64 bits."""
        self.x = (self.x + 0x9E3779B97F4A7C15) & MASK
        z = self.x
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        return z ^ z >> 31

    def below(self, n: int) -> int:
        """0 .. n - 1."""
        return self.word() % n

    def small(self) -> int:
        """0, 1, 2, ... each half as likely as the one before, at most 63."""
        z = self.word() | 1 << 63
        return (z & -z).bit_length() - 1


EXPONENT = {"F64": (52, 1023), "F32": (23, 127), "C64": (23, 127), "BF16": (7, 127), "F16": (10, 15)}
"""Mantissa bits and bias."""


def weight(g: Numbers, dtype: str) -> int:
    """A word like those of trained weights: random sign and mantissa, exponents that fall off by halves."""
    bits = 8 * DTYPES[dtype].word
    if dtype not in EXPONENT:
        return (g.word() & 3 | g.small() << 2) & ((1 << bits) - 1)
    mantissa, bias = EXPONENT[dtype]
    exponent = max(0, bias - 3 - g.small())
    return g.below(2) << (bits - 1) | exponent << mantissa | g.below(1 << mantissa)


def specials(dtype: str) -> list[int]:
    """Zeros, infinities, NaNs with payloads, denormals, the largest and smallest words of a data type."""
    bits = 8 * DTYPES[dtype].word
    top = 1 << (bits - 1)
    if dtype in EXPONENT:
        mantissa = EXPONENT[dtype][0]
        inf = (top - 1) >> mantissa << mantissa
        nan = inf | 1 << (mantissa - 1)
        plain = [0, inf, nan, inf | 1, nan | 5, 1, (1 << mantissa) - 1, inf - 1, 1 << mantissa]
        return plain + [top | v for v in plain]
    return [0, 1, 2, top - 1, top, top + 1, 2 * top - 1, (2 * top - 1) // 3]


def weights(seed: int, dtype: str, n: int, make: Callable[[Numbers, str], int] = weight) -> list[int]:
    """`n` words."""
    g = Numbers(seed)
    return [make(g, dtype) for _ in range(n)]
