"""The files of a source come back as they were: headers, names, links and what lies beside them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import folder_matrix
import rac
from rac.decode.unpack import safetensors_header
from rac.encode.pack import pack_source
from rac.encode.sources import from_arrays, open_source
from rac.errors import FormatError, MismatchError


@pytest.mark.parametrize("kind", folder_matrix.KINDS)
def test_the_tree_that_was_packed(kind, tmp_path):
    assert folder_matrix.trial(kind, tmp_path).startswith(folder_matrix.EXPECTED.get(kind, "equal"))


def spaced(path, gap="   "):
    """A file whose header no library writes: spaces, and names against the order of the bytes."""
    data = {"a": np.arange(40, dtype=np.float32), "b": np.arange(24, dtype=np.float32).reshape(4, 6)}
    head = {
        "b": {"shape": [4, 6], "dtype": "F32", "data_offsets": [160, 256]},
        "a": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]},
    }
    body = (json.dumps(head) + gap).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data["a"].tobytes() + data["b"].tobytes())
    return path


@pytest.mark.parametrize("options", [{}, {"bits": 4, "keep": ["w"]}])
@pytest.mark.parametrize("name", ["back.safetensors", "back"])
def test_a_single_file(tmp_path, options, name):
    source = spaced(tmp_path / "m.safetensors")
    if options:
        source = tmp_path / "big.safetensors"
        folder_matrix.raw(source, folder_matrix.weights(1, "w", "v", shape=(256, 128), dtype=np.float32), "  ", True)
    rac.pack(source, tmp_path / "m.rac", **options)
    rac.verify(tmp_path / "m.rac", source)
    (back,) = rac.unpack(tmp_path / "m.rac", tmp_path / name)
    with open(back, "rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        assert f.read(size) == source.read_bytes()[8 : 8 + size]
    assert options or Path(back).read_bytes() == source.read_bytes()


def test_a_header_of_its_own_is_compared(tmp_path):
    source = spaced(tmp_path / "m.safetensors")
    rac.pack(source, tmp_path / "m.rac")
    spaced(source, "    ")
    with pytest.raises(MismatchError):
        rac.verify(tmp_path / "m.rac", source)
    usual = tmp_path / "usual.safetensors"
    rac.unpack(tmp_path / "m.rac", usual)
    tensors = rac.load_file(tmp_path / "m.rac")
    head = safetensors_header([(n, "F32", t.shape) for n, t in tensors.items()], {})
    usual.write_bytes(head + b"".join(t.tobytes() for t in tensors.values()))
    rac.pack(usual, tmp_path / "u.rac")
    rac.verify(tmp_path / "u.rac", usual)
    with pytest.raises(MismatchError, match="header"):
        rac.verify(tmp_path / "u.rac", source)


def test_patterns_leave_no_header(tmp_path):
    source = spaced(tmp_path / "m.safetensors")
    rac.pack(source, tmp_path / "m.rac", include=["b"])
    rac.verify(tmp_path / "m.rac", source)
    with rac.open(tmp_path / "m.rac") as f:
        assert f.attachments() == []
    rac.unpack(tmp_path / "m.rac", tmp_path / "b.safetensors")
    assert list(rac.load_file(tmp_path / "m.rac")) == ["b"]


def test_equal_names_in_two_files(tmp_path):
    """The names of the model itself are those of its main file; equal tensors are stored once."""
    folder_matrix.fp16_variant(tmp_path / "m")
    same = folder_matrix.weights(1, "w", dtype=np.float32)
    folder_matrix.save(tmp_path / "m" / "original" / "consolidated.safetensors", same)
    rac.pack(tmp_path / "m", tmp_path / "m.rac")
    with rac.open(tmp_path / "m.rac") as f:
        assert list(f.keys()) == ["w", "original/consolidated.safetensors::w", "model.fp16.safetensors::w"]
        assert len(f.archives[0].index.entries) == 2
        assert f.get_tensor("w").dtype == np.float32


def archive(path, provenance, tensors=None):
    """An archive whose provenance says this."""
    source = from_arrays(tensors or {"w": np.zeros((4, 4), np.float32)})
    pack_source(source, path, settings=provenance)
    return path


@pytest.mark.parametrize(
    "said",
    [
        {"links": {"a": "/etc/passwd"}},
        {"links": {"a": "../x"}},
        {"links": {"a/b": "../../x"}},
        {"links": {"../a": "b"}},
        {"links": {"a": ".", "a/l": "../c"}},
        {"links": {"a": "b", "l": "a/../../c"}},
        {"links": {"a": "b", "l": "a/../c"}},
        {"links": {"a": "b", "a/l": "c"}},
        {"links": {"a": ""}},
        {"links": {"a/b": ".."}},
        {"links": {"a": 3}},
        {"links": ["a"]},
        {"folders": ["../a"]},
        {"folders": [""]},
        {"folders": "a"},
        {"headers": 4},
    ],
)
def test_what_leads_out_of_the_folder_is_refused(tmp_path, said):
    archive(tmp_path / "m.rac", said)
    with pytest.raises(FormatError):
        rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"12345678{}",
        b"12345678[]",
        b'12345678{"w":{"dtype":"F32","shape":[4,4],"data_offsets":[0,60]}}',
        b'12345678{"w":{"dtype":"F32","shape":[4,4],"data_offsets":[4,68]}}',
        b'12345678{"w":{"dtype":"I32","shape":[4,4],"data_offsets":[0,64]}}',
        b'12345678{"w":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]},"v":0}',
        b'12345678{"w":{"dtype":"F32","shape":[4,4],"data_offsets":[[],64]}}',
    ],
)
def test_a_header_of_other_tensors_is_refused(tmp_path, head):
    folder_matrix.raw(tmp_path / "m.safetensors", {"w": np.zeros((4, 4), np.float32)}, " ")
    source = replace(open_source(tmp_path / "m.safetensors"), headers={"": head})
    pack_source(source, tmp_path / "m.rac")
    with pytest.raises(FormatError, match="header"):
        rac.unpack(tmp_path / "m.rac", tmp_path / "out")


def test_only_chosen_files(tmp_path):
    rng = np.random.default_rng(3)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    st = pytest.importorskip("safetensors.numpy")
    st.save_file({"a": rng.standard_normal((40, 30)).astype(np.float32)}, folder / "model.safetensors")
    st.save_file({"b": rng.standard_normal((40, 30)).astype(np.float32)}, folder / "sub" / "other.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "link.safetensors").symlink_to("sub/other.safetensors")
    rac.pack(folder, tmp_path / "m.rac")

    def tree(*only):
        rac.unpack(tmp_path / "m.rac", tmp_path / "out", only=only)
        found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if not p.is_dir()}
        assert all((tmp_path / "out" / p).read_bytes() == (folder / p).read_bytes() for p in found)
        shutil.rmtree(tmp_path / "out")
        return found

    assert tree("model.safetensors") == {"model.safetensors"}
    assert tree("*.json", "sub/*") == {"config.json", "sub/other.safetensors"}
    assert tree("link.*") == {"link.safetensors", "sub/other.safetensors"}
    with pytest.raises(rac.NameNotFoundError, match=r"holds no file 'nosuch'; it has config\.json, link"):
        tree("nosuch")
    with pytest.raises(rac.OutputError, match="name a folder"):
        rac.unpack(tmp_path / "m.rac", tmp_path / "one.safetensors", only=["model.safetensors"])
    assert not (tmp_path / "out").exists()
