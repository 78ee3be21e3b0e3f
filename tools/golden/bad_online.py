"""Bad archives of online transforms."""

from typing import Any

from golden.cases import FORMAT, UNSUPPORTED, Patch, case
from golden.good import archive, tensor
from golden.good_online import online_base
from golden.model import DROP, Archive
from golden.products import plain

H, M = "h", "o"
"""Tensors of `online_base`, F32 of 2 x 12: hadamard/1 of order 12, and matrix/1 of order 4 with step 3."""


def on(names: str, name: str, **values: Any) -> Patch:
    """Some records of `online_base`, with other keys in the map of one."""

    def patch(_: Archive) -> Archive:
        base = online_base()
        a = archive(*[base[n] for n in names.split()])
        old = a[name].head["online"]
        a[name].head["online"] = {k: v for k, v in (old | values).items() if v is not DROP}
        return a

    return patch


def bad(name: str, clause: str, why: str, patch: Patch, error: str = FORMAT) -> None:
    """Register one."""
    case(f"online-{name}", error, clause, why, patch)


def whole(value: Any) -> Patch:
    """Something else in the place of the map."""
    return lambda _: archive(tensor(H, "F32", [2, 12], [0] * 24, more={"online": value}))


for _name, _wrong in (("null", None), ("array", []), ("text", "hadamard/1"), ("int", 12)):
    bad(_name, "TEN-004", "`online` is no map.", whole(_wrong))
for _name, _id in (
    ("id-none", DROP),
    ("id-int", 1),
    ("id-version", "hadamard/2"),
    ("id-other", "fourier/1"),
    ("id-x", "x-mine"),
    ("id-stage", "basis/1"),
):
    bad(_name, "ONL-001", "The `id` is missing, or not one that is assigned.", on(H, H, id=_id), UNSUPPORTED)
bad("empty", "ONL-001", "An empty map.", whole({}), UNSUPPORTED)
for _key in ("inner", "size", "seed"):
    bad(f"no-{_key}", "ONL-002", f"hadamard/1 without `{_key}`.", on(H, H, **{_key: DROP}))
for _key in ("inner", "object"):
    bad(f"matrix-no-{_key}", "ONL-002", f"matrix/1 without `{_key}`.", on(f"m {M}", M, **{_key: DROP}))
for _key in ("object", "x-a", "outer"):
    bad(f"key-{_key}", "ONL-003", f"hadamard/1 with the key `{_key}`.", on(H, H, **{_key: "m"}), UNSUPPORTED)
for _key in ("size", "seed", "x-a"):
    bad(f"matrix-key-{_key}", "ONL-003", f"matrix/1 with the key `{_key}`.", on(f"m {M}", M, **{_key: 4}), UNSUPPORTED)
for _name, _values in (
    ("inner-0", {"inner": 0}),
    ("inner-negative", {"inner": -1}),
    ("inner-bool", {"inner": True}),
    ("inner-null", {"inner": None}),
    ("size-0", {"size": 0}),
    ("size-text", {"size": "12"}),
    ("size-null", {"size": None}),
    ("size-bool", {"size": True}),
    ("seed-negative", {"seed": -1}),
    ("seed-large", {"seed": (1 << 62) + 1}),
    ("seed-bool", {"seed": False}),
    ("seed-text", {"seed": "1"}),
):
    bad(_name, "ONL-004", "A value of another type or range.", on(H, H, **_values))
bad("matrix-inner-0", "ONL-004", "`inner` is 0.", on(f"m {M}", M, inner=0))
for _name, _object in (("int", 1), ("null", None), ("bin", b"m")):
    bad(f"matrix-object-{_name}", "ONL-004", "`object` is no text.", on(f"m {M}", M, object=_object))


def other(dtype: str, shape: list[int], size: int) -> Patch:
    """Another tensor."""
    n = 1
    for d in shape:
        n *= d
    online = {"id": "hadamard/1", "inner": 1, "seed": None, "size": size}
    return lambda _: archive(tensor(H, dtype, shape, [0] * n, more={"online": online}))


for _dtype in ("U8", "I64", "F8_E4M3"):
    bad(f"dtype-{_dtype}", "ONL-005", f"A tensor of {_dtype}.", other(_dtype, [2, 4], 4))
for _name, _shape in (("scalar", []), ("flat", [4]), ("cube", [2, 2, 4]), ("no-rows", [0, 4]), ("no-columns", [4, 0])):
    bad(f"shape-{_name}", "ONL-005", f"A tensor of shape {_shape}.", other("F32", _shape, 4))
for _name, _values in (
    ("size", {"size": 5}),
    ("size-rows", {"size": 24}),
    ("inner", {"size": 4, "inner": 2}),
    ("wide", {"size": 1 << 62}),
    ("inner-wide", {"inner": 1 << 62}),
):
    bad(f"divide-{_name}", "ONL-006", f"{_values} and 12 columns.", on(H, H, **_values))
bad("matrix-divide", "ONL-006", "A matrix of order 4 with step 2 and 12 columns.", on(f"m {M}", M, inner=2))
bad("object-missing", "ONL-007", "An object that is not there.", on(f"m {M}", M, object="n"))
bad("object-none", "ONL-007", "No object at all.", on(M, M))
bad("object-later", "ONL-007", "The object stands behind the tensor.", on(f"{M} m", M))
bad("object-tensor", "ONL-007", "The name of a tensor.", on(f"m {H} {M}", M, object=H))


def scalar(_: Archive) -> Archive:
    """The record of the object is whole."""
    a = archive(online_base()["m"], online_base()[M])
    a["m"].row = {"shape": []}
    return a


def shape_of(rows: int, cols: int) -> Patch:
    """Another object."""

    def patch(_: Archive) -> Archive:
        return archive(plain("m", rows, cols, [0] * (rows * cols)).record, online_base()[M])

    return patch


bad("object-row", "IDX-008", "The row of the object has no dimensions; its record, which decoding skips, has.", scalar)
bad("object-wide", "ONL-008", "An object of 4 x 12.", shape_of(4, 12))
bad("object-tall", "ONL-008", "An object of 4 x 1.", shape_of(4, 1))
bad("order", "ONL-009", "An order of 4099, without a matrix.", other("F32", [1, 4099], 4099))
bad("order-even", "ONL-009", "An order of 2 x 4099.", other("F32", [1, 8198], 8198))
