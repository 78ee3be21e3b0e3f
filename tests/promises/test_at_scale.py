"""Small twins of what tools/at_scale.py runs at the real size: large tensors, many tensors, many files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import rac
from rac.container import writer
from rac.decode import slices, unpack
from rac.encode import record, schedule
from rac.encode.code import lanes, plan
from support.memory import peak

MB = 1_000_000


@pytest.fixture
def large_from_2_mb(monkeypatch):
    """The sizes from which on tensors are large, and of the pieces that they are worked on in, a hundredth."""
    for module in (lanes, schedule, unpack):
        monkeypatch.setattr(module, "LARGE", 2 * MB)
    for module, name in ((lanes, "CHUNK"), (plan, "CHUNK"), (record, "PIECE"), (writer, "AT_ONCE"), (slices, "BAND")):
        monkeypatch.setattr(module, name, 1 << 17)
    monkeypatch.setattr(plan, "HELD", 1 << 18)
    monkeypatch.setattr(schedule, "WINDOW", MB)


def model(folder, shards: dict[str, dict[str, np.ndarray]]) -> dict[str, str]:
    """A model folder of BF16 words; the SHA-256 of its files."""
    folder.mkdir()
    for file, tensors in shards.items():
        head, at = {}, 0
        for name, words in tensors.items():
            head[name] = {"dtype": "BF16", "shape": list(words.shape), "data_offsets": [at, at + words.nbytes]}
            at += words.nbytes
        text = json.dumps(head).encode()
        data = b"".join(words.tobytes() for words in tensors.values())
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    where = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return digests(folder)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def weights(seed, *shape):
    """BF16 words of weights whose rows differ in scale."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32) * np.exp(rng.standard_normal((shape[0], 1))).astype(np.float32)
    return (w.view(np.uint32) >> 16).astype("<u2")


KINDS = {"wide": (600, 2000), "narrow": (18000, 60), "flat": (1_050_001,)}


@pytest.mark.parametrize("level", ["default", "max", "fast"])
def test_a_large_tensor_is_the_same_bytes_in_pieces(tmp_path, request, level):
    """Whether its symbols and units are held or not; and back again, in bands."""
    tensors = {name: weights(len(name), *(shape if len(shape) > 1 else (1, *shape))) for name, shape in KINDS.items()}
    tensors["flat"] = tensors["flat"].reshape(-1)
    tensors["again"] = tensors["wide"].copy()  # an alias: one record, two places
    want = model(tmp_path / "m", {"model.safetensors": tensors})
    rac.pack(tmp_path / "m", tmp_path / "held.rac", level=level)
    request.getfixturevalue("large_from_2_mb")
    rac.pack(tmp_path / "m", tmp_path / "m.rac", level=level, jobs=3)
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "held.rac").read_bytes()
    rac.unpack(tmp_path / "m.rac", tmp_path / "out", threads=3)
    assert digests(tmp_path / "out") == want
    assert {p.name for p in tmp_path.iterdir()} == {"m", "m.rac", "held.rac", "out"}


def test_memory_does_not_grow_with_a_tensor(tmp_path, large_from_2_mb, monkeypatch):
    monkeypatch.setitem(plan.LEVELS, "default", replace(plan.LEVELS["default"], tile=1 << 15))
    sizes = {}
    for rows in (2_000, 12_000):
        folder = tmp_path / f"{rows}"
        model(folder, {"model.safetensors": {"w": weights(1, rows, 1000)}})
        sizes[rows] = [peak(lambda folder=folder: rac.pack(folder, f"{folder}.rac", jobs=2))]
        sizes[rows].append(peak(lambda folder=folder: rac.unpack(f"{folder}.rac", f"{folder}.out", threads=2)))
        assert digests(folder) == digests(tmp_path / f"{rows}.out")
    for small, large in zip(*sizes.values(), strict=True):  # 4 MB and 24 MB
        assert large < small + 5 * MB


def test_damage_in_a_large_tensor_is_found_in_bands(tmp_path, large_from_2_mb):
    model(tmp_path / "m", {"model.safetensors": {"w": weights(1, 2000, 1000)}})
    rac.pack(tmp_path / "m", tmp_path / "m.rac")
    data = bytearray((tmp_path / "m.rac").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m.rac").write_bytes(data)
    with pytest.raises(rac.RacError, match="'w' unit"):
        rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert not (tmp_path / "out").exists()


FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
import rac
rac.pack(sys.argv[1], sys.argv[2])
rac.verify(sys.argv[2], sys.argv[1])
rac.unpack(sys.argv[2], sys.argv[3])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of open files")
def test_more_files_than_may_be_open(tmp_path):
    """Shards of a source, read and written: 300 where a process may have 100 files open."""
    shards = {f"model-{i:05d}-of-00300.safetensors": {f"{i}.w": weights(i, 4, 40)} for i in range(300)}
    want = model(tmp_path / "m", shards)
    run = [sys.executable, "-c", FEW, *(str(tmp_path / name) for name in ("m", "m.rac", "out"))]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert digests(tmp_path / "out") == want


def test_each_tensor_costs_the_same_however_many_there_are(tmp_path, monkeypatch):
    """Packing and loading 4 times as many tensors reads 4 times as often, not 16 times."""
    reads = {}
    for n in (250, 1000):
        tensors = {f"{i}.b": weights(i, 1, 16 + i % 7).reshape(-1) for i in range(n)}
        folder, archive = tmp_path / f"{n}", tmp_path / f"{n}.rac"
        model(folder, {"model.safetensors": tensors})
        calls = [0]

        def count(frame, event, argument, calls=calls):
            calls[0] += 1

        sys.setprofile(count)
        try:
            rac.pack(folder, archive, jobs=1)
            rac.load_file(archive, threads=1)
        finally:
            sys.setprofile(None)
        reads[n] = calls[0]
    assert reads[1000] < 4.5 * reads[250]
