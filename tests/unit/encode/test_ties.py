"""Tensors that are stored once."""

from __future__ import annotations

import numpy as np

import rac
from rac.encode import ties
from rac.encode.sources import SourceTensor, from_arrays


def groups(arrays):
    return [(g.tensor.name, g.aliases) for g in ties.find(from_arrays(arrays).tensors)]


def test_ties_and_duplicates():
    a, b = np.arange(10.0), np.arange(1.0, 11.0)
    assert groups({"a": a, "b": b, "a2": a, "b copy": b.copy(), "a3": a}) == [
        ("a", (("a2", True), ("a3", True))),
        ("b", (("b copy", False),)),
    ]


def test_what_is_not_the_same():
    a = np.arange(6, dtype=np.float32)
    arrays = {"a": a, "shape": a.reshape(2, 3), "dtype": a.view(np.int32), "part": a[:5], "e1": a[:0], "e2": a[:0]}
    assert groups(arrays) == [(name, ()) for name in arrays]
    minus = np.zeros(5000, np.float32)
    other = minus.copy()
    other[1111] = -0.0  # outside of the places that are looked at first
    assert groups({"plus": minus, "minus": other}) == [("plus", ()), ("minus", ())]


def test_extra_of_aliases():
    data = np.arange(9, dtype=np.uint8)
    tensors = [
        SourceTensor(n, "U8", (9,), data, e)
        for n, e in (("a", {"s": 1}), ("b", {"s": 2}), ("c", {"s": 1}), ("d", None))
    ]
    (group,) = ties.find(tensors)
    assert group.aliases == (("b", False), ("c", False), ("d", False))
    assert group.extra == {"s": 1, "aliases": {"b": {"s": 2}, "d": {}}}


def test_digest_in_pieces(monkeypatch):
    (t,) = from_arrays({"a": np.arange(1000)}).tensors
    whole = ties.digest(t)
    monkeypatch.setattr(ties, "PIECE", 7)
    assert ties.digest(t) == whole


def test_ties_of_a_duplicate_stay_tied(tmp_path):
    """Two equal pairs of tied tensors: each pair comes back as one memory, and the pairs apart."""
    a = np.arange(1000.0)
    b = a.copy()
    rac.save_file({"a1": a, "b1": b, "a2": a, "b2": b}, tmp_path / "m.rac")
    got = rac.load_file(tmp_path / "m.rac")
    assert all((t == a).all() for t in got.values())
    assert got["a1"] is got["a2"]
    assert got["b1"] is got["b2"]
    assert not np.shares_memory(got["a1"], got["b1"])
