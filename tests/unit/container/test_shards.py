"""Archives to shards and back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import rac
from rac.container import shards
from rac.container.access import BytesAccess
from rac.container.reader import Archive
from rac.decode.archive import open_archives
from rac.encode.pack import pack_source
from rac.encode.sources import Attachment, Source, from_arrays

GOLDEN = Path(__file__).parents[3] / "format_spec" / "golden" / "good"
rng = np.random.default_rng(2)
A = {f"t{i}": (rng.standard_normal((100 + 40 * i, 300)) * 0.1).astype(np.float32) for i in range(8)}
A |= {"tied": A["t2"], "same": A["t3"].copy(), "empty": np.zeros((0, 4), np.float32)}


@pytest.fixture
def path(tmp_path):
    files = (Attachment("config.json", b"{}"), Attachment("tokenizer.json", rng.bytes(5000)))
    pack_source(Source("hf", from_arrays(A).tensors, files, {"step": "7"}), tmp_path / "m.rac")
    return tmp_path / "m.rac"


def cut(path, folder, size, **kwargs):
    archives = open_archives(path)
    try:
        return shards.shard(archives, str(folder), size, **kwargs)
    finally:
        for a in archives:
            a.close()


def join(folder, path, **kwargs):
    archives = open_archives(folder)
    try:
        shards.merge(archives, str(path), **kwargs)
    finally:
        for a in archives:
            a.close()


def records(path):
    """Bytes of each record by type and name."""
    data = path.read_bytes()
    return {(e.type, e.name): data[e.at : e.at + e.size] for e in Archive(BytesAccess(data)).index.entries}


@pytest.mark.parametrize("size", [1, 100_000, 300_000, 1 << 40])
def test_there_and_back(path, tmp_path, size):
    paths = cut(path, tmp_path / "out", size)
    whole = records(path)
    found = {}
    for p in map(Path, paths):
        mine = records(p)
        assert not mine.keys() & found.keys()
        found |= mine
        assert p.stat().st_size <= size or len([k for k in mine if k[0] == 1]) <= 1
        with pytest.raises(rac.OutputError, match="exists already"):
            cut(path, tmp_path / "out", size)
    assert found == whole
    got = rac.load_file(tmp_path / "out")
    assert list(got) == list(rac.load_file(path))
    assert all((got[n] == t).all() for n, t in A.items())
    assert got["tied"] is got["t2"] and got["same"] is not got["t3"]
    with rac.open(paths[-1]) as f:
        assert f.metadata() == {"step": "7"}
        assert f.attachments() == ["config.json", "tokenizer.json"]
    for p in paths:
        rac.verify(p)
    join(tmp_path / "out", tmp_path / "back.rac")
    assert (tmp_path / "back.rac").read_bytes() == path.read_bytes()


def test_a_set_is_cut_anew(path, tmp_path):
    cut(path, tmp_path / "one", 150_000)
    names = cut(tmp_path / "one", tmp_path / "two", 400_000)
    assert 1 < len(names) < len(os.listdir(tmp_path / "one"))
    assert [os.path.basename(n) for n in names] == [
        f"m-{k:05d}-of-{len(names):05d}.rac" for k in range(1, len(names) + 1)
    ]
    join(tmp_path / "two", tmp_path / "back.rac")
    assert (tmp_path / "back.rac").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["basis", "objects", "lowrank", "ancillary", "names", "empty", "order"])
def test_objects_go_where_they_are_used(tmp_path, name):
    """One object for several tensors: in each shard that needs it, and once again when they are joined."""
    data = (GOLDEN / f"{name}.rac").read_bytes()
    (tmp_path / "m.rac").write_bytes(data)
    archive = Archive(BytesAccess(data))
    paths = cut(tmp_path / "m.rac", tmp_path / "out", 1)
    for p in paths:
        a = Archive(BytesAccess(Path(p).read_bytes()))
        uses = {n for e in a.index.entries if e.type == 1 for n in a.record(e).head.get("uses", [])}
        assert uses <= a.objects.keys()
        rac.verify(p)
    want, got = rac.load(data), rac.load_file(tmp_path / "out")
    assert {n: t.tobytes() for n, t in got.items()} == {n: t.tobytes() for n, t in want.items()}
    join(tmp_path / "out", tmp_path / "back.rac")
    back = rac.load_file(tmp_path / "back.rac")
    assert {n: t.tobytes() for n, t in back.items()} == {n: t.tobytes() for n, t in want.items()}
    entries = Archive(BytesAccess((tmp_path / "back.rac").read_bytes())).index.entries
    assert len([e for e in entries if e.type == 3]) == len(archive.objects)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_nothing(path, tmp_path, monkeypatch, at, error):
    calls = []

    def interrupted(name, size):
        calls.append(name)
        if len(calls) > at:
            raise error

    with pytest.raises(error):
        cut(path, tmp_path / "out", 150_000, progress=interrupted)
    assert not (tmp_path / "out").exists()
    cut(path, tmp_path / "out", 150_000)
    calls.clear()
    with pytest.raises(error):
        join(tmp_path / "out", tmp_path / "back.rac", progress=interrupted)
    assert sorted(os.listdir(tmp_path)) == ["m.rac", "out"]


def test_damage_is_not_copied(path, tmp_path):
    data = bytearray(path.read_bytes())
    archive = Archive(BytesAccess(bytes(data)))
    (entry,) = (e for e in archive.index.entries if e.name == "t5")
    data[archive.record(entry).payload + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(rac.ChecksumError, match="'t5'"):
        cut(path, tmp_path / "out", 150_000)
    assert not (tmp_path / "out").exists()
