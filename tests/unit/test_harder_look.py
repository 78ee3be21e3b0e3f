"""`tools/harder_look.py`: what its tables are made of."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import harder_look


def test_positions_are_told_apart():
    found = {"kl": np.array([1.0, 3.0, 5.0]), "same": np.array([True, False, True])}
    each = harder_look.parts(np.array([0, 9, 10]), (0, 10, 100), found)
    assert each == [(2, 2.0, 0.5), (1, 5.0, 1.0), (0, 0.0, 0.0)]
    assert harder_look.names_of((0, 1, 10)) == ["0", "1 to 9", "10 and more"]
    table = harder_look.rows("kind", ["a", "b", "c"], {"m": each})
    assert table.splitlines()[2:] == ["| a | 2 | 2.0000 | 50.0% |", "| b | 1 | 5.0000 | 100.0% |"]


def test_runs_that_repeat_themselves():
    new = np.arange(100)
    again = np.tile(np.arange(5), 20)
    assert harder_look.repeated(new[None]) == [0.0] * 10
    first, *others = harder_look.repeated(np.stack([new, again]))
    assert first == pytest.approx(0.25)
    assert others[:8] == [0.5] * 8


def test_runs_beside_those_of_the_original():
    own, other = np.array([[1, 2, 3, 4], [1, 1, 1, 1]]), np.array([[1, 2, 9, 4], [1, 1, 1, 1]])
    assert harder_look.apart(own, other) == [2, 4]
    assert harder_look.distinct(own, 1) == pytest.approx((1 + 0.25) / 2)
    assert harder_look.distinct(own, 2) == pytest.approx((1 + 1 / 3) / 2)


def test_what_is_kept_is_not_made_again(tmp_path):
    asked = []

    def find(names):
        asked.append(list(names))
        return {name: {"x": np.arange(3)} for name in names}

    harder_look.kept(tmp_path, "t", ["a"], find)
    found = harder_look.kept(tmp_path, "t", ["a", "b"], find)
    harder_look.kept(tmp_path, "t", ["a", "b"], find)
    assert asked == [["a"], ["b"]]
    assert {name: f["x"].tolist() for name, f in found.items()} == {"a": [0, 1, 2], "b": [0, 1, 2]}
