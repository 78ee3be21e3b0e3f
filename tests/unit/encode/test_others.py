"""Files of other libraries: packed, read, and back byte for byte; hostile ones are refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np
import pytest

import rac
from rac.cli import main
from rac.decode import zips
from rac.encode.pack import pack_source
from rac.encode.sources import open_source
from rac.encode.sources.others import framed

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((200, 130)) * 0.02).astype(np.float32)
B = RNG.standard_normal(200).astype(np.float16)


def there_and_back(source, tmp_path, want, **options):
    """Pack, verify, load and unpack a file; True where each file that comes back is that of the source."""
    archive, out = tmp_path / "m.rac", tmp_path / "out"
    done = rac.pack(source, archive, **options)
    rac.verify(archive, source, **options)
    got = rac.load_file(archive)
    assert set(want) <= got.keys()
    for name, array in want.items():
        assert got[name].tobytes() == np.ascontiguousarray(array).astype(got[name].dtype).tobytes(), name
        assert got[name].shape == array.shape
    paths = [Path(p) for p in rac.unpack(archive, out)]
    same = all((source.parent / p.relative_to(out)).exists() for p in paths)
    same = same and all(p.read_bytes() == (source.parent / p.relative_to(out)).read_bytes() for p in paths)
    assert same == (done.lost == "")
    if not same:
        assert [p.name for p in paths] == ["model.safetensors"]
    return same


def save_npy(path):
    np.save(path, W)
    return {path.stem: W}


def save_npz(path):
    arrays = {"w": W, "b": B, "scalar": np.float32(3), "none": np.zeros((0, 3)), "again": W, "bf16": W[0].astype("f2")}
    np.savez(path, **arrays, words=np.array(["not", "a tensor"]), bf=W[1].astype(ml_dtypes.bfloat16))
    return arrays | {"bf": W[1].astype(ml_dtypes.bfloat16).view(np.uint8).reshape(-1, 2)}


def save_keras(path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as f:
        layer = f.create_group("layers/dense/vars")
        layer.create_dataset("0", data=W)
        layer.create_dataset("1", data=B)
        layer.create_dataset("small", data=B[:50], chunks=(10,))
        f.create_dataset("name", data="dense")
    return {"layers/dense/vars/0": W, "layers/dense/vars/1": B, "layers/dense/vars/small": B[:50]}


def save_keras_zip(path):
    """As Keras 3 saves a model: a zip file, nothing in it compressed."""
    want = save_keras(inner := path.parent / "inner.h5")
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("config.json", "{}")
        z.write(inner, "model.weights.h5")
    inner.unlink()
    return want


def extension(array):
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))


def save_flax(path):
    bf = W.astype(ml_dtypes.bfloat16)
    tree = {"params": {"dense": {"kernel": extension(W), "bias": extension(B)}, "0": [extension(bf)]}, "step": 3}
    path.write_bytes(msgpack.packb(tree))
    return {"params.dense.kernel": W, "params.dense.bias": B, "params.0.0": bf}


def save_torch(path):
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(W)
    model = {"w": w, "tied": w, "turned": w.t()[:3], "part": w[7:9], "p": torch.nn.Parameter(w.bfloat16())}
    torch.save({"model": model, "step": 3, "list": [w.double()]}, path)
    names = {f"model.{n}": W for n in ("w", "tied")} | {"model.turned": W.T[:3], "model.part": W[7:9]}
    return names | {"model.p": W.astype(ml_dtypes.bfloat16), "list.0": W.astype(np.float64)}


def onnx_model(*initialisers):
    helper = pytest.importorskip("onnx.helper")
    node = helper.make_node(
        "Constant", [], ["c"], value=pytest.importorskip("onnx.numpy_helper").from_array(W[:9], "x")
    )
    return helper.make_model(helper.make_graph([node], "g", [], [], initialisers))


def save_onnx(path):
    onnx = pytest.importorskip("onnx")
    plain = onnx.numpy_helper.from_array
    typed = onnx.helper.make_tensor("typed", onnx.TensorProto.FLOAT, [2, 130], W[2:4].reshape(-1).tolist())
    bf = onnx.helper.make_tensor("bf", 16, [2, 130], W[5:7].astype(ml_dtypes.bfloat16).tobytes(), raw=True)
    words = onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [1], [b"text"])
    onnx.save(onnx_model(plain(W, "w"), plain(B, "b"), typed, bf, words), path)
    return {"w": W, "b": B, "typed": W[2:4], "c": W[:9], "bf": W[5:7].astype(ml_dtypes.bfloat16)}


SAVE = {
    "m.npy": save_npy,
    "m.npz": save_npz,
    "m.weights.h5": save_keras,
    "m.keras": save_keras_zip,
    "m.msgpack": save_flax,
    "m.pt": save_torch,
    "m.bin": save_torch,
    "m.onnx": save_onnx,
}


@pytest.mark.parametrize("name", SAVE)
def test_the_same_file_comes_back(name, tmp_path):
    source = tmp_path / name
    want = SAVE[name](source)
    assert there_and_back(source, tmp_path, want, pickles=True)
    back = tmp_path / f"back{source.suffix}"  # the one file, under another name
    assert rac.unpack(tmp_path / "m.rac", back) == [str(back)]
    assert back.read_bytes() == source.read_bytes()
    safetensors = pytest.importorskip("safetensors.numpy")
    rac.unpack(tmp_path / "m.rac", tmp_path / "m.safetensors")
    if name != "m.npz":  # of which the safetensors file has the same arrays, too
        assert safetensors.load_file(tmp_path / "m.safetensors").keys() >= want.keys()


def test_the_large_tensors_are_not_stored_twice(tmp_path):
    for name, save in SAVE.items():
        if name not in ("m.pt", "m.bin"):  # views of a tensor are tensors of their own there
            save(tmp_path / name)
            rac.pack(tmp_path / name, tmp_path / "m.rac", pickles=True, force=True)
            assert (tmp_path / "m.rac").stat().st_size < (tmp_path / name).stat().st_size + 4096, name


def test_onnx_with_data_beside_it(tmp_path):
    onnx = pytest.importorskip("onnx")
    initialisers = [onnx.numpy_helper.from_array(a, n) for n, a in (("w", W), ("v", W * 2))]
    how = {"save_as_external_data": True, "location": "sub.data", "size_threshold": 100}
    onnx.save(onnx_model(*initialisers), tmp_path / "m.onnx", **how)
    assert there_and_back(tmp_path / "m.onnx", tmp_path, {"w": W, "v": W * 2})
    assert sorted(os.listdir(tmp_path / "out")) == ["m.onnx", "sub.data"]
    rac.unpack(tmp_path / "m.rac", tmp_path / "part", only=["sub.data"])
    assert os.listdir(tmp_path / "part") == ["sub.data"]
    (tmp_path / "hub").mkdir()  # links, as a cache of the Hub has them
    for file in ("m.onnx", "sub.data"):
        (tmp_path / "hub" / file).symlink_to(f"../{file}")
    assert len(open_source(tmp_path / "hub" / "m.onnx").tensors) == 3


def test_a_lossy_model_is_that_file_with_other_numbers(tmp_path):
    onnx = pytest.importorskip("onnx")
    save_onnx(tmp_path / "m.onnx")
    rac.pack(tmp_path / "m.onnx", tmp_path / "m.rac", bits=4, effort="fast")
    rac.unpack(tmp_path / "m.rac", tmp_path / "back.onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "back.onnx").graph.initializer}
    assert (found["w"] == rac.load_file(tmp_path / "m.rac")["w"]).all() and not (found["w"] == W).all()
    assert (found["b"] == B).all()


def test_checksums_of_lossy_zip_files_are_right(tmp_path):
    """zipfile and numpy check them; torch's files have them behind the data of a member."""
    torch = pytest.importorskip("torch")
    save_npz(tmp_path / "m.npz")
    torch.save({"w": torch.from_numpy(W), "b": torch.from_numpy(B)}, tmp_path / "m.pt")
    for name, load in (("m.npz", np.load), ("m.pt", torch.load)):
        rac.pack(tmp_path / name, tmp_path / "m.rac", bits=4, effort="fast", force=True, pickles=True)
        want, (out,) = rac.load_file(tmp_path / "m.rac")["w"], rac.unpack(tmp_path / "m.rac", tmp_path / "out")
        assert Path(out).name == name
        with zipfile.ZipFile(out) as z:
            assert z.testzip() is None
        got = load(out)
        assert (np.asarray(got["w"]) == want).all() and not (want == W).all()
        assert (np.asarray(got["b"]) == B).all()
        os.unlink(out)


