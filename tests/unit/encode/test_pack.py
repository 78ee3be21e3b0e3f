"""What `save_file` and `pack` write, and what they refuse."""

from __future__ import annotations

import os

import numpy as np
import pytest

import rac
from rac import tensor as tn
from rac.container.access import FileAccess
from rac.container.reader import Archive

st = pytest.importorskip("safetensors.numpy")
A = np.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    "metadata", [{"k": 1}, {"k": 1.5}, {"k": b"x"}, {"k": None}, {"k": ["x"]}, {1: "x"}, {"k": "\ud800"}]
)
def test_metadata_is_text(tmp_path, metadata):
    with pytest.raises((rac.SourceError, TypeError, ValueError)):
        rac.save_file({"a": A}, tmp_path / "m.rac", metadata)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["O", "M8[s]", "c16", "U3", "V3"])
def test_dtypes_that_are_refused(tmp_path, kind):
    with pytest.raises(rac.SourceError, match="'a' cannot be packed: unsupported dtype"):
        rac.save_file({"a": np.zeros(3, kind)}, tmp_path / "m.rac")
    assert os.listdir(tmp_path) == []


def test_a_shape_that_no_reader_takes(tmp_path):
    """A writer keeps within the limits of a reader (RAC-SEC-009, RAC-TEN-007)."""
    array = np.zeros((0, 1 << 30, 1 << 30), np.uint8)
    try:
        rac.save_file({"a": array}, tmp_path / "m.rac")
    except rac.SourceError:
        return
    assert rac.load_file(tmp_path / "m.rac")["a"].shape == array.shape


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_tensors_without_weights(tmp_path, shape):
    rac.save_file({"a": np.zeros(shape, np.float32), "b": A}, tmp_path / "m.rac")
    back = rac.load_file(tmp_path / "m.rac")
    assert (back["a"].shape, back["a"].dtype) == (shape, np.float32)
    assert (back["b"] == A).all()


def test_arguments_that_are_refused(tmp_path):
    st.save_file({"a": A}, tmp_path / "m.safetensors")
    for kwargs in ({"level": "extreme"}, {"lanes": 0}, {"lanes": 1025}, {"shard_size": 0}, {"jobs": 0}):
        with pytest.raises(ValueError, match="must be"):
            rac.pack(tmp_path / "m.safetensors", tmp_path / "m.rac", **kwargs)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_save_file_replaces_only_by_a_whole_file(tmp_path):
    rac.save_file({"a": A}, tmp_path / "m.rac")
    before = (tmp_path / "m.rac").read_bytes()
    with pytest.raises(rac.SourceError):
        rac.save_file({"a": A + 1, "b": object()}, tmp_path / "m.rac")
    assert (tmp_path / "m.rac").read_bytes() == before
    rac.save_file({"a": A + 1}, tmp_path / "m.rac")
    assert (rac.load_file(tmp_path / "m.rac")["a"] == A + 1).all()


def test_lanes_are_a_parameter_of_the_file(tmp_path):
    a = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
    st.save_file({"a": a}, tmp_path / "m.safetensors")
    for lanes in (1, 7, 1024):
        rac.pack(tmp_path / "m.safetensors", tmp_path / "m.rac", lanes=lanes, force=True)
        archive = Archive(FileAccess(tmp_path / "m.rac"))
        assert tn.parse(archive.record(archive.index.entries[0]), archive.limits).chain.coder.lanes == lanes
        assert rac.load_file(tmp_path / "m.rac")["a"].tobytes() == a.tobytes()


