"""`rac.safe_open`, and errors that are safetensors' errors as well."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

import rac
from rac import errors
from rac.decode.archive import RacFile
from support import environment

W = np.arange(40, dtype=np.float32).reshape(10, 4)


@pytest.fixture
def path(tmp_path):
    rac.save_file({"w": W, "b": np.arange(3, dtype=np.int8)}, tmp_path / "m.rac", {"k": "v"})
    return tmp_path / "m.rac"


@pytest.mark.parametrize("framework", ["np", "numpy", "pt", "torch", "pytorch"])
def test_it_answers_as_theirs_does(path, framework):
    with rac.safe_open(path, framework, device="cpu", backend="pread") as f:
        assert f.keys() == ["b", "w"]  # sorted
        assert f.offset_keys() == ["w", "b"] == list(f.get_tensors())
        assert f.metadata() == {"k": "v"}
        assert (np.asarray(f.get_tensor("w")) == W).all()
        part = f.get_slice("w")
        assert (part.get_shape(), part.get_dtype()) == ([10, 4], "F32")
        assert (np.asarray(part[1:20]) == W[1:20]).all()
        assert type(part[0]).__module__ == ("numpy" if framework.startswith("n") else "torch")


def test_no_metadata_is_none(path):
    rac.save_file({"w": W}, path)
    assert rac.safe_open(path, "np").metadata() is None


def test_other_things_that_can_be_opened(path):
    data = path.read_bytes()
    for given in (str(path), data, io.BytesIO(data)):
        with rac.safe_open(given, "np") as f:
            assert f.offset_keys() == ["w", "b"]


def test_nothing_is_answered_after_the_close(path):
    with rac.safe_open(path, "np") as f:
        part = f.get_slice("w")
    for ask in (f.keys, f.offset_keys, f.metadata, f.get_tensors, lambda: f.get_tensor("w"), lambda: f.get_slice("w")):
        with pytest.raises(rac.SourceError, match="is closed"):
            ask()
    with pytest.raises(rac.SourceError, match="closed"):
        part[0]
    f.close()


def test_arguments_that_are_refused(path):
    for kwargs, match in (
        ({"framework": "tf"}, "'tf'"),
        ({"framework": "np", "backend": "paper"}, "'paper'"),
        ({"framework": "np", "device": "cuda"}, "CPU"),
        ({"framework": "pt", "device": "nowhere"}, "nowhere"),
        ({"framework": "pt", "device": None, "backend": "no"}, "backend"),
    ):
        with pytest.raises(ValueError, match=match):
            rac.safe_open(path, **kwargs)


def test_a_missing_file(tmp_path):
    for ask in (lambda p: rac.safe_open(p, "np"), rac.load_file, lambda p: rac.pack(p, tmp_path / "out.rac")):
        with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*none") as e:
            ask(str(tmp_path / "none"))
        assert isinstance(e.value, rac.SourceError)
        assert e.value.errno == 2 and e.value.filename.endswith("none")


KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, rac.RacError)]


def made(kind):
    return kind({"w": rac.FormatError("is damaged")}) if kind is rac.DamagedError else kind("what", file="where")


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_of_both_trees(kind):
    """And are pickled, as worker processes do, as the class that they are an error of."""
    theirs = pytest.importorskip("safetensors").SafetensorError
    e = made(kind)
    assert isinstance(e, kind) and isinstance(e, theirs)
    again = pickle.loads(pickle.dumps(e))
    assert type(again) is type(e) and str(again) == str(e) and again.file == e.file
    assert (type(e).__name__, type(e).__module__) == (kind.__name__, "rac.errors")


def test_safetensors_catches_them(path):
    theirs = pytest.importorskip("safetensors").SafetensorError
    with pytest.raises(theirs), RacFile(path) as f:
        f.get_tensor("none")
    data = path.read_bytes()
    with pytest.raises(theirs):
        rac.load(data[:-1])


def test_without_safetensors_they_are_of_one():
    code = """
import sys, rac
try:
    rac.load(b"")
except rac.RacError as e:
    assert type(e) is rac.TruncatedError, type(e)
assert not {"safetensors", "torch"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
