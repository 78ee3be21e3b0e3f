"""Bad archives of objects, `uses`, lowrank/1 and basis/1."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from golden.cases import CHECKSUM, FORMAT, LIMIT, UNSUPPORTED, Patch, case, directory, flip, head, record, row, unit
from golden.good import archive, attachment, dense, tensor
from golden.good_products import INTEGERS, products_base, small, trellis
from golden.model import DROP, OBJECT, Archive, Record
from golden.products import Matrix, lowrank, plain, product, quantised, word
from golden.trellis import Trellis, integers, lossy, number
from rac.container import zstd

A, B, LOW, U, TURNED = "a", "b", "low", "u", "turned"
"""Records of `products_base`: 9 x 2, 2 x 14, BF16 of 9 x 14 with lowrank/1, 14 x 14, F16 of 9 x 14 with basis/1."""


def on(names: str, *patches: Patch) -> Patch:
    """Some records of `products_base`, changed."""

    def patch(_: Archive) -> Archive:
        base = products_base()
        a = archive(*[base[n] for n in names.split()])
        for p in patches:
            p(a)
        return a

    return patch


LOWRANK, BASIS = f"{A} {B} {LOW}", f"{U} {TURNED}"


def bad(name: str, clause: str, why: str, patch: Patch, error: str = FORMAT, **more: str) -> None:
    """Register one."""
    case(name, error, clause, why, patch, **more)


# Objects

for _key in ("axis", "digest", "dtype", "name", "shape", "stages", "tile", "units"):
    bad(f"object-no-{_key}", "TEN-001", f"An object without `{_key}`.", on(BASIS, head(U, **{_key: DROP})))
for _key, _value in (("aliases", []), ("extra", {}), ("needs", []), ("online", {}), ("uses", []), ("rank", 2)):
    bad(
        f"object-{_key}",
        "OBJ-001",
        f"An object has the key `{_key}`.",
        on(BASIS, head(U, **{_key: _value})),
        UNSUPPORTED,
    )


def as_tensor(*, axis: int = 1, shape: list[int] | None = None, dtype: str = "F32") -> Patch:
    """An object that would be a tensor."""

    def patch(a: Archive) -> None:
        shape_ = shape or [14, 14]
        n = 1
        for d in shape_:
            n *= d
        r = replace(tensor(U, dtype, shape_, [0] * n, axis=axis), type=OBJECT)
        a.records[0] = r

    return patch


_wrong: dict[str, Any]
for _name, _wrong in (
    ("f16", {"dtype": "F16"}),
    ("bf16", {"dtype": "BF16"}),
    ("u32", {"dtype": "U32"}),
    ("f64", {"dtype": "F64"}),
    ("scalar", {"shape": [1], "axis": 0}),
    ("flat", {"shape": [196], "axis": 1}),
    ("cube", {"shape": [1, 14, 14], "axis": 2}),
    ("no-rows", {"shape": [0, 14]}),
    ("no-cols", {"shape": [14, 0]}),
    ("axis-0", {"axis": 0}),
    ("axis-2", {"axis": 2}),
):
    about = ", ".join(f"{k} {v}" for k, v in _wrong.items())
    bad(f"object-{_name}", "OBJ-002", f"An object of {about}.", on(BASIS, as_tensor(**_wrong)))
bad(
    "object-dtype",
    "TEN-005",
    "An object of a data type that is not assigned.",
    on(BASIS, head(U, dtype="F24")),
    UNSUPPORTED,
)
bad("object-axis-3", "TEN-011", "An object with `axis` beyond the dimensions.", on(BASIS, head(U, axis=3)))
bad("object-tile", "TEN-012", "An object with a tile larger than the matrix.", on(BASIS, head(U, tile=[15, 14])))
bad("object-units", "TEN-014", "An object with a unit too many.", on(BASIS, lambda a: a[U].units.append(b"")))
bad("object-name", "TEN-004", "The name of an object is binary.", on(BASIS, head(U, name=b"u")))


def more_stages(name: str, make: Callable[[list[dict[str, Any]]], list[Any]]) -> Patch:
    """Other stages."""

    def patch(a: Archive) -> None:
        a[name].head["stages"] = make(a[name].head["stages"])

    return patch


for _name, _why, _make in (
    ("third", "An object of three stages.", lambda s: [*s, {"id": "basis/1"}]),
    ("basis", "An object of basis/1 behind a coder.", lambda s: [s[0], {"id": "basis/1"}]),
    ("unknown", "An object of an unknown stage.", lambda s: [{"id": "delta/1"}]),
):
    bad(f"object-stages-{_name}", "OBJ-003", _why, on(LOWRANK, more_stages(B, _make)), UNSUPPORTED)
bad("object-stages-none", "TEN-008", "An object without stages.", on(BASIS, head(U, stages=[])))
bad(
    "object-twice",
    "OBJ-004",
    "Two objects of one name.",
    on(LOWRANK, lambda a: a.records.insert(1, plain(A, 3, 3, [0] * 9).record)),
)
bad("object-again", "OBJ-004", "An object twice.", on(LOWRANK, lambda a: a.records.append(a.records[0])))
bad("object-check", "UNI-003", "A unit of an object has another checksum.", on(BASIS, directory(U, flip(8))), CHECKSUM)
bad("object-head", "REC-007", "The head of an object has another checksum.", on(BASIS, record(U, check=1)), CHECKSUM)
bad(
    "object-padding",
    "RAR-002",
    "The padding behind an object is not zero.",
    on(BASIS, record(U, pad=bytes(31) + b"\1")),
)
bad("object-unit", "RAW-002", "A tile of an object lacks a word.", on(BASIS, unit(U, 1, lambda u: u[:-4])))


def large(a: Archive) -> None:
    """An object of 1 GiB and 64 KiB, which its units would be enough for."""
    rows, cols = 16385, 16384
    stated = {"name": "l", "dtype": "F32", "shape": [rows, cols], "axis": 1, "tile": [256, cols], "digest": bytes(16)}
    units = [bytes(256) for _ in range(65)]
    a.records.insert(0, Record(OBJECT, stated | {"stages": [{"id": "zstd/1"}]}, units))


def two(a: Archive) -> None:
    """The object itself is within the limit, together with the first it is not."""
    large(a)
    a.records[0].head |= {"shape": [16384, 16384]}
    a.records[0].units.pop()
    a.records.insert(0, plain("first", 1, 1, [0]).record)


bad("objects-limit", "OBJ-005", "An object of 1 GiB and 64 KiB.", on(BASIS, large), LIMIT)
bad("objects-limit-two", "OBJ-005", "Objects of 4 bytes and of 1 GiB.", on(BASIS, two), LIMIT)


def expanding(_: Archive) -> Archive:
    """An object whose units have no bytes, and a tensor that it fits."""
    n = 4097  # 4 n^2 is 32 KiB above `free_alloc`
    stated = {"name": "l", "dtype": "F32", "shape": [n, n], "axis": 1, "tile": [1024, n], "digest": bytes(16)}
    user = lossy("t", [1, n], [128] * n, Trellis("F32"))
    user.head |= {"stages": [*user.head["stages"], {"id": "basis/1"}], "uses": ["l"], "digest": bytes(16)}
    return archive(Record(OBJECT, stated | {"stages": [{"id": "zstd/1"}]}, [b""] * 5), user)


bad(
    "object-expansion",
    "TEN-015",
    "An object of 64 MiB and 32 KiB from units of size 0, which a tensor uses.",
    expanding,
    LIMIT,
)

# `uses`

for _n, _uses in enumerate(([], [A], [A, B, A])):
    bad(
        f"uses-lowrank-{len(_uses)}",
        "TEN-017",
        f"lowrank/1 with {len(_uses)} objects.",
        on(LOWRANK, head(LOW, uses=_uses)),
    )
for _uses in ([], [U, U]):
    bad(
        f"uses-basis-{len(_uses)}",
        "TEN-017",
        f"basis/1 with {len(_uses)} objects.",
        on(BASIS, head(TURNED, uses=_uses)),
    )
bad("uses-absent", "TEN-017", "lowrank/1 without `uses`.", on(LOWRANK, head(LOW, uses=DROP)))
bad("uses-trellis", "TEN-017", "trellis/1 alone, and `uses`.", on(LOWRANK, more_stages(LOW, lambda s: s[:2])))
bad("uses-null", "TEN-004", "`uses` holds null.", on(BASIS, head(TURNED, uses=[None])))
bad("uses-missing", "TEN-018", "An object that is not there.", on(LOWRANK, head(LOW, uses=[A, "c"])))
bad("uses-empty", "TEN-018", "The empty name, which no object has.", on(BASIS, head(TURNED, uses=[""])))
bad("uses-alone", "TEN-018", "No object at all.", on(TURNED))
bad("uses-own", "TEN-018", "The name of the tensor itself.", on(BASIS, head(TURNED, uses=[TURNED])))
bad("uses-later", "TEN-018", "The object stands behind the tensor.", on(f"{TURNED} {U}"))
bad("uses-between", "TEN-018", "One object in front of the tensor, one behind.", on(f"{A} {LOW} {B}"))


def tensor_in_place(a: Archive) -> None:
    """A tensor of the shape and name of the object."""
    a.records[0] = tensor(U, "F32", [14, 14], small(473, 196))


bad("uses-tensor", "TEN-018", "The name of a tensor.", on(BASIS, tensor_in_place))
bad(
    "uses-attachment",
    "TEN-018",
    "The name of an attachment.",
    on(TURNED, lambda a: a.records.insert(0, attachment(U, bytes(784)))),
)

# Chains of stages

for _name, _why, _make in (
    ("unknown", "A third stage that is not assigned.", lambda s: [*s[:2], {"id": "rotation/1"}]),
    ("version", "A version of lowrank that is not assigned.", lambda s: [*s[:2], {"id": "lowrank/2"}]),
    ("no-id", "The third stage has no `id`.", lambda s: [*s[:2], {}]),
    ("id-int", "The `id` of the third stage is a number.", lambda s: [*s[:2], {"id": 1}]),
    ("id-array", "The `id` of the third stage is an array.", lambda s: [*s[:2], {"id": ["lowrank/1"]}]),
    ("trellis", "trellis/1 as the third stage.", lambda s: [*s[:2], s[1]]),
    ("raw", "raw/1 as the third stage.", lambda s: [*s[:2], {"id": "raw/1"}]),
    ("second", "lowrank/1 behind a coder.", lambda s: [s[0], s[2]]),
    ("first", "lowrank/1 alone.", lambda s: [s[2]]),
    ("order", "lowrank/1 in front of trellis/1.", lambda s: [s[0], s[2], s[1]]),
    ("twice", "lowrank/1 twice.", lambda s: [*s, s[2]]),
    ("both", "basis/1 behind lowrank/1.", lambda s: [*s, {"id": "basis/1"}]),
):
    bad(f"products-stages-{_name}", "TEN-009", _why, on(LOWRANK, more_stages(LOW, _make)), UNSUPPORTED)
for _tensor, _names, _clause in ((LOW, LOWRANK, "LOW-001"), (TURNED, BASIS, "BAS-001")):
    for _name, _key in (("key", "rank"), ("key-x", "x-a")):
        _patch = on(_names, more_stages(_tensor, lambda s, k=_key: [*s[:2], s[2] | {k: 1}]))  # type: ignore[misc]
        bad(f"{_tensor}-{_name}", _clause, f"The third stage has the key `{_key}`.", _patch, UNSUPPORTED)
bad(
    "attachment-lowrank",
    "ATT-004",
    "An attachment of three stages.",
    lambda _: archive(attachment("a", b"abc", more={"stages": products_base()[LOW].head["stages"]})),
    UNSUPPORTED,
)

# Shapes of objects


def other(**values: Matrix) -> Patch:
    """Other objects of the same names."""

    def patch(a: Archive) -> None:
        for i, r in enumerate(a.records):
            if r.type == OBJECT and r.head["name"] in values:
                a.records[i] = values[r.head["name"]].record

    return patch


def zeros(name: str, rows: int, cols: int) -> Matrix:
    """An object of zeros."""
    return plain(name, rows, cols, [0] * (rows * cols))


for _name, _why, _objects in (
    ("rows", "A has a row too many.", {A: zeros(A, 10, 2)}),
    ("columns", "B lacks a column.", {B: zeros(B, 2, 13)}),
    ("inner", "A has three columns, B two rows.", {A: zeros(A, 9, 3)}),
    ("inner-b", "A has two columns, B one row.", {B: zeros(B, 1, 14)}),
    ("turned", "A and B are transposed.", {A: zeros(A, 2, 9), B: zeros(B, 14, 2)}),
    ("square", "A and B are 9 x 9 and 14 x 14.", {A: zeros(A, 9, 9), B: zeros(B, 14, 14)}),
):
    bad(f"lowrank-{_name}", "LOW-002", _why, on(LOWRANK, other(**_objects)))
bad("lowrank-swapped", "LOW-002", "A and B in the other order.", on(LOWRANK, head(LOW, uses=[B, A])))
for _rank in (10, 14, 15):
    _objects = {A: zeros(A, 9, _rank), B: zeros(B, _rank, 14)}
    bad(f"lowrank-rank-{_rank}", "LOW-003", f"A matrix of 9 x 14 and rank {_rank}.", on(LOWRANK, other(**_objects)))
for _name, _why, _rows, _cols in (
    ("columns", "U lacks a column.", 14, 13),
    ("rows", "U lacks a row.", 13, 14),
    ("less", "U is 13 x 13.", 13, 13),
    ("left", "U would fit the rows: 9 x 9.", 9, 9),
    ("tall", "U is 196 x 1.", 196, 1),
):
    bad(f"basis-{_name}", "BAS-002", _why, on(BASIS, other(u=zeros(U, _rows, _cols))))

# trellis/1 in front


def outliers(name: str, change: Callable[[bytes], bytes]) -> Patch:
    """Change the last section of the trellis unit."""

    def patch(a: Archive) -> None:
        r = a[name]
        k = 1 if name == LOW else 0
        sizes = r.head["stages"][1]["sizes"]
        start = sum(sizes[:3])
        new = change(r.units[k][start:])
        r.units[k] = r.units[k][:start] + new
        first, second, third = r.head["stages"]
        r.head["stages"] = [first, second | {"sizes": [*sizes[:3], len(new)]}, third]

    return patch


def narrow(s: bytes) -> bytes:
    """Elements of two bytes."""
    return b"".join(s[i : i + 10] for i in range(0, len(s), 12))


bad(
    "lowrank-outlier-word",
    "TCQ-009",
    "BF16, and outliers with elements of two bytes.",
    on(LOWRANK, outliers(LOW, narrow)),
)
bad(
    "basis-outlier-word",
    "TCQ-009",
    "F16, and an outlier with an element of two bytes.",
    on(BASIS, outliers(TURNED, narrow)),
)
for _dtype in ("F64", "U8"):
    bad(f"basis-{_dtype}", "TCQ-005", f"basis/1 of {_dtype}.", on(BASIS, head(TURNED, dtype=_dtype)))

# Index

for _name, _wrong in (
    ("no-dtype", {"dtype": DROP}),
    ("no-shape", {"shape": DROP}),
    ("no-parts", {"parts": DROP}),
    ("no-name", {"name": DROP}),
    ("no-method", {"method": DROP}),
    ("aliases", {"aliases": []}),
    ("uses", {"uses": []}),
    ("name-bin", {"name": b"u"}),
    ("dtype-int", {"dtype": 32}),
    ("shape-text", {"shape": "14"}),
    ("parts-5", {"parts": [0, 0, 0, 0, 784]}),
):
    about = f"In the row of an object `{next(iter(_wrong))}` is missing, superfluous or of another type."
    bad(f"row-object-{_name}", "IDX-005", about, on(BASIS, row(U, **_wrong)))
bad("row-object-flag", "REC-009", "The row of an object has the ancillary flag.", on(BASIS, row(U, flags=1)))
bad(
    "row-object-sum",
    "IDX-007",
    "`parts` of an object do not sum to `payload`.",
    on(BASIS, row(U, parts=[0, 0, 0, 0, 784, 1])),
)
bad("row-object-rank", "IDX-008", "The row of an object with 65 dimensions.", on(BASIS, row(U, shape=[1] * 65)), LIMIT)
bad("row-object-product", "IDX-008", "The row of an object with a shape of 2^60.", on(BASIS, row(U, shape=[1 << 60])))
for _name, _shape in (("scalar", []), ("flat", [196]), ("cube", [1, 14, 14]), ("no-rows", [0, 14])):
    bad(f"row-object-{_name}", "IDX-008", f"The row of an object of shape {_shape}.", on(BASIS, row(U, shape=_shape)))
bad(
    "row-object-limit",
    "IDX-008",
    "The row of an object of 2^40 words.",
    on(BASIS, row(U, shape=[1 << 20, 1 << 20])),
    LIMIT,
)
bad(
    "row-object-name",
    "IDX-010",
    "The rows of two objects have one name, their records do not.",
    on(LOWRANK, row(B, name=A)),
)
for _name, _wrong in (
    ("name", {"name": "v"}),
    ("dtype", {"dtype": "BF16"}),
    ("shape", {"shape": [196, 1]}),
    ("method", {"method": "zstd/1"}),
    ("check", {"check": bytes(8)}),
):
    bad(
        f"differs-object-{_name}", "IDX-011", f"The row of an object differs in `{_name}`.", on(BASIS, row(U, **_wrong))
    )
bad(
    "differs-object-type",
    "IDX-011",
    "The row says that an object is a tensor.",
    on(BASIS, row(U, type=1, aliases=[])),
)
bad(
    "differs-products-method",
    "IDX-011",
    "The row states trellis/1 as the method.",
    on(BASIS, row(TURNED, method="trellis/1")),
)
bad(
    "parts-object",
    "IDX-012",
    "`parts` of an object are not its own.",
    on(BASIS, row(U, parts=[784, 0, 0, 0, 0, 16])),
    seen="verify",
)

# Digests


def fused(a: Archive) -> Archive:
    """The digest of what fused multiplication and addition would give."""
    m, n = plain("m", 1, 1, [0x3F800003]), plain("n", 1, 1, [0x3F800003])
    r = product("f", [1, 1], "F32", [9], INTEGERS, [m, n])  # (1 + 3 2^-23)^2 - 1
    fused_word = word(6 * 2.0**-23 + 9 * 2.0**-46, "F32")
    if r.head["digest"] == zstd.digest(dense("F32", [fused_word])):
        raise ValueError("both ways are one")
    r.head["digest"] = zstd.digest(dense("F32", [fused_word]))
    return archive(m.record, n.record, r)


def summed(a: Archive) -> Archive:
    """The digest of what adding the products up first would give."""
    m, n = plain("m", 2, 2, [0x33800000] * 4), plain("n", 2, 2, [0x3F800000] * 4)
    r = product("s", [2, 2], "F32", [11] * 4, INTEGERS, [m, n])
    own = [[1.0 + 2.0**-23] * 2] * 2
    if own == lowrank([[1.0] * 2] * 2, m.numbers(), n.numbers()):
        raise ValueError("both ways are one")
    r.head["digest"] = zstd.digest(dense("F32", [word(v, "F32") for line in own for v in line]))
    return archive(m.record, n.record, r)


def payload(a: Archive) -> Archive:
    """The digest of a NaN that kept its payload."""
    u = plain("u", 1, 1, [0x3F800000])
    t = trellis(490, 1, 1, outliers={(0, 0): 0x7FC12345})
    r = product("n", [1, 1], "F32", [128], t, [u])
    r.head["digest"] = zstd.digest(dense("F32", [0x7FC12345]))
    return archive(u.record, r)


def flushed(a: Archive) -> Archive:
    """The digest of a subnormal number that became 0."""
    u = plain("u", 1, 1, [number_word(2.0**-140)])
    r = product("z", [1, 1], "F32", [11], INTEGERS, [u])
    r.head["digest"] = zstd.digest(bytes(4))
    return archive(u.record, r)


def number_word(v: float) -> int:
    """F32."""
    out = word(v, "F32")
    if number(out) != v:
        raise ValueError(v)
    return out


def unused(a: Archive) -> Archive:
    """The digest of an object that nobody uses is another."""
    o = quantised("o", 3, 3, integers(491, 9), trellis(492, 3, 3)).record
    o.head["digest"] = bytes(16)
    return archive(o, tensor("t", "U8", [1], [1]))


for _name, _why, _patch in (
    ("object", "The digest of an object is that of another.", on(BASIS, head(U, digest=bytes(16)))),
    ("object-unused", "The same of an object that no tensor uses.", unused),
    ("object-word", "A word of an object differs from what was packed.", on(BASIS, unit(U, 0, flip(0)))),
    ("fused", "The digest of fused multiplication and addition.", fused),
    ("summed", "The digest of a sum of the products alone.", summed),
    ("nan", "The digest of a NaN with its payload.", payload),
    ("flushed", "The digest of 0 in the place of a subnormal number.", flushed),
):
    bad(f"digest-{_name}", "DIG-002", _why, _patch, CHECKSUM, seen="verify")
