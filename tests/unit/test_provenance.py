"""What the header says of its making: which keys decide what, and what a malformed one does (RAC-PRV)."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

import rac
from rac.cli import main
from rac.cli.running import simulation
from rac.decode.unpack import GGUF_HEADER
from rac.encode.pack import pack_source
from rac.encode.sources import Attachment, Source, from_arrays, open_source
from rac.provenance import Provenance
from rac.study.compare import compare

W = np.random.default_rng(0).standard_normal((160, 128)).astype(np.float32)
MALFORMED = {
    "source": 5,
    "include": "a*",
    "exclude": [1],
    "gguf_order": ["w"],
    "frames": "m.npz",
    "dequantised": "fp8",
    "transforms": "quarot",
    "keys": -1,
    "online": "many",
    "bits_scale": "fine",
    "pieces": {"w.bin": 0},
    "hub": {"repository": "org/model", "revision": "main"},
    "sha256": {"model.safetensors": "0"},
}
REQUEST = {"bits": 4.0, "effort": "fast"}


def archive(path, kind="safetensors", **settings):
    """An archive whose provenance has these keys, whatever they are."""
    files = (Attachment(GGUF_HEADER, b"GGUF"),) if kind == "gguf" else ()
    source = from_arrays({"w": W, "v": W[0]})
    pack_source(Source(kind, source.tensors, files, {}), path, settings=settings, force=True)
    return path


@pytest.fixture
def dense(tmp_path):
    pytest.importorskip("safetensors.numpy").save_file({"w": W, "v": W[0]}, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def info(path, dense, tmp_path):
    """`rac info` says FormatError in one line and code 1."""
    if main(["info", str(path)]) == 1:
        raise rac.FormatError("provenance: 'online' is malformed")


def resume(path, dense, tmp_path):
    """The same request as that of a part whose scale cannot be read."""
    rac.pack(dense, tmp_path / "whole.rac", **REQUEST)
    with rac.open(tmp_path / "whole.rac") as f:
        about = dict(f.archives[0].header["provenance"])
    archive(path, **about | {"bits_scale": MALFORMED["bits_scale"]}).rename(tmp_path / "n.rac.part")
    rac.pack(dense, tmp_path / "n.rac", resume=True, **REQUEST)


def cache(path, dense, tmp_path):
    pytest.importorskip("torch")
    args = argparse.Namespace(activations=None, kv=4, clip=None, activation_grid="symmetric")
    with rac.open(path) as f:
        simulation(args, None, Provenance.of(f.archives[0].header, path))


ACTS = {
    "source": lambda path, dense, tmp_path: rac.unpack(path, tmp_path / "out"),
    "include": lambda path, dense, tmp_path: rac.verify(path, dense),
    "exclude": lambda path, dense, tmp_path: rac.unpack(path, tmp_path / "out.gguf"),
    "gguf_order": lambda path, dense, tmp_path: rac.unpack(path, tmp_path / "out.gguf"),
    "frames": lambda path, dense, tmp_path: rac.unpack(path, tmp_path / "out"),
    "dequantised": lambda path, dense, tmp_path: rac.verify(path, dense),
    "transforms": lambda path, dense, tmp_path: list(compare(dense, [path])),
    "keys": cache,
    "online": info,
    "bits_scale": resume,
    "pieces": lambda path, dense, tmp_path: rac.unpack(path, tmp_path / "out"),
    "hub": lambda path, dense, tmp_path: rac.verify(path, hub=True),
    "sha256": lambda path, dense, tmp_path: rac.verify(path),
}


@pytest.mark.parametrize("key", sorted(MALFORMED))
def test_malformed(key, dense, tmp_path):
    """Who acts on a key checks it first; who does not act on it does not mind."""
    kind = "gguf" if key in ("gguf_order", "exclude") else "safetensors"
    with pytest.raises(rac.FormatError, match=f"provenance: '{key}' is malformed"):
        ACTS[key](archive(tmp_path / "m.rac", kind, **{key: MALFORMED[key]}), dense, tmp_path)
    others = {k: v for k, v in MALFORMED.items() if k not in (key, "pieces", "frames")}  # unpack acts on those too
    if key in ("source", "transforms"):
        ACTS[key](archive(tmp_path / "o.rac", kind, **others), dense, tmp_path)


def test_reading_does_not_depend_on_it(tmp_path):
    path = archive(tmp_path / "m.rac", **{k: v for k, v in MALFORMED.items() if k != "sha256"})  # verify acts on that
    assert rac.load_file(path)["w"].tobytes() == W.tobytes()
    assert dict(rac.iter_tensors(path)).keys() == {"w", "v"}
    assert rac.verify(path).tensors == 2


def test_other_keys_decide_nothing(tmp_path, capsys):
    """Not even those that this tool writes beside the ones of the table."""
    odd = {"level": 1, "lossless": "no", "tool": [], "lanes": "x", "slices": {}, "entropy": None, "goal": -1}
    files = []
    for name, settings in (("odd", odd), ("plain", {})):
        path = archive(tmp_path / f"{name}.rac", **settings)
        (out,) = rac.unpack(path, tmp_path / name)
        files.append(Path(out).read_bytes())
        assert main(["info", str(path)]) == 0
        assert rac.verify(path).lossy == 0
    capsys.readouterr()
    assert files[0] == files[1]


@pytest.mark.parametrize(("key", "value"), [("source", "hf"), ("include", ["w"]), ("keys", 7), ("transforms", ["r"])])
def test_well_formed(key, value, tmp_path):
    with rac.open(archive(tmp_path / "m.rac", **{key: value})) as f:
        found = Provenance.of(f.archives[0].header)
    want = {"source": "hf", "include": ("w",), "keys": 7, "transforms": True}[key]
    assert getattr(found, "transformed" if key == "transforms" else key) == want
    assert found.whole == (key != "include")


def test_patterns_of_a_pack_are_applied_when_it_is_verified(dense, tmp_path):
    rac.pack(dense, tmp_path / "m.rac", include=["w"])
    assert rac.verify(tmp_path / "m.rac", dense).tensors == 1
    assert {t.name for t in open_source(dense).tensors} == {"w", "v"}
