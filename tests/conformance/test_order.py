"""The order of checks of a tensor head (container.md section 9): of two faults, both programs report the first."""

import itertools
from typing import Any

import pytest

from golden.cases import FORMAT, LIMIT, RAW, UNSUPPORTED
from golden.good import archive, base
from golden.model import DROP
from support import readers

FAULTS: list[tuple[str, str, dict[str, Any]]] = [
    ("TEN-001", FORMAT, {"digest": DROP}),
    ("TEN-002", UNSUPPORTED, {"scale": 1}),
    ("TEN-003", UNSUPPORTED, {"needs": [1]}),
    ("TEN-004", FORMAT, {"extra": []}),
    ("TEN-004 aliases", FORMAT, {"aliases": [1]}),
    ("TEN-005", UNSUPPORTED, {"dtype": "F24"}),
    ("TEN-006", LIMIT, {"shape": [1] * 65}),
    ("TEN-009", UNSUPPORTED, {"stages": [{"id": "raw/2"}]}),
    ("TEN-011", FORMAT, {"axis": 70}),
    ("TEN-012", FORMAT, {"tile": [0, 2]}),
    ("RAW-001", UNSUPPORTED, {"stages": [{"id": "raw/1", "level": 1}]}),
    ("TEN-017", FORMAT, {"uses": ["a"]}),
    ("ONL-001", UNSUPPORTED, {"online": {"id": "fourier/1"}}),
    ("UNI-001", FORMAT, {"units": bytes(17)}),
]
PAIRS = [
    (first, second)
    for first, second in itertools.combinations(FAULTS, 2)
    if first[1] != second[1] and not first[2].keys() & second[2].keys()
]


@pytest.mark.parametrize("reader", ["rac_forward", "second_forward"])
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a[0]}, {b[0]}" for a, b in PAIRS])
def test_first_of_two(
    first: tuple[str, str, dict[str, Any]], second: tuple[str, str, dict[str, Any]], reader: str
) -> None:
    a = archive(base()[RAW])
    a[RAW].head |= first[2] | second[2]
    a[RAW].row = {"shape": [2, 3], "dtype": "I32", "aliases": []}
    assert readers.outcome(reader, a.build())[0] == first[1]
