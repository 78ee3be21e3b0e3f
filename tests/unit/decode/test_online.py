"""Online transforms in files: written with their objects, tied, resumed, read, unpacked, compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import rac
from rac.cli import main
from rac.encode.pack import pack_source
from rac.encode.sources import Source, from_arrays
from rac.errors import SourceError
from rac.records import Online

RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 24)).astype(np.float32)
M = RNG.standard_normal((4, 4)).astype(np.float32)


def source(*tensors, **arrays):
    """Arrays by name; (name, online, matrix) of those that have one."""
    found = from_arrays(arrays)
    of = {name: (online, matrix) for name, online, matrix in tensors}
    changed = [replace(t, online=of[t.name][0], matrix=of[t.name][1]) if t.name in of else t for t in found.tensors]
    return Source("memory", tuple(changed), (), {})


def hadamard(seed=None, size=24, inner=1):
    return Online("hadamard/1", size, inner, seed)


def matrix(name="m"):
    return Online("matrix/1", 4, 3, None, name)


def test_written_and_read(tmp_path):
    path = tmp_path / "m.rac"
    pack_source(
        source(("a", hadamard(5), None), ("b", matrix(), M), ("c", matrix(), M), a=W, b=W + 1, c=W + 2, d=W + 3), path
    )
    with rac.open(path) as f:
        assert [f.online(n) and f.online(n).online for n in "abcd"] == [hadamard(5), matrix(), matrix(), None]
        assert np.array_equal(f.online("b").matrix, M) and np.array_equal(f.get_tensor("b"), W + 1)
        assert f.get_slice("a").online == hadamard(5)
        assert sum(e.type == 3 for e in f.archives[0].index.entries) == 1
    assert rac.verify(path).tensors == 4


def test_equal_weights_are_one_only_where_the_layers_agree(tmp_path):
    path = tmp_path / "m.rac"
    maps = [("a", hadamard(5), None), ("b", hadamard(5), None), ("c", hadamard(6), None)]
    pack_source(source(*maps, a=W.copy(), b=W.copy(), c=W.copy(), d=W.copy()), path)
    with rac.open(path) as f:
        entries = f.archives[0].index.entries
        assert [(e.name, [a for a, _ in e.aliases]) for e in entries] == [("a", ["b"]), ("c", []), ("d", [])]
        assert f.online("b").online == hadamard(5) and f.online("d") is None
    with pytest.raises(SourceError, match="tied"):
        pack_source(source(("a", hadamard(5), None), a=W, b=W), tmp_path / "n.rac")


def test_without_its_matrix(tmp_path):
    for wrong in (None, M[:3, :3]):
        with pytest.raises(SourceError, match="without the matrix"):
            pack_source(source(("a", matrix(), wrong), a=W), tmp_path / "m.rac")
    assert not (tmp_path / "m.rac").exists()


def test_resumed_only_with_the_same_transform(tmp_path):
    path, part = tmp_path / "m.rac", tmp_path / "m.rac.part"
    ours = source(("a", hadamard(5), None), ("b", matrix(), M), a=W, b=W + 1)
    pack_source(ours, path)
    data = path.read_bytes()
    for other, kept in ((ours, 2), (source(("a", hadamard(6), None), ("b", matrix(), M), a=W, b=W + 1), 0)):
        part.write_bytes(data[:-400])
        done = pack_source(other, path, resume=True, force=True)
        assert done.resumed == kept, kept
        with rac.open(path) as f:
            assert f.online("a").online == other.tensors[0].online
    part.write_bytes(data[:-400])
    pack_source(ours, path, resume=True, force=True)
    assert path.read_bytes() == data


def test_unpack_says_what_is_needed(tmp_path, capsys):
    path = tmp_path / "m.rac"
    pack_source(source(("a", hadamard(5), None), ("b", matrix(), M), a=W, b=W + 1, c=W + 2), path)
    with pytest.warns(UserWarning, match="2 tensors are unpacked whose layers need an online transform, 'a'"):
        rac.unpack(path, tmp_path / "a.safetensors")
    assert main(["unpack", str(path), "-o", str(tmp_path / "b.safetensors")]) == 0
    said = capsys.readouterr()
    assert "Paley I of 11 (order 12)): a" in said.err and "matrix 'm' of order 4" in said.err and ": b" in said.err
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(tmp_path / "b.safetensors")["a"], W)


def test_info_shows_them(tmp_path, capsys):
    path = tmp_path / "m.rac"
    pack_source(source(("a", hadamard(5), None), ("b", hadamard(6), None), a=W, b=W + 1, c=W + 2), path)
    assert main(["info", str(path)]) == 0
    assert "online       2 tensors: Hadamard of order 24: Sylvester 2 x Paley I of 11" in capsys.readouterr().out
    assert main(["info", "--tensors", "--json", str(path)]) == 0
    assert capsys.readouterr().out.count('"online": "Hadamard') == 2


@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (4, 4, 4)])
def test_an_object_of_any_other_shape(shape):
    """The index says the shapes of objects, and may say anything."""
    from rac.errors import FormatError
    from rac.stages.online import parse

    stated = {"id": "matrix/1", "inner": 3, "object": "m"}
    with pytest.raises(FormatError, match="no square matrix"):
        parse(stated, "F32", (8, 24), lambda _: shape, 0)
    assert parse(stated, "F32", (8, 24), lambda _: (4, 4), 0).size == 4
