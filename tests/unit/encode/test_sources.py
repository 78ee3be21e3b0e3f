"""Opening safetensors files, Hugging Face directories, GGUF files and arrays in memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from rac.encode import sources
from rac.encode.align.recipe import KEPT, check_keep, kept
from rac.encode.sources import Extent, Source, SourceTensor, from_arrays, open_source
from rac.encode.sources import hf as hf_module
from rac.errors import MissingDependencyError, SourceError

gguf = pytest.importorskip("gguf")
st = pytest.importorskip("safetensors.numpy")
RNG = np.random.default_rng(7)


def by_name(source: Source) -> dict[str, SourceTensor]:
    return {t.name: t for t in source.tensors}


def content(tensor: SourceTensor) -> bytes:
    return tensor.read(0, tensor.nbytes).tobytes()


def write(path, entries, data=b"", head=None, metadata=None):
    """A safetensors file from raw parts; `entries` maps name to (dtype, shape, begin, end)."""
    if head is None:
        table = {n: {"dtype": d, "shape": s, "data_offsets": [b, e]} for n, (d, s, b, e) in entries.items()}
        if metadata is not None:
            table["__metadata__"] = metadata
        head = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


def save(path, names, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    st.save_file({n: RNG.standard_normal((3, 4)).astype(np.float32) for n in names}, path, metadata=metadata)
    return path


# --- safetensors ---------------------------------------------------------------------------------


def test_safetensors_against_the_library(tmp_path):
    arrays = {
        "größe/重み": RNG.standard_normal((5, 3)).astype(np.float32),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float16),
        "bf": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "e4": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
        "flag": np.array([True, False]),
    }
    path = tmp_path / "m.safetensors"
    st.save_file(arrays, path, metadata={"format": "pt"})
    source = open_source(path)
    assert source.kind == "safetensors"
    assert source.metadata == {"format": "pt"}
    assert not source.attachments
    found = by_name(source)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert found[name].nbytes == array.nbytes
        assert content(found[name]) == array.tobytes()
    assert found["bf"].dtype == "BF16"
    assert found["e4"].dtype == "F8_E4M3"
    assert found["flag"].dtype == "BOOL"
    offsets = [t.data.offset for t in source.tensors]
    assert offsets == sorted(offsets)
    assert pickle.loads(pickle.dumps(source.tensors)) == source.tensors


def test_safetensors_of_torch_dtypes(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    packed = torch.arange(16, dtype=torch.uint8)
    tensors = {
        "f4": packed.reshape(2, 8).view(torch.float4_e2m1fn_x2),
        "e8": packed.clone().view(torch.float8_e8m0fnu),
        "c": torch.tensor([1 + 2j], dtype=torch.complex64),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    found = by_name(open_source(tmp_path / "m.safetensors"))
    assert (found["f4"].dtype, found["f4"].shape) == ("F4", (2, 16))
    assert (found["e8"].dtype, found["c"].dtype) == ("F8_E8M0", "C64")
    memory = by_name(from_arrays(tensors))
    for name in tensors:
        assert content(memory[name]) == content(found[name])
        assert (memory[name].dtype, memory[name].shape) == (found[name].dtype, found[name].shape)


def test_read_ranges(tmp_path):
    (tensor,) = open_source(write(tmp_path / "m.safetensors", {"a": ("U8", [9], 0, 9)}, bytes(range(9)))).tensors
    out = tensor.read(2, 5)
    assert out.tolist() == [2, 3, 4]
    assert out.flags.writeable
    assert tensor.read(9, 9).size == 0
    for start, stop in ((-1, 2), (0, 10), (5, 4)):
        with pytest.raises(ValueError, match="not inside"):
            tensor.read(start, stop)


def test_read_of_a_file_that_changed(tmp_path):
    path = write(tmp_path / "m.safetensors", {"a": ("U8", [9], 0, 9)}, bytes(9))
    (tensor,) = open_source(path).tensors
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match="became shorter"):
        tensor.read(0, 9)
    path.unlink()
    with pytest.raises(SourceError, match="No such file"):
        tensor.read(0, 9)


A = {"a": ("F32", [2], 0, 8)}
DEEP = b'{"a":' + b"[" * 200_000


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"entries": A, "data": bytes(7)}, "the tensors take 8 bytes, the file has 7"),
        ({"entries": A, "data": bytes(9)}, "the tensors take 8 bytes, the file has 9"),
        ({"entries": {"a": ("F32", [3], 0, 8)}, "data": bytes(8)}, "not what F32"),
        ({"entries": {"a": ("F4", [3], 0, 1)}, "data": bytes(1)}, "not what F4"),
        ({"entries": {"a": ("U8", [2], 1, 3)}, "data": bytes(3)}, "hole in front of tensor 'a'"),
        ({"entries": {**A, "b": ("U8", [4], 4, 8)}, "data": bytes(8)}, "overlap in front of tensor 'b'"),
        ({"entries": {"a": ("U8", [2], 2, 0)}}, "not what U8"),
        ({"entries": {"a": ("F6_E2M3", [4], 0, 3)}, "data": bytes(3)}, "unsupported dtype 'F6_E2M3'"),
        ({"entries": {"a": ("U8", [-1, -2], 0, 2)}, "data": bytes(2)}, "malformed entry"),
        ({"entries": {"a": ("U8", [True], 0, 1)}, "data": bytes(1)}, "malformed entry"),
        ({"entries": {"a": ("U8", [1.0], 0, 1)}, "data": bytes(1)}, "malformed entry"),
        ({"entries": {"a": ("U8", [1] * 65, 0, 1)}, "data": bytes(1)}, "malformed entry"),
        ({"entries": {"a": ("U8", [1 << 70], 0, 1 << 70)}}, "malformed entry"),
        ({"entries": {}, "head": b'{"a":{"dtype":"U8","shape":[]}}'}, "malformed entry"),
        ({"entries": {}, "head": b'{"a":[]}'}, "malformed entry"),
        ({"entries": A, "data": bytes(8), "metadata": {"a": 1}}, "__metadata__"),
        ({"entries": A, "data": bytes(8), "metadata": []}, "__metadata__"),
        ({"entries": {}, "head": b'{"a":1,"a":2}'}, "duplicate name 'a'"),
        ({"entries": {}, "head": b'{"\\ud800":1}'}, "not valid JSON"),
        ({"entries": {}, "head": b'{"\xff":1}'}, "not valid JSON"),
        ({"entries": {}, "head": b"{"}, "not valid JSON"),
        ({"entries": {}, "head": DEEP}, "not valid JSON"),
        ({"entries": {}, "head": b" {}"}, "does not start with"),
        ({"entries": {}, "head": b""}, "does not start with"),
        ({"entries": {}, "head": b"{}"}, "holds no tensor"),
    ],
)
def test_damaged_safetensors(tmp_path, parts, message):
    path = write(tmp_path / "m.safetensors", **parts)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "shorter than 8"),
        (b"abc", "shorter than 8"),
        (struct.pack("<Q", 50) + b"{}", "ends inside the header"),
        (struct.pack("<Q", 100_000_001) + b"{}", "larger than 100 MB"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "larger than 100 MB"),
    ],
)
def test_safetensors_of_wrong_length(tmp_path, raw, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    with pytest.raises(SourceError, match=message):
        open_source(path)


def test_a_null_metadata_is_none(tmp_path):
    head = b'{"__metadata__":null,"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
    assert open_source(write(tmp_path / "m.safetensors", {}, b"x", head)).metadata == {}


# --- what is not a model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("m.bin", b"whatever", "pickled weights are refused"),
        ("m.PT", b"whatever", "pickled weights are refused"),
        ("m.pkl", b"", "pickled weights are refused"),
        ("m.rac", b"", "already a .rac archive"),
        ("m.safetensors", b"\x89RAC\r\n\x1a\n", "already a .rac archive"),
        ("m.txt", b"hello, this is text", "no file of weights that rac knows"),
        ("m", b"", "no file of weights that rac knows"),
    ],
)
def test_other_files(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / name)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        open_source(tmp_path / "none.safetensors")
    with pytest.raises(SourceError, match="not a regular file"):
        open_source("/dev/null")
    with pytest.raises(SourceError, match=r"no \*.safetensors file"):
        open_source(tmp_path)


def test_a_safetensors_file_of_any_name(tmp_path):
    assert open_source(write(tmp_path / "weights", A, bytes(8))).kind == "safetensors"


# --- selection -----------------------------------------------------------------------------------


def test_include_and_exclude(tmp_path):
    path = save(tmp_path / "m.safetensors", ["a.w", "a.b", "b.w", "B.w"])

    def names(**how):
        return sorted(by_name(open_source(path, **how)))

    assert names(include=["a.*"]) == ["a.b", "a.w"]
    assert names(include=["a.*", "b.w"], exclude=["*.b"]) == ["a.w", "b.w"]
    assert names(exclude=["?.w", "unmatched"]) == ["a.b"]
    with pytest.raises(SourceError, match=r"include pattern 'c\*'"):
        names(include=["a.*", "c*"])
    with pytest.raises(SourceError, match="no tensor is left"):
        names(exclude=["*"])


# --- Hugging Face directories --------------------------------------------------------------------


def shards(root, index=True):
    save(root / "model-00001-of-00002.safetensors", ["a", "b"], {"format": "pt", "x": "1"})
    save(root / "model-00002-of-00002.safetensors", ["c"], {"format": "np", "y": "2"})
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    put_index(root, {"a": first, "b": first, "c": second})
    if not index:
        (root / "model.safetensors.index.json").unlink()


def put_index(root, weight_map):
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_directory_of_one_file(tmp_path):
    model = tmp_path / "model"
    save(model / "model.safetensors", ["a"], {"format": "pt"})
    (model / "config.json").write_text("{}")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("[1]")
    (model / "empty.txt").touch()
    for other in ("pytorch_model.bin", "model.onnx", "1_Pooling/tf_model.H5"):
        (model / other).write_bytes(b"x")
    (model / ".gitattributes").write_text("x")
    (model / ".cache").mkdir()
    (model / ".cache" / "x.json").write_text("x")
    blob = tmp_path / "blob"
    blob.write_text("linked")
    (model / "tokenizer.json").symlink_to(blob)
    source = open_source(model)
    assert (source.kind, source.metadata) == ("hf", {"format": "pt"})
    assert [t.extra for t in source.tensors] == [None]
    attached = {a.name: a.read() for a in source.attachments}
    assert attached == {
        ".gitattributes": b"x",
        "1_Pooling/config.json": b"[1]",
        "1_Pooling/tf_model.H5": b"x",
        "config.json": b"{}",
        "empty.txt": b"",
        "model.onnx": b"x",
        "pytorch_model.bin": b"x",
        "tokenizer.json": b"linked",
    }
    assert list(attached) == sorted(attached)
    assert source.skipped == (".cache/",)


def test_large_files_are_no_attachments(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_module, "MAX_ATTACHMENT", 4)
    save(tmp_path / "model.safetensors", ["a"])
    (tmp_path / "fits.txt").write_bytes(b"1234")
    (tmp_path / "large.txt").write_bytes(b"12345")
    source = open_source(tmp_path)
    assert [a.name for a in source.attachments] == ["fits.txt"]
    assert source.skipped == ("large.txt",)


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path, index):
    shards(tmp_path, index)
    source = open_source(tmp_path)
    where = {t.name: t.extra["shard"][:11] for t in source.tensors}
    assert where == {"a": "model-00001", "b": "model-00001", "c": "model-00002"}
    assert source.metadata == {"format": "pt", "x": "1", "y": "2"}
    assert [a.name for a in source.attachments] == ["model.safetensors.index.json"] * index


def test_files_that_the_index_does_not_list(tmp_path):
    shards(tmp_path)
    save(tmp_path / "consolidated.safetensors", ["a", "z"])
    save(tmp_path / "2_Dense" / "model.safetensors", ["linear.weight"])
    source = open_source(tmp_path)
    other = "consolidated.safetensors"
    found = {n: t.extra for n, t in by_name(source).items() if t.extra["shard"] == other}
    assert found == {f"{other}::{n}": {"shard": other, "name": n} for n in "az"}
    assert by_name(source)["linear.weight"].extra == {"shard": "2_Dense/model.safetensors"}


def test_damaged_shards(tmp_path):
    shards(tmp_path)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    whole = {"a": first, "b": first, "c": second}
    for weight_map, message in (
        ({"a": first, "c": second}, "does not place tensor 'b'"),
        ({"a": first, "b": second, "c": second}, "does not place tensor 'b'"),
        ({**whole, "d": second}, "tensor 'd' of the index is not in"),
        ({**whole, "d": "third.safetensors"}, "shard 'third.safetensors' is missing"),
        ({**whole, "d": "../up.safetensors"}, "shard '../up.safetensors' is missing"),
        ({"a": 1}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ):
        put_index(tmp_path, weight_map)
        with pytest.raises(SourceError, match=message):
            open_source(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"a":1,"a":2}', "duplicate"),
    ):
        index.write_text(text)
        with pytest.raises(SourceError, match=message):
            open_source(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(SourceError, match="more than one index"):
        open_source(tmp_path)


def test_equal_names(tmp_path):
    """The main file has its names; those of another say where they are from."""
    save(tmp_path / "model.safetensors", ["a"])
    save(tmp_path / "model.fp16.safetensors", ["a"])
    assert [t.name for t in open_source(tmp_path).tensors] == ["a", "model.fp16.safetensors::a"]


def test_patterns_of_files_in_folders(tmp_path):
    """Those of the first component of a pipeline, whose names say nothing of it, as those of the others."""
    for folder in ("text_encoder", "text_encoder_2"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "model.safetensors", ["a", "b"])
    second = ["text_encoder_2/model.safetensors::a", "text_encoder_2/model.safetensors::b"]

    def names(**how):
        return sorted(t.name for t in open_source(tmp_path, **how).tensors)

    assert names() == ["a", "b", *second]
    assert names(include=["text_encoder/*"]) == ["a", "b"] and names(exclude=["text_encoder/*"]) == second
    assert names(include=["text_encoder/*::b", second[0]]) == ["b", second[0]]
    tensors = open_source(tmp_path).tensors
    check_keep(tensors, ["text_encoder/*"])
    assert kept(replace(tensors[0], dtype="F32", shape=(1000, 1000)), ["text_encoder/*"]) == KEPT


def test_directories_without_safetensors(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SourceError, match="name the .gguf file"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(SourceError, match="pickled weights are refused"):
        open_source(tmp_path)


def test_bad_directory_entries(tmp_path):
    save(tmp_path / "model.safetensors", ["a"])
    link = tmp_path / "tokenizer.json"
    link.symlink_to(tmp_path / "nothing")
    with pytest.raises(SourceError, match="symbolic link to nothing"):
        open_source(tmp_path)
    link.unlink()
    os.mkfifo(tmp_path / "pipe")
    assert not open_source(tmp_path).attachments
    with open(os.fsencode(tmp_path) + b"/\xff", "wb"):
        pass
    with pytest.raises(SourceError, match="not UTF-8"):
        open_source(tmp_path)


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokens", ["a", "ü", "c"])
    writer.add_array("scores", [1.0, 2.0, 3.0])
    values = RNG.standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("plain", RNG.standard_normal((3, 5)).astype(np.float32))
    for name, kind in (("brain", "BF16"), ("quant", "Q8_0")):
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("half", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_against_its_reader(gguf_file):
    source = open_source(gguf_file)
    assert (source.kind, source.metadata) == ("gguf", {"gguf.alignment": "32"})
    found = by_name(source)
    assert (found["plain"].dtype, found["plain"].shape, found["plain"].extra) == ("F32", (3, 5), None)
    assert (found["brain"].dtype, found["brain"].shape, found["brain"].extra) == ("BF16", (4, 64), None)
    assert (found["half"].dtype, found["half"].shape) == ("F16", (5,))
    assert (found["quant"].dtype, found["quant"].shape) == ("U8", (4, 68))
    assert found["quant"].extra == {"gguf": {"type": "Q8_0", "shape": [4, 64]}}
    reader = gguf.GGUFReader(gguf_file)
    assert [t.name for t in source.tensors] == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        assert content(found[tensor.name]) == tensor.data.tobytes()
    (head,) = source.attachments
    assert head.name == "gguf.header"
    assert head.read() == gguf_file.read_bytes()[: reader.data_offset]


def test_gguf_by_content_and_selection(gguf_file):
    other = gguf_file.rename(gguf_file.with_suffix(".bin"))
    source = open_source(other, include=["q*"])
    assert [t.name for t in source.tensors] == ["quant"]
    assert [a.name for a in source.attachments] == ["gguf.header"]


def test_gguf_without_last_padding(gguf_file):
    reader = gguf.GGUFReader(gguf_file)
    end = reader.tensors[-1].data_offset + reader.tensors[-1].n_bytes
    raw = gguf_file.read_bytes()
    assert end < len(raw)
    gguf_file.write_bytes(raw[:end])
    assert len(open_source(gguf_file).tensors) == 4
    gguf_file.write_bytes(raw[:-1] + b"x")
    with pytest.raises(SourceError, match="padding is not zero"):
        open_source(gguf_file)
    gguf_file.write_bytes(raw + b"x")
    with pytest.raises(SourceError, match="1 bytes behind the last tensor"):
        open_source(gguf_file)


def test_gguf_cut_short(gguf_file):
    reader = gguf.GGUFReader(gguf_file)
    end = reader.tensors[-1].data_offset + reader.tensors[-1].n_bytes
    raw = gguf_file.read_bytes()
    for size in (*range(4, reader.data_offset), *range(reader.data_offset, end, 41), end - 1):
        gguf_file.write_bytes(raw[:size])
        with pytest.raises(SourceError):
            open_source(gguf_file)


def test_gguf_with_any_header_byte_wrong(gguf_file):
    """Whatever the damage: an error of ours, or tensors that lie inside the file. And no endless counting."""
    raw = gguf_file.read_bytes()
    for at in range(4, gguf.GGUFReader(gguf_file).data_offset):
        bad = bytearray(raw)
        bad[at] ^= 0xFF
        gguf_file.write_bytes(bad)
        try:
            source = open_source(gguf_file)
        except SourceError:
            continue
        assert all(t.data.offset + t.data.size <= len(raw) for t in source.tensors)


def test_gguf_misplaced_and_empty(tmp_path, gguf_file):
    raw = bytearray(gguf_file.read_bytes())
    (second,) = [t for t in gguf.GGUFReader(gguf_file).tensors if t.name == "brain"]
    at = second.field.offset + sum(p.nbytes for p in second.field.parts[:-1])
    raw[at : at + 8] = struct.pack("<Q", 0)
    gguf_file.write_bytes(raw)
    with pytest.raises(SourceError, match="'brain' is misplaced"):
        open_source(gguf_file)
    raw[at : at + 8] = struct.pack("<Q", (1 << 64) - 32)
    gguf_file.write_bytes(raw)
    with pytest.raises(SourceError):
        open_source(gguf_file)
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="holds no tensor"):
        open_source(tmp_path / "v.gguf")


def test_gguf_big_endian(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="big-endian"):
        open_source(tmp_path / "m.gguf")


def test_gguf_without_its_package(gguf_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install rac-codec\[gguf\]"):
        open_source(gguf_file)


# --- arrays --------------------------------------------------------------------------------------


def test_arrays():
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    nan = np.array([0x7FA00001], "<u4").view("<f4")  # signalling: a conversion by value would change it
    arrays = {
        "plain": base,
        "turned": base.T,
        "strided": base[::2, ::-1],
        "big": base.astype(">f4"),
        "nan": nan.byteswap().view(">f4"),
        "complex": np.array([1 + 2j], ">c8"),
        "scalar": np.array(5, ">i8"),
        "empty": np.zeros((0, 3), np.int16),
        "bool": np.array([True]),
        "bf": np.arange(3).astype(ml_dtypes.bfloat16),
        "e4": np.arange(3).astype(ml_dtypes.float8_e4m3fn),
        "e5": np.arange(3).astype(ml_dtypes.float8_e5m2),
        "e8": np.ones(3).astype(ml_dtypes.float8_e8m0fnu),
    }
    source = from_arrays(arrays, {"k": "v"})
    assert (source.kind, source.metadata, source.attachments) == ("memory", {"k": "v"}, ())
    found = by_name(source)
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert content(found[name]) == array.astype(array.dtype.newbyteorder("<")).tobytes()
    assert content(found["nan"]) == nan.tobytes()
    assert [found[n].dtype for n in ("bf", "e4", "e5", "e8")] == ["BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"]
    assert np.shares_memory(found["plain"].read(4, 8), base)
    assert found["plain"].read(4, 8).tobytes() == base.tobytes()[4:8]


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "grad": base.clone().requires_grad_(),
        "turned": base.T,
        "bf": base.bfloat16(),
        "e5": base.to(torch.float8_e5m2)[:, ::2],
        "scalar": torch.tensor(True),
        "empty": torch.empty(0, 2),
        "conj": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "neg": torch.tensor([1 + 2j], dtype=torch.complex64).conj().imag,
        "u16": torch.tensor([0, 1, 65535], dtype=torch.uint16),
    }
    found = by_name(from_arrays(tensors))
    for name in ("grad", "turned", "scalar", "empty", "u16"):
        assert content(found[name]) == tensors[name].detach().numpy().tobytes()
        assert found[name].shape == tuple(tensors[name].shape)
    assert content(found["bf"]) == np.arange(12).astype(ml_dtypes.bfloat16).tobytes()
    expected = np.arange(12).reshape(3, 4)[:, ::2].astype(ml_dtypes.float8_e5m2)
    assert (found["e5"].dtype, content(found["e5"])) == ("F8_E5M2", expected.tobytes())
    assert content(found["conj"]) == np.array([1 - 2j], np.complex64).tobytes()
    assert content(found["neg"]) == np.array([-2], np.float32).tobytes()


def test_ties():
    base = np.arange(6, dtype=np.float32)
    torch = pytest.importorskip("torch")
    weight = torch.ones(2, 3)
    complex_ = torch.tensor([1 + 2j], dtype=torch.complex64)
    empty = np.zeros(0)
    found = by_name(
        from_arrays(
            {
                "a": base,
                "b": base[:],
                "copy": base.copy(),
                "shape": base.reshape(2, 3),
                "dtype": base.view("i4"),
                "e1": empty,
                "e2": empty,
                "t1": weight,
                "t2": torch.nn.Parameter(weight),
                "t3": weight.T,
                "c": complex_,
                "conj": complex_.conj(),
                "list1": [1.0],
                "list2": [1.0],
            }
        )
    )
    ties = {name: t.tie for name, t in found.items() if t.tie is not None}
    assert ties.keys() == {"a", "b", "t1", "t2"}
    assert ties["a"] == ties["b"] != ties["t1"] == ties["t2"]


def test_a_mapping_that_makes_its_values_ties_nothing():
    class Lazy(dict):
        def items(self):
            return ((k, np.full(1000, v, ">f4")) for k, v in super().items())

    found = from_arrays(Lazy(a=1, b=2, c=3)).tensors
    assert [t.tie for t in found] == [None] * 3


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a"]),
        np.array([None]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(1, np.complex128),
        np.zeros(1, ml_dtypes.float4_e2m1fn),
        [[1], [1, 2]],
    ],
    ids=str,
)
def test_arrays_that_are_refused(value):
    with pytest.raises(SourceError, match="tensor 'a' cannot be packed"):
        from_arrays({"a": value})


def test_torch_tensors_that_are_refused():
    torch = pytest.importorskip("torch")
    for value in (
        torch.empty(2, device="meta"),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, dtype=torch.complex128),
        torch.ones((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    ):
        with pytest.raises(SourceError, match="tensor 'a' cannot be packed"):
            from_arrays({"a": value})


@pytest.mark.parametrize("name", ["\ud800", 3])
def test_names_that_are_refused(name):
    with pytest.raises(SourceError, match="cannot be packed"):
        from_arrays({name: np.zeros(1)})


def test_nothing_heavy_is_imported():
    code = (
        "import sys, numpy, rac.encode.sources as s; s.from_arrays({'a': numpy.zeros(2)});"
        "sys.exit(bool({'torch', 'gguf', 'safetensors'} & sys.modules.keys()))"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


def test_public_names():
    assert all(hasattr(sources, name) for name in sources.__all__)
    assert Extent("x", 1, 2).size == 2
