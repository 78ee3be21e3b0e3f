"""A new stage costs a row in each table: toys go through every flow, and nothing but the tables is touched."""

from __future__ import annotations

import io

import numpy as np
import pytest

import rac
from rac.cli import main
from rac.encode.pack import pack_source
from rac.encode.sources import from_arrays, open_source
from rac.stages.table import CODERS, NUMBERS
from support import toy


@pytest.fixture(autouse=True)
def tables():
    with toy.installed():
        yield


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((300, 200)).astype(np.float32),
        "v": rng.standard_normal((64, 150)).astype(np.float32),
        "n": np.arange(7, dtype=np.int64),
        "none": np.zeros((0, 3), np.float32),
    }


@pytest.fixture
def packed(arrays, tmp_path):
    """(archive, what it restores): "w" by both toys, the others by the coder."""
    path = tmp_path / "toy.rac"
    source = from_arrays(arrays, None)
    summary = pack_source(source, path, quantiser=toy.BySteps(frozenset({"w"})), slices="fine")
    assert summary.quantised == 1
    step = np.exp2(np.ceil(np.log2(np.abs(arrays["w"]).max(1) / 127)))[:, None].astype(np.float32)
    return path, arrays | {"w": np.rint(arrays["w"] / step) * step + np.float32(0)}  # there is no -0


def test_the_stages_are_in_the_file(packed, capsys):
    path, _ = packed
    assert main(["info", "--tensors", str(path)]) == 0
    out = capsys.readouterr().out
    assert "masked/1" in out and "steps/1" in out and "steps" in out


def test_load_and_stream(packed):
    path, dense = packed
    found = rac.load_file(path)
    streamed = dict(rac.stream(io.BytesIO(path.read_bytes())))
    assert found.keys() == streamed.keys() == dense.keys()
    for name, array in dense.items():
        assert found[name].tobytes() == streamed[name].tobytes() == array.tobytes()


def test_slices(packed):
    path, dense = packed
    with rac.open(path) as f:
        for name, key in (("w", np.s_[17:203, 31:]), ("v", np.s_[5, :]), ("w", np.s_[299:, 150:151])):
            assert (f.get_slice(name)[key] == dense[name][key]).all()


def test_verify_and_unpack(packed, arrays, tmp_path):
    path, dense = packed
    rac.save_file(arrays, tmp_path / "lossless.rac")
    assert rac.verify(path).tensors == len(dense)
    rac.unpack(path, tmp_path / "out.safetensors")
    for t in open_source(tmp_path / "out.safetensors").tensors:
        assert t.read(0, t.nbytes).tobytes() == dense[t.name].tobytes()


def test_resume(arrays, tmp_path):
    """What an interrupted pack left is read by the stages of its records."""
    path, quantiser = tmp_path / "r.rac", toy.BySteps(frozenset({"w", "v"}))
    pack_source(from_arrays(arrays, None), path, quantiser=quantiser)
    whole = path.read_bytes()

    def stop(_):
        raise KeyboardInterrupt

    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        pack_source(from_arrays(arrays, None), path, quantiser=quantiser, layer=stop)
    assert not path.exists()
    summary = pack_source(from_arrays(arrays, None), path, quantiser=quantiser, resume=True)
    assert summary.resumed and path.read_bytes() == whole


def test_resident(packed):
    """A layer keeps the record and decodes it when it runs."""
    torch = pytest.importorskip("torch")
    from rac.runtime import record
    from rac.stages.table import is_resident

    path, dense = packed
    assert is_resident("masked/1") and is_resident("steps/1")
    with rac.open(path) as f:
        (archive,) = f.archives
        entry = next(e for e in archive.index.entries if e.name == "w")
        data = record.collect(archive, entry)
    stored = record.parse(data)
    out = np.empty(stored.shape, "<u4")
    for _ in range(2):
        out[...] = 0
        record.decode(stored, data, out)
        assert torch.equal(torch.from_numpy(out.view(np.float32)), torch.from_numpy(dense["w"]))


def test_a_gpu_without_a_kernel_refuses(packed):
    from rac.gpu.stages import require
    from rac.stages.base import Chain

    for chain in (Chain(toy.Masked()), Chain(CODERS["raw/1"](), toy.Steps(3))):
        with pytest.raises(rac.UnsupportedError, match="no kernel"):
            require(chain)


def test_damage_is_found(packed):
    path, _ = packed
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with pytest.raises(rac.RacError):
        rac.load(bytes(data))


def test_without_the_rows_the_file_is_not_known(packed, monkeypatch):
    path, _ = packed
    monkeypatch.delitem(NUMBERS, "steps/1")
    with pytest.raises(rac.UnsupportedError, match="steps/1"):
        rac.load_file(path)
    monkeypatch.delitem(CODERS, "masked/1")
    with pytest.raises(rac.UnsupportedError, match="masked/1"):
        rac.load_file(path)
