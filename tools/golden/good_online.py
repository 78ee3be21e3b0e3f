"""The good archives of online transforms."""

from typing import Any

from golden.good import archive, fit, good, tensor
from golden.good_products import small, trellis
from golden.lanes import Lanes
from golden.model import Archive
from golden.numbers import weights
from golden.products import plain, product
from golden.trellis import integers, lossy

DTYPES = ("F64", "F32", "F16", "BF16")


def hadamard(size: int, seed: int | None = None, inner: int = 1, **more: Any) -> dict[str, Any]:
    """Further keys of a tensor head."""
    return {"online": {"id": "hadamard/1", "inner": inner, "seed": seed, "size": size} | more}


def matrix(name: str, inner: int = 1) -> dict[str, Any]:
    """Further keys of a tensor head."""
    return {"online": {"id": "matrix/1", "inner": inner, "object": name}}


@good("example-online", "The tensor of stages/online.md section 7.")
def _() -> Archive:
    words = [0x3F800000, 0x40000000, 0x40400000, 0x40800000, 0, 0x40800000, 0, 0]
    return archive(tensor("t", "F32", [2, 4], words, more=hadamard(4, 1)))


@good(
    "online-orders",
    "Orders of every construction, and without one; the largest base; 4096 columns; an order of 1.",
    "ONL-009",
)
def _() -> Archive:
    sizes = (1, 2, 3, 8, 12, 14, 20, 24, 28, 36, 40, 43, 60, 64, 86, 100, 148, 172, 344, 420, 504, 576, 4096)
    return archive(
        *(
            tensor(f"{h}", "F32", [1 + h % 2, h], weights(700 + h, "F32", (1 + h % 2) * h), more=hadamard(h, h))
            for h in sizes
        )
    )


@good("online-blocks", "Blocks, steps, seeds from none to the largest; every data type; axis 0 and 2; aliases.")
def _() -> Archive:
    records = []
    for i, (n, h, inner) in enumerate(((24, 12, 1), (24, 4, 3), (24, 2, 12), (48, 2, 4), (130, 1, 1), (130, 2, 65))):
        for j, dtype in enumerate(DTYPES):
            seed = (None, 0, 1, 1 << 62, 12345, (1 << 62) - 1)[(i + j) % 6]
            words = weights(720 + 4 * i + j, dtype, 3 * n)
            axis = (1, 0, 2, 1)[j]
            more = hadamard(h, seed, inner) | {"aliases": [[f"{i}/{dtype}/tied", True]]}
            records.append(tensor(f"{i}/{dtype}", dtype, [3, n], words, axis=axis, more=more))
    return archive(*records)


@good("online-stages", "Behind every stage; an object that a stage uses as well; a matrix that is not orthogonal.")
def _() -> Archive:
    u, m = plain("u", 12, 12, small(760, 144)), plain("m", 3, 3, small(761, 9))
    one = plain("one", 1, 1, [0x40000000])
    a, b = plain("a", 9, 2, small(762, 18)), plain("b", 2, 12, small(763, 24))
    words, bf16 = integers(764, 108), weights(765, "BF16", 108)
    t, shape = trellis(766, 9, 12), [9, 12]
    coded = fit(Lanes(16, 3, 1, sign=1, shift=7), bf16, 30)
    records = [
        tensor("raw", "BF16", shape, bf16, more=matrix("m")),
        tensor("zstd", "BF16", shape, bf16, "zstd/1", more=matrix("m", 4)),
        tensor("lanes", "BF16", shape, bf16, coded, axis=1, more=matrix("u")),
        tensor("scaled", "BF16", shape, bf16, more=matrix("one", 12)),
        lossy("trellis", shape, words, t, more=hadamard(12, 7)),
        product("lowrank", shape, "F16", words, t, [a, b], more=hadamard(4, 8, 3)),
        product("basis", shape, "BF16", words, t, [u], more=matrix("u")),
    ]
    return archive(*(x.record for x in (u, m, one, a, b)), *records)


def online_base() -> Archive:
    """What the bad archives are made of."""
    m = plain("m", 4, 4, small(770, 16))
    words = weights(771, "F32", 24)
    return archive(
        m.record,
        tensor("h", "F32", [2, 12], words, more=hadamard(12, 1)),
        tensor("o", "F32", [2, 12], words, more=matrix("m", 3)),
    )


good("online-base", "What the bad archives of online transforms are made of.")(online_base)
