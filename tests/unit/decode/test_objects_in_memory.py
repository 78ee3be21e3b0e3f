"""Archives and sources that are no paths: bytes, mapped files, file objects, pipes; open or closed."""

from __future__ import annotations

import io
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

import rac
from support import environment

W = np.random.default_rng(4).standard_normal((300, 200)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("memory") / "m.rac"
    rac.save_file({"w": W}, out)
    return out


def kinds(path):
    """The archive as each kind of object."""
    data = path.read_bytes()
    with open(path, "rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    return [data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8), io.BytesIO(data), mapped]


def test_bytes_maps_and_file_objects(path, tmp_path):
    for i, source in enumerate([*kinds(path), open(path, "rb")]):  # noqa: SIM115
        with rac.open(source) as f:
            assert (f.get_tensor("w") == W).all()
        assert (rac.load(source)["w"] == W).all()
        if hasattr(source, "seek"):
            source.seek(0)
        assert rac.verify(source).tensors == 1
        assert rac.unpack(source, tmp_path / f"{i}.safetensors")
        if hasattr(source, "seek"):
            source.seek(0)
        assert (dict(rac.stream(source))["w"] == W).all()
        if hasattr(source, "close"):
            source.close()


def test_what_is_closed_is_said_to_be(path):
    for source in [io.BytesIO(path.read_bytes()), open(path, "rb"), kinds(path)[-1]]:  # noqa: SIM115
        source.close()
        for read in (rac.open, rac.load, rac.verify, lambda s: list(rac.stream(s)), rac.load_file):
            with pytest.raises(rac.SourceError, match="closed"):
                read(source)
    f = rac.open(path)
    f.close()
    with pytest.raises(rac.SourceError, match="closed"):
        f.get_tensor("w")


def test_what_is_no_archive(path):
    with pytest.raises(rac.SourceError, match="a path is for load_file"):
        rac.load(str(path))
    with pytest.raises(rac.SourceError, match="binary mode"):
        list(rac.stream(io.StringIO("text")))
    with pytest.raises(rac.SourceError, match="cannot seek"):
        rac.open(5)


def test_sources_in_memory(tmp_path):
    data = pytest.importorskip("safetensors.numpy").save({"w": W}, {"k": "v"})
    for source in (data, io.BytesIO(data), memoryview(data)):
        rac.pack(source, tmp_path / "m.rac", force=True)
        rac.unpack(tmp_path / "m.rac", tmp_path / "m.safetensors", force=True)
        assert (tmp_path / "m.safetensors").read_bytes() == data
        assert rac.verify(tmp_path / "m.rac", against=data).tensors == 1
    rac.pack(data, tmp_path / "lossy.rac", bits=4)
    with pytest.raises(rac.SourceError, match="name its folder"):
        rac.pack(data, tmp_path / "text.rac", bits=4, calibrate="text.txt")
    for bad, why in ((b"", "shorter than 8"), (b"GGUF1234", "safetensors file can"), (5, "cannot seek")):
        with pytest.raises(rac.SourceError, match=why):
            rac.pack(bad, tmp_path / "bad.rac")
    assert not list(tmp_path.glob("bad*"))


def test_outputs_in_memory(tmp_path):
    data = pytest.importorskip("safetensors.numpy").save({"w": W})
    out, named = io.BytesIO(), tmp_path / "m.rac"
    rac.pack(io.BytesIO(data), out)
    rac.pack(data, named)
    assert out.getvalue() == named.read_bytes()
    with open(named, "wb") as f:
        rac.save_file({"w": W}, f)
    assert (rac.load_file(named)["w"] == W).all()
    with pytest.raises(ValueError, match="without resume and shard_size"):
        rac.pack(data, out, shard_size=1000)
    out.close()
    with pytest.raises(rac.OutputError, match="closed"):
        rac.pack(data, out)


def rac_(*words, given):
    return subprocess.run(
        [sys.executable, "-m", "rac.cli", *map(str, words)], input=given, capture_output=True, env=environment()
    )


def test_pipes(path, tmp_path):
    data = path.read_bytes()
    assert rac_("unpack", "-", "-o", tmp_path / "out", given=data).returncode == 0
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["model.safetensors"]
    done = rac_("load", "-", given=data)
    assert done.returncode == 0 and b"1 tensors" in done.stdout
    for given, why in ((data[:-9], b"cut off"), (b"y\n" * 99, b"wrong magic"), (b"", b"prelude")):
        done = rac_("unpack", "-", "-o", tmp_path / "cut", given=given)
        assert done.returncode == 1 and why in done.stderr and b"Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["out"]
