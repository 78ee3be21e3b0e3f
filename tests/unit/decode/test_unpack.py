"""Archives back to files."""

from __future__ import annotations

import json

import numpy as np
import pytest

import rac

st = pytest.importorskip("safetensors.numpy")
A = np.arange(12.0).reshape(3, 4)


def test_order_and_ties(tmp_path):
    rac.save_file({"z": A, "a": A + 1, "tied": A}, tmp_path / "m.rac", {"k": "v"})
    (path,) = rac.unpack(tmp_path / "m.rac", tmp_path / "out.safetensors")
    got = st.load_file(path)
    assert {n: t.tobytes() for n, t in got.items()} == {
        n: t.tobytes() for n, t in (("z", A), ("a", A + 1), ("tied", A))
    }
    raw = (tmp_path / "out.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + size])["__metadata__"] == {"k": "v"}
    assert size % 8 == 0


def test_every_dtype(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    kinds = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu float4_e2m1fn_x2 complex64 int64"
    tensors = {
        k: torch.arange(64, dtype=torch.uint8).repeat(2).view(getattr(torch, k)).reshape(2, -1).clone()
        for k in kinds.split()
    }
    rac.save_file(tensors, tmp_path / "m.rac")
    rac.unpack(tmp_path / "m.rac", tmp_path / "m.safetensors")
    got = load_file(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert got[name].view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()


def test_nothing_and_empty_tensors(tmp_path):
    rac.save_file({}, tmp_path / "m.rac")
    (path,) = rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert st.load_file(path) == {}
    rac.save_file({"none": np.zeros((0, 5)), "one": np.array(7)}, tmp_path / "m.rac")
    rac.unpack(tmp_path / "m.rac", tmp_path / "out", force=True)
    got = st.load_file(path)
    assert (got["none"].shape, got["one"].tolist()) == ((0, 5), 7)


def test_a_name_that_safetensors_keeps_for_itself(tmp_path):
    """Such a tensor cannot stand in a safetensors file: an error, and no file that nothing can read."""
    rac.save_file({"__metadata__": A}, tmp_path / "m.rac")
    with pytest.raises(rac.RacError):
        rac.unpack(tmp_path / "m.rac", tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_damaged_archive_leaves_nothing_behind(tmp_path):
    rac.save_file({"w": np.arange(5000, dtype=np.float32)}, tmp_path / "m.rac")
    data = bytearray((tmp_path / "m.rac").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m.rac").write_bytes(data)
    with pytest.raises(rac.FormatError):
        rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.rac"]


def test_a_file_of_another_library_is_no_folder_to_be_made(tmp_path):
    rac.save_file({"a": A}, tmp_path / "m.rac")
    np.savez(tmp_path / "n.npz", a=A, b=A + 1)
    rac.pack(tmp_path / "n.npz", tmp_path / "n.rac")
    for archive, name, ending in (("m", "x.npz", ".npz"), ("m", "x.ONNX", ".ONNX"), ("n", "x.npy", ".npy")):
        with pytest.raises(rac.OutputError, match=rf"does not hold one {ending} file; name a folder"):
            rac.unpack(tmp_path / f"{archive}.rac", tmp_path / name)
        assert not (tmp_path / name).exists()
    rac.unpack(tmp_path / "n.rac", tmp_path / "y.npz")
    assert (tmp_path / "y.npz").read_bytes() == (tmp_path / "n.npz").read_bytes()
    (tmp_path / "there.npz").mkdir()
    rac.unpack(tmp_path / "m.rac", tmp_path / "there.npz")
    assert (tmp_path / "there.npz" / "model.safetensors").exists()
