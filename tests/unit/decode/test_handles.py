"""Open files: closed when nobody refers to them, opened again by those who get a copy."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import threading

import numpy as np
import pytest

import rac
from rac.errors import SourceError
from support.servers import Server

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors by /proc")


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": rng.standard_normal((300, 40)).astype(np.float32) for i in range(3)}
    rac.save_file(tensors, tmp_path / "m.rac")
    return tmp_path / "m.rac"


def held():
    return len(os.listdir("/proc/self/fd")), threading.active_count()


USES = {
    "tensor": lambda p: rac.open(p).get_tensor("w0"),
    "slice": lambda p: rac.open(p).get_slice("w0")[1:3],
    "stream": lambda p: next(rac.stream(p)),
    "pipe": lambda p: next(rac.stream(open(p, "rb", buffering=0))),  # noqa: SIM115
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the file object
@pytest.mark.parametrize("use", USES)
def test_what_nobody_refers_to_is_closed(path, use):
    gc.collect()
    gc.disable()  # references alone must do
    try:
        before = held()
        for _ in range(5):
            USES[use](path)
        assert all(now <= was for now, was in zip(held(), before, strict=True))  # others' may end meanwhile
    finally:
        gc.enable()


def test_shards(path, tmp_path):
    from rac.container import shards
    from rac.decode.archive import open_archives

    shards.shard(open_archives(path), str(tmp_path / "s"), 1)
    before = held()
    for _ in range(3):
        rac.open(tmp_path / "s").get_tensor("w1")
    assert all(now <= was for now, was in zip(held(), before, strict=True))


def test_a_slice_outlives_its_file_and_says_when_that_was_closed(path):
    f = rac.open(path)
    part, whole = f.get_slice("w1"), f.get_tensor("w1")
    del f
    assert np.array_equal(part[5:7], whole[5:7])
    with rac.open(path) as f:
        part = f.get_slice("w1")
    other = os.open(os.devnull, os.O_RDONLY)  # may get the number that is free
    with pytest.raises(SourceError, match="closed"):
        part[5:7]
    os.close(other)


COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("by", COPIES)
def test_copies_open_the_file_again(path, by, monkeypatch):
    monkeypatch.chdir(path.parent)
    f = rac.open("m.rac")
    whole = f.get_tensor("w1")
    monkeypatch.chdir("/")
    g, part = COPIES[by]((f, f.get_slice("w1")))
    f.close()
    assert np.array_equal(g.get_tensor("w1"), whole) and np.array_equal(part[5:7], whole[5:7])
    assert part._archive is g.archives[0]
    with pytest.raises(SourceError, match="closed"):
        COPIES[by](f)


@pytest.mark.parametrize("by", COPIES)
def test_copies_of_what_has_no_path(path, by):
    f = rac.open(path.read_bytes())
    assert np.array_equal(COPIES[by](f).get_tensor("w2"), f.get_tensor("w2"))
    with open(path, "rb") as source, pytest.raises(SourceError, match="file object"):
        COPIES[by](rac.open(source))


def test_another_file_in_its_place_is_noticed(path):
    data = pickle.dumps(rac.open(path))
    rac.save_file({"w0": np.zeros((300, 40), np.float32)}, path)
    with pytest.raises(SourceError, match="has changed since"):
        pickle.loads(data)


def _read(f, out):
    out.put(f.get_tensor("w1").sum())


@pytest.mark.parametrize("where", ["file", "url"])
@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_other_processes(path, method, where):
    if where == "url":
        pytest.importorskip("aiohttp")
    with Server({"m.rac": path.read_bytes()}) as server:
        f = rac.open(path if where == "file" else server.url("m.rac"))
        context = multiprocessing.get_context(method)
        out = context.Queue()
        process = context.Process(target=_read, args=(f, out))
        process.start()
        try:
            assert out.get(timeout=60) == f.get_tensor("w1").sum()
        finally:
            process.join(20)
            process.kill()
        f.close()