@pytest.mark.parametrize(
    ("options", "tile"),
    [
        ({}, [50, 75]),
        ({"level": "fast"}, [400, 600]),
        ({"level": "fast", "lanes": 8}, [400, 600]),
        ({"level": "fast", "slices": "fine"}, [50, 75]),
        ({"level": "max"}, [400, 600]),
        ({"level": "max", "slices": "fine"}, [50, 75]),
        ({"slices": "coarse"}, [400, 600]),
        ({"lanes": 8}, [400, 600]),
        ({"lanes": 8, "slices": "fine"}, [50, 75]),
        ({"lanes": 8, "slices": "coarse"}, [400, 600]),
    ],
)
def test_tiles_are_fine_at_default_and_where_asked_for(tmp_path, options, tile):
    """What is asked for holds, and cuts as finely with a number of lanes as without."""
    a = np.random.default_rng(0).standard_normal((400, 600)).astype(np.float32)
    st.save_file({"a": a}, tmp_path / "m.safetensors")
    rac.pack(tmp_path / "m.safetensors", tmp_path / "m.rac", **options)
    archive = Archive(FileAccess(tmp_path / "m.rac"))
    assert archive.record(archive.index.entries[0]).head["tile"] == tile
    assert rac.load_file(tmp_path / "m.rac")["a"].tobytes() == a.tobytes()


@pytest.mark.parametrize(
    ("shape", "tile", "coder"),
    [
        ((4000, 300), [800, 300], "lanes/1"),  # whole rows, in equal pieces of up to 2**18 words
        ((3, 300_000), [1, 150_000], "lanes/1"),
        ((2, 4096), [2, 4096], "lanes/1"),
        ((4096,), [1, 4096], "raw/1"),  # 8 KB
        ((4097,), [1, 4097], "lanes/1"),
        ((0, 7), [1, 7], "raw/1"),
    ],
)
def test_fast_cuts_strips_and_stores_small_tensors_as_they_are(tmp_path, shape, tile, coder):
    a = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    rac.save_file({"a": a}, tmp_path / "m.rac", level="fast")
    archive = Archive(FileAccess(tmp_path / "m.rac"))
    head = archive.record(archive.index.entries[0]).head
    assert (head["tile"], head["stages"][0]["id"]) == (tile, coder)
    with rac.open(tmp_path / "m.rac") as f:
        assert f.get_tensor("a").tobytes() == a.tobytes()
        if a.ndim == 2:
            assert f.get_slice("a")[:, 1:5].tobytes() == a[:, 1:5].tobytes()


def test_summary(tmp_path):
    st.save_file({"a": A, "b": A, "c": A + 1}, tmp_path / "m.safetensors")
    seen = []
    done = rac.pack(tmp_path / "m.safetensors", tmp_path / "m.rac", progress=lambda *a: seen.append(a))
    assert done.paths == (str(tmp_path / "m.rac"),)
    assert (done.tensors, done.weights, done.dense, done.resumed) == (3, 36, 288, 0)
    assert done.stored == os.path.getsize(tmp_path / "m.rac")
    assert seen == [("a", 192), ("c", 96)]
    done = rac.pack(tmp_path / "m.safetensors", tmp_path / "s.rac", shard_size=100)
    assert [os.path.basename(p) for p in done.paths] == ["s-00001-of-00002.rac", "s-00002-of-00002.rac"]
    assert done.stored == sum(map(os.path.getsize, done.paths))


def test_content_digest_does_not_depend_on_how(tmp_path):
    w = np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32)
    digests = set()
    for i, (arrays, level) in enumerate(
        (({"a": w, "b": A}, "fast"), ({"b": A, "a": w}, "max"), ({"a": w, "b": A.copy()}, "default"))
    ):
        rac.save_file(arrays, tmp_path / f"{i}.rac", {"n": str(i)}, level=level)
        digests.add(rac.verify(tmp_path / f"{i}.rac").digest)
    assert len(digests) == 1
    rac.save_file({"a": w, "b": A, "c": A}, tmp_path / "m.rac")
    assert rac.verify(tmp_path / "m.rac").digest not in digests


def test_float32_that_holds_bfloat16(tmp_path):
    w = np.random.default_rng(0).standard_normal((400, 300)).astype(np.float32)
    w = (w.view(np.uint32) & 0xFFFF0000).view(np.float32)
    for level in ("fast", "default", "max"):
        rac.save_file({"w": w}, tmp_path / "m.rac", level=level)
        archive = Archive(FileAccess(tmp_path / "m.rac"))
        assert tn.parse(archive.record(archive.index.entries[0]), archive.limits).chain.coder.zero == 16
        assert os.path.getsize(tmp_path / "m.rac") < 0.4 * w.nbytes
        assert rac.load_file(tmp_path / "m.rac")["w"].tobytes() == w.tobytes()