def test_zip_files_that_are_none_have_no_checksums():
    good, rng, refused = zipped({"w": b"1" * 500, "v": b"2" * 500}), np.random.default_rng(0), 0
    for _ in range(300):
        raw = bytearray(good)
        for i in rng.integers(0, len(raw), 3):
            raw[i] = rng.integers(0, 256)
        try:
            zips.mend(io.BytesIO(raw), [(40, 100), (700, 10)])
        except rac.FormatError:
            refused += 1
    assert 30 < refused < 300
    for raw in (b"", b"PK", good[:-1], good[:900]):
        with pytest.raises(rac.FormatError, match="not that of a zip file"):
            zips.mend(io.BytesIO(raw), [(40, 1)])


def test_a_lossy_checkpoint_of_many_zip_files(tmp_path):
    torch = pytest.importorskip("torch")
    checkpoint(tmp_path / "c", [("w", W.shape, [("a.distcp", (0, 0), torch.from_numpy(W))])])
    rac.pack(tmp_path / "c", tmp_path / "m.rac", bits=4, effort="fast", pickles=True)
    assert "model.safetensors" in {Path(p).name for p in rac.unpack(tmp_path / "m.rac", tmp_path / "out")}


def test_what_does_not_come_back_as_it_was(tmp_path, capsys):
    torch, h5py = pytest.importorskip("torch"), pytest.importorskip("h5py")
    wide = np.tile(W, (1, 3))
    cases = {"compressed.npz": "compressed", "turned.npy": "Fortran", "big.npy": "big-endian", "chunks.h5": "pieces"}
    np.savez_compressed(tmp_path / "compressed.npz", w=wide, f=np.asfortranarray(wide), b=B.astype(">f2"))
    np.save(tmp_path / "turned.npy", np.asfortranarray(wide))
    np.save(tmp_path / "big.npy", wide.astype(">f4"))
    with h5py.File(tmp_path / "chunks.h5", "w") as f:
        f.create_dataset("w", data=wide, compression="gzip")
    torch.save({"w": torch.from_numpy(wide)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name, why in (cases | {"old.bin": "before 1.6"}).items():
        source, archive = tmp_path / name, tmp_path / "m.rac"
        assert main(["pack", str(source), "-o", str(archive), "--force", "--allow-pickle-weights"]) == 0
        assert f"does not come back as it was: {why}"[:30] in (said := capsys.readouterr().err) and why in said
        assert main(["verify", str(archive), "--against", str(source), "--allow-pickle-weights"]) == 0
        assert main(["unpack", str(archive), "-o", str(tmp_path / "out"), "--force"]) == 0
        assert "a safetensors file, since" in capsys.readouterr().err
        assert all((a == wide).all() for a in rac.load_file(archive).values() if a.ndim == 2)


def test_rows_of_a_turned_array_are_read_as_they_are_asked_for(tmp_path):
    np.save(tmp_path / "m.npy", np.asfortranarray(W.astype(">f4")).reshape(10, 20, 130, order="F"))
    (t,) = open_source(tmp_path / "m.npy").tensors
    raw = np.load(tmp_path / "m.npy").astype("<f4").tobytes()
    assert t.read(0, t.nbytes).tobytes() == raw
    for a, b in ((0, 1), (7, 90_001), (50_000, 50_000), (103_999, 104_000)):
        assert t.read(a, b).tobytes() == raw[a:b]


def test_some_tensors_of_a_file(tmp_path):
    save_npz(tmp_path / "m.npz")
    rac.pack(tmp_path / "m.npz", tmp_path / "m.rac", include=["w"])
    assert [Path(p).name for p in rac.unpack(tmp_path / "m.rac", tmp_path / "out")] == ["model.safetensors"]
    with pytest.raises(rac.RacError):
        rac.unpack(tmp_path / "m.rac", tmp_path / "out", only=["m.npz"])


def test_pickles_are_loaded_where_they_are_allowed_alone(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(3)}, path)
    assert main(["pack", str(path), "-o", str(tmp_path / "m.rac")]) == 2
    assert "--allow-pickle-weights" in capsys.readouterr().err
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    for new in (True, False):
        torch.save({"w": torch.zeros(3), "evil": Evil()}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(rac.SourceError, match="more than weights"):
            rac.pack(path, tmp_path / "m.rac", pickles=True)
    assert not ran.exists()


def test_a_folder_with_pickled_weights(tmp_path, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path / "model"
    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=300, architectures=["LlamaForCausalLM"], **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    model.config.save_pretrained(folder)
    state = list(model.state_dict().items())
    torch.save(dict(state[:5]), folder / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(state[5:]), folder / "pytorch_model-00002-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    torch.save({"lr": torch.ones(99), "step": 3}, folder / "optimizer.pt")
    with pytest.raises(rac.SourceError, match="--allow-pickle-weights"):
        rac.pack(folder, tmp_path / "m.rac")
    assert main(["pack", str(folder), "-o", str(tmp_path / "m.rac"), "--allow-pickle-weights"]) == 0
    assert main(["verify", str(tmp_path / "m.rac"), "--against", str(folder), "--allow-pickle-weights"]) == 0
    rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()
    }
    ids = torch.arange(9).reshape(1, 9)
    with torch.no_grad():
        assert torch.equal(rac.load_model(tmp_path / "m.rac")(ids).logits, model(ids).logits)
    rac.pack(folder, tmp_path / "m4.rac", bits=4, effort="fast", calibrate="none", pickles=True)
    names = {Path(p).name for p in rac.unpack(tmp_path / "m4.rac", tmp_path / "out4")}
    assert names == {p.name for p in folder.iterdir()}
    for file in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        with zipfile.ZipFile(tmp_path / "out4" / file) as z:
            assert z.testzip() is None
    rac.pack(folder, tmp_path / "part.rac", include=["*norm*"], pickles=True)
    assert "model.safetensors" in {Path(p).name for p in rac.unpack(tmp_path / "part.rac", tmp_path / "part")}
    torch.save({"w": torch.ones(9999)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    done = rac.pack(folder, tmp_path / "old.rac", pickles=True)
    assert "before 1.6" in done.lost and rac.load_file(tmp_path / "old.rac")["w"].sum() == 9999


# --- hostile and damaged files --------------------------------------------------------------------


def npy(descr="<f4", shape=(3,), order=False, data=b"\0" * 12):
    text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + data


def zipped(members, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as z:
        for name, data in members.items():
            z.writestr(name, data)
    return out.getvalue()


def objects():
    out = io.BytesIO()
    np.save(out, np.array([{}], object), allow_pickle=True)
    return out.getvalue()


def bomb():
    """80 MB of zeros in 80 KB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z, z.open("w.npy", "w") as f:
        f.write(npy(shape=(20 << 20,), data=b""))
        for _ in range(80):
            f.write(bytes(1 << 20))
    return out.getvalue()


def twins():
    """Two arrays of one name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("w.npy", npy())
        z.writestr("w.npy", npy())
    return out.getvalue()


HOSTILE = {
    "object arrays": ("m.npz", zipped({"w.npy": objects()}), "object array"),
    "an object array": ("m.npy", objects(), "object array"),
    "a bomb": ("m.npz", bomb, "more than 200 times"),
    "a shape that is not there": ("m.npy", npy(shape=(1 << 40, 1 << 20)), "the file has"),
    "such a shape in a zip file": ("m.npz", zipped({"w.npy": npy(shape=(1 << 60,))}), "the file has"),
    "turned": ("m.npy", npy(shape=(1 << 30, 1 << 30), order=True), "the file has"),
    "compressed": ("m.npz", zipped({"w.npy": npy(shape=(5,))}, zipfile.ZIP_DEFLATED), "shorter than its shape"),
    "negative": ("m.npy", npy(shape=(-3,)), "damaged numpy header"),
    "code for a header": ("m.npy", npy(descr="__import__('os')"), "damaged numpy header"),
    "a type": ("m.npy", npy(descr="<c16", data=b"\0" * 48), "does not store"),
    "a large one of a type": ("m.npz", zipped({"w.npy": npy("<c16", (9999,), data=b"\0" * 159984)}), "complex128"),
    "no zip file": ("m.npz", b"PK\3\4" + b"\0" * 50, "damaged"),
    "no array": ("m.npz", zipped({"w.npy": b"text"}), "damaged numpy header"),
    "two of a name": ("m.npz", twins, "two tensors"),
    "no checkpoint": ("m.pt", b"what", "damaged checkpoint"),
    "a damaged one": ("m.pt", zipped({"a/data.pkl": b"cos\nsystem\n."}), "checkpoint|weights"),
    "a compressed one": ("m.pt", zipped({"a/data.pkl": b"x" * 99}, zipfile.ZIP_DEFLATED), "is compressed"),
    "no msgpack": ("m.msgpack", b"\xdd\xff\xff\xff\xff", "damaged msgpack"),
    "deep": ("m.msgpack", b"\x91" * 5000 + b"\0", "damaged msgpack|too deeply"),
    "no arrays": ("m.msgpack", msgpack.packb({"a": 1}), "no arrays"),
    "a malformed array": ("m.msgpack", msgpack.packb({"a": msgpack.ExtType(1, b"\x93\1\2\3")}), "malformed"),
    "a long array": (
        "m.msgpack",
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1 << 40], "float32", b"1234")))}),
        "has 4 bytes",
    ),
    "no Keras file": ("m.keras", zipped({"config.json": b"{}"}), "holds no model.weights.h5"),
    "a compressed model": ("m.keras", zipped({"model.weights.h5": b"x" * 99}, zipfile.ZIP_DEFLATED), "is compressed"),
    "no HDF5 in it": ("m.keras", zipped({"model.weights.h5": b"x" * 99}), "HDF5"),
    "no HDF5": ("m.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 90, "HDF5"),
    "no ONNX": ("m.onnx", b"\x08\xff", "damaged ONNX|no initialiser"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_files(case, tmp_path, capsys):
    name, data, message = HOSTILE[case]
    for suffix, module in (
        (".h5", "h5py"),
        (".keras", "h5py"),
        (".onnx", "onnx"),
        (".pt", "torch"),
    ):
        if name.endswith(suffix):
            pytest.importorskip(module)
    path = tmp_path / name
    path.write_bytes(data() if callable(data) else data)
    command = ["pack", str(path), "-o", str(tmp_path / "m.rac"), "--allow-pickle-weights"]
    assert main(command) == 2  # and what it imports is there, which is not to be counted
    capsys.readouterr()
    tracemalloc.start()
    try:
        code = main(command)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and re.search(message, said), said
    assert peak < 60 << 20
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", [n for n in SAVE if n != "m.bin"])
def test_damage_ends_in_one_error(name, tmp_path):
    """Some bytes changed, near either end, where what describes the tensors is."""
    SAVE[name](tmp_path / name)
    good, rng, refused = (tmp_path / name).read_bytes(), np.random.default_rng(1), 0
    for _ in range(40):
        raw = bytearray(good)
        for at in rng.integers(-1000, 1000, 3):
            raw[at] = rng.integers(0, 256)
        (tmp_path / name).write_bytes(raw)
        try:
            for t in open_source(tmp_path / name, pickles=True).tensors:
                t.read(0, t.nbytes)
        except rac.RacError:
            refused += 1
    assert refused


def test_onnx_data_that_lead_out_of_the_folder(tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "secret").write_bytes(b"\0" * 8000)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "link").symlink_to("../secret")
    for location in ("../secret", "/etc/passwd", str(tmp_path / "secret"), "", "link", "..\\secret"):
        t = onnx.TensorProto(name="w", dims=[2000], data_type=1, data_location=1)
        for key, value in (("location", location), ("offset", "0"), ("length", "8000")):
            t.external_data.add(key=key, value=value)
        (tmp_path / "model" / "m.onnx").write_bytes(onnx_model(t).SerializeToString())
        with pytest.raises(rac.SourceError, match="outside the model's folder"):
            open_source(tmp_path / "model" / "m.onnx")
    for wrong, match in (
        ({"location": "none"}, "is missing"),
        ({"location": "m.onnx", "offset": "-1"}, "place of"),
        ({"location": "m.onnx", "offset": str(1 << 50)}, "the file has"),
        ({"location": "m.onnx", "length": "7"}, "not what F32"),
    ):
        t = onnx.TensorProto(name="w", dims=[20], data_type=1, data_location=1)
        for key, value in wrong.items():
            t.external_data.add(key=key, value=value)
        (tmp_path / "model" / "m.onnx").write_bytes(onnx_model(t).SerializeToString())
        with pytest.raises(rac.SourceError, match=match):
            open_source(tmp_path / "model" / "m.onnx")
    bad = onnx.TensorProto(name="w", dims=[1 << 40], data_type=1, raw_data=b"1234")
    (tmp_path / "model" / "m.onnx").write_bytes(onnx_model(bad).SerializeToString())
    with pytest.raises(rac.SourceError, match="has 4 bytes"):
        open_source(tmp_path / "model" / "m.onnx")


def test_datasets_that_are_elsewhere_or_nowhere(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset("w", (100,), "f4", external=[("/etc/passwd", 0, 400)])
    with pytest.raises(rac.SourceError, match="other files"):
        open_source(path)
    with h5py.File(path, "w") as f:
        f.create_dataset("w", (1 << 40,), "f4", chunks=(1 << 20,))  # no chunk of which was written
    with pytest.raises(rac.SourceError, match="more than 200 times"):
        open_source(path)
    with h5py.File(path, "w") as f:
        f["link"] = h5py.ExternalLink("/etc/passwd", "/")
        f["soft"] = h5py.SoftLink("/nothing")
        f["v"] = B
    assert [t.name for t in open_source(path).tensors] == ["v"]


def test_orbax_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "manifest.ocdbt").touch()
    with pytest.raises(rac.SourceError, match="Orbax"):
        open_source(tmp_path)


# --- torch.distributed.checkpoint -----------------------------------------------------------------


def checkpoint(folder, tensors):
    """A checkpoint of (name, shape, chunks) in which a chunk is (file, beginning, tensor)."""
    torch = pytest.importorskip("torch")
    filesystem = pytest.importorskip("torch.distributed.checkpoint.filesystem")
    meta = pytest.importorskip("torch.distributed.checkpoint.metadata")
    folder.mkdir(exist_ok=True)
    stated, stored = {"step": meta.BytesStorageMetadata()}, {}
    for name, shape, chunks in tensors:
        parts = []
        for file, begin, t in chunks:
            out = io.BytesIO()
            torch.save(t, out)
            path = folder / file
            at = path.stat().st_size if path.exists() else 0
            with path.open("ab") as f:
                f.write(out.getvalue())
            begin, size = torch.Size(begin), torch.Size(t.shape)
            parts.append(meta.ChunkStorageMetadata(begin, size))
            place = filesystem._StorageInfo(file, at, len(out.getvalue()))
            stored[meta.MetadataIndex(name, begin, 0)] = place
        properties = meta.TensorProperties(dtype=chunks[0][2].dtype)
        stated[name] = meta.TensorStorageMetadata(properties, torch.Size(shape), parts)
    (folder / ".metadata").write_bytes(pickle.dumps(meta.Metadata(stated, None, stored)))


def test_a_checkpoint_of_one_process_comes_back(tmp_path):
    torch = pytest.importorskip("torch")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    folder, out = tmp_path / "ckpt", tmp_path / "out"
    w = torch.from_numpy(W)
    state = {"model": {"w": w, "bf": w.bfloat16(), "scalar": torch.tensor(3)}, "step": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)
    with pytest.raises(rac.SourceError, match="--allow-pickle-weights"):
        open_source(folder)
    assert rac.pack(folder, tmp_path / "m.rac", pickles=True).lost == ""
    rac.verify(tmp_path / "m.rac", folder, pickles=True)
    got = rac.load_file(tmp_path / "m.rac")
    assert (got["model.w"] == W).all() and got["model.scalar"] == 3
    assert (got["model.bf"] == W.astype(ml_dtypes.bfloat16)).all()
    rac.unpack(tmp_path / "m.rac", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_sharded_checkpoint_is_joined(tmp_path):
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(np.tile(W, (1, 2)))
    halves = [("__1_0.distcp", (90, 0), w[90:].clone()), ("__0_0.distcp", (0, 0), w[:90].clone())]
    checkpoint(tmp_path / "c", [("w", w.shape, halves), ("b", (200,), [("__0_0.distcp", (0,), torch.from_numpy(B))])])
    done = rac.pack(tmp_path / "c", tmp_path / "m.rac", pickles=True)
    assert "sharded" in done.lost
    got = rac.load_file(tmp_path / "m.rac")
    assert (got["w"] == w.numpy()).all() and (got["b"] == B).all()
    (t,) = (t for t in open_source(tmp_path / "c", pickles=True).tensors if t.name == "w")
    raw = w.numpy().tobytes()
    for a, b in ((0, 10), (93_000, 94_000), (93_600, 93_600), (5, t.nbytes)):
        assert t.read(a, b).tobytes() == raw[a:b]


def test_checkpoints_that_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(W)
    cases = {
        "sharded along more": [("w", w.shape, [("f", (0, 0), w[:, :60].clone()), ("f", (0, 60), w[:, 60:].clone())])],
        "are missing": [("w", w.shape, [("f", (0, 0), w[:60].clone())])],
        "in C order": [("w", (130, 200), [("f", (0, 0), w.t())])],
        "does not store": [("w", (3,), [("f", (0,), torch.zeros(3, dtype=torch.complex128))])],
    }
    for i, (match, tensors) in enumerate(cases.items()):
        checkpoint(tmp_path / f"{i}", tensors)
        (tmp_path / f"{i}" / "x.distcp").touch()
        with pytest.raises(rac.SourceError, match=match):
            open_source(tmp_path / f"{i}", pickles=True)
    (tmp_path / "1" / "f").unlink()
    with pytest.raises(rac.SourceError, match="'f' is missing"):
        open_source(tmp_path / "1", pickles=True)
    checkpoint(tmp_path / "out", [("w", w.shape, [("f", (0, 0), w)])])
    table = tmp_path / "out" / ".metadata"
    (tmp_path / "out" / "x.distcp").touch()
    good = table.read_bytes()
    for name in (b"\x04../f", b"\x02..", b"\x02/f"):
        table.write_bytes(good.replace(b"\x8c\x01f", b"\x8c" + name))
        with pytest.raises(rac.SourceError, match="in no file|damaged"):
            open_source(tmp_path / "out", pickles=True)


def test_a_hostile_table_is_data(tmp_path):
    """It runs nothing, and does not grow; whatever it is, the end is one SourceError."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    (tmp_path / "x.distcp").touch()
    table = tmp_path / ".metadata"
    twice = b"\x80\x04)\x94" + b"h\x00h\x00\x86q\x00" * 64 + b"\x86."  # a tuple of a tuple ... of two each
    good = pickle.dumps({"state_dict_metadata": {"w": Evil()}})
    for data in (
        pickle.dumps(Evil()),
        good,
        twice,
        twice[:-2] + b"h\x00\x93.",
        b"",
        b".",
        b"\x80\x04",
        b"(" * 99 + b".",
    ):
        table.write_bytes(data)
        with pytest.raises(rac.SourceError):
            open_source(tmp_path, pickles=True)
    rng = np.random.default_rng(0)
    for _ in range(200):
        raw = bytearray(good)
        for i in rng.integers(0, len(raw), 3):
            raw[i] = rng.integers(0, 256)
        table.write_bytes(raw)
        with pytest.raises(rac.SourceError):
            open_source(tmp_path, pickles=True)
    assert not ran.exists()


def test_frames_that_do_not_fit(tmp_path):
    """A hostile archive: places outside, on each other, in no file; a frame that is too short or too long."""
    np.savez(tmp_path / "m.npz", w=W, b=B)
    source = open_source(tmp_path / "m.npz")
    (name, frame), (w, b) = next(iter(source.frames.items())), source.tensors

    def refused(tensors, frames, match):
        archive = tmp_path / "bad.rac"
        replaced = type(source)("npz", tuple(tensors), (), {}, frames=frames)
        pack_source(replaced, archive, force=True)
        with pytest.raises(rac.FormatError, match=match):
            rac.unpack(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def moved(t, **extra):
        return type(t)(t.name, t.dtype, t.shape, t.data, t.extra | extra)

    for bad in (frame[:-1], frame + b"x", frame[:8], b"", (1 << 62).to_bytes(8, "little") + frame[8:]):
        refused([w, b], {name: bad}, "does not fit its tensors")
    for extra in ({"at": -5}, {"at": 1 << 62}, {"at": b.extra["at"]}):
        refused([moved(w, **extra), b], {name: frame}, "does not fit its tensors")
    for extra in ({"at": "0"}, {"shard": "other"}, {"at": True}):
        refused([moved(w, **extra), b], {name: frame}, "states no place")
    refused([moved(w, shard="../m.npz"), moved(b, shard="../m.npz")], {"../m.npz": frame}, "not allowed")


def test_what_is_left_is_in_the_frame_or_refused(tmp_path):
    np.savez(tmp_path / "m.npz", w=W, text=np.array(["a"] * 5))
    source = open_source(tmp_path / "m.npz")
    assert [t.name for t in source.tensors] == ["w"] and len(source.frames["m.npz"]) < framed.FREE
    np.savez(tmp_path / "m.npz", w=W, text=np.array(["a" * 99] * 5000))
    with pytest.raises(rac.SourceError, match="'text' is an array of <U99"):
        open_source(tmp_path / "m.npz")


def test_info_and_dry_run_know_them(tmp_path, capsys):
    save_npz(tmp_path / "m.npz")
    assert main(["pack", str(tmp_path / "m.npz"), "-o", str(tmp_path / "m.rac"), "--dry-run"]) == 0
    rac.pack(tmp_path / "m.npz", tmp_path / "m.rac")
    capsys.readouterr()
    assert main(["info", str(tmp_path / "m.rac"), "--json"]) == 0
    assert "npz" in json.dumps(json.loads(capsys.readouterr().out))
