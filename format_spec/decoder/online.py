"""Online transforms, stages/online.md: the map of a layer's input, as a matrix of binary64 numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, UnsupportedError
from .structure import Value, as_count, as_map, as_text

Matrix = NDArray[np.float64]
KEYS = {"hadamard/1": {"id", "inner", "size", "seed"}, "matrix/1": {"id", "inner", "object"}}
WILLIAMSON = ("+++--++-+-++-+---+-++", "+-+-++++----+----+--+", "+---+++++++-+--++--+-", "--+++--++-+-+-+--++++")


@dataclass(frozen=True)
class Online:
    """The key `online`, checked, of a tensor of n columns."""

    width: int  # n
    size: int  # h
    inner: int  # b
    seed: int | None
    object: str | None  # name of M under matrix/1


def check(value: Value, dtype: str, shape: list[int], objects: Mapping[str, NDArray[np.float32]]) -> Online:
    """Section 1; `objects` are those in front of the record."""
    table = as_map(value, "RAC-TEN-004")
    kind = table.get("id")
    if not isinstance(kind, str) or kind not in KEYS:
        raise UnsupportedError(f"RAC-ONL-001: {kind!r}")
    if KEYS[kind] - table.keys():
        raise FormatError("RAC-ONL-002: keys")
    if table.keys() != KEYS[kind]:
        raise UnsupportedError("RAC-ONL-003: keys")
    if dtype not in ("F64", "F32", "F16", "BF16") or len(shape) != 2 or 0 in shape:
        raise FormatError("RAC-ONL-005: data type or shape")
    inner, seed, name = as_count(table["inner"], "RAC-ONL-004"), None, None
    if kind == "matrix/1":
        name = as_text(table["object"], "RAC-ONL-004")
        if name not in objects:
            raise FormatError(f"RAC-ONL-007: no object {name!r} in front of the tensor")
        size, cols = objects[name].shape
        if size != cols:
            raise FormatError("RAC-ONL-008: shape of the object")
    else:
        size = as_count(table["size"], "RAC-ONL-004")
        seed = None if table["seed"] is None else as_count(table["seed"], "RAC-ONL-004")
    if not inner or not size:
        raise FormatError("RAC-ONL-004: zero")
    if shape[1] % (size * inner):
        raise FormatError("RAC-ONL-006: sizes")
    if name is None and construction(size) is None:
        raise FormatError("RAC-ONL-009: no matrix of this order")
    return Online(shape[1], size, inner, seed, name)


def signs(seed: int, n: int) -> list[int]:
    """Section 3."""
    mask, out = (1 << 64) - 1, []
    for k in range(-(-n // 64)):
        z = (seed + (k + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        out += [-1 if z >> bit & 1 else 1 for bit in range(64)]
    return out[:n]


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(sqrt(n)) + 1))


def construction(h: int) -> tuple[str, int] | None:
    """Section 4: how the base of order h is made, and its order; None where there is no matrix."""
    d = h
    while d % 2 == 0:
        d //= 2
    if d == 1:
        return "none", 1
    c = 4 * d
    while h % c == 0 and c <= 512:
        if c == 172:
            return "williamson", c
        if is_prime(c - 1):
            return "paley 1", c
        if is_prime(c // 2 - 1) and (c // 2 - 1) % 4 == 1:
            return "paley 2", c
        c *= 2
    return ("dct", d) if d <= 4096 else None


def character(v: int, q: int) -> int:
    """Euler's criterion."""
    power = pow(v % q, (q - 1) // 2, q)
    return -1 if power == q - 1 else power


def base(kind: str, c: int) -> list[list[int]]:
    """Section 4, "Base"."""
    if kind == "paley 1":
        rows = [[1] * c]
        rows += [[-1] + [1 if i == j else character(i - j, c - 1) for j in range(1, c)] for i in range(1, c)]
        return rows
    if kind == "paley 2":
        q = c // 2 - 1
        k = [[0] + [1] * q] + [[1] + [character(i - j, q) for j in range(q)] for i in range(q)]
        two = {0: ((1, -1), (-1, -1)), 1: ((1, 1), (1, -1)), -1: ((-1, -1), (-1, 1))}
        return [[two[k[i // 2][j // 2]][i % 2][j % 2] for j in range(c)] for i in range(c)]
    halves = [[1 if sign == "+" else -1 for sign in text] for text in WILLIAMSON]
    x, y, z, v = ([1, *half, *reversed(half)] for half in halves)
    places = (
        ((1, x), (1, y), (1, z), (1, v)),
        ((-1, y), (1, x), (-1, v), (1, z)),
        ((-1, z), (1, v), (1, x), (-1, y)),
        ((-1, v), (-1, z), (1, y), (1, x)),
    )
    return [[sign * row[(i - j) % 43] for sign, row in line for j in range(43)] for line in places for i in range(43)]


def sylvester(k: int) -> NDArray[np.int64]:
    return np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(k)] for i in range(k)])


def integers(h: int) -> NDArray[np.int64]:
    """S x B, where there is a base or none is needed."""
    kind, c = construction(h) or ("dct", h)
    assert kind != "dct"
    return sylvester(h) if kind == "none" else np.kron(sylvester(h // c), np.array(base(kind, c)))


def matrix(h: int) -> Matrix:
    """M of section 4."""
    kind, d = construction(h) or ("dct", h)
    if kind != "dct":
        return integers(h) / sqrt(h)
    c = [[sqrt((2 if k else 1) / d) * cos(pi * (2 * j + 1) * k / (2 * d)) for j in range(d)] for k in range(d)]
    return np.kron(sylvester(h // d) / sqrt(h // d), np.array(c))


def transform(online: Online, objects: Mapping[str, NDArray[np.float32]]) -> Matrix:
    """T of section 2, (n, n)."""
    m = matrix(online.size) if online.object is None else objects[online.object].astype(np.float64)
    blocks = online.width // (online.size * online.inner)
    t = np.kron(np.kron(np.eye(blocks), m), np.eye(online.inner))
    return t if online.seed is None else t * np.array(signs(online.seed, online.width))


def numbers(dense: bytes, dtype: str, shape: tuple[int, ...]) -> Matrix:
    """The elements of a tensor."""
    if dtype == "BF16":
        return (np.frombuffer(dense, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64).reshape(shape)
    return np.frombuffer(dense, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64).reshape(shape)
