"""Files behind a URL."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import rac
from rac.cli import main
from rac.container import remote
from rac.container.remote import open_url

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from support.servers import Server

rng = np.random.default_rng(5)
TENSORS = {f"layer {i}": rng.standard_normal((300, 700)).astype(np.float32) for i in range(12)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("remote") / "m.rac"
    rac.save_file(TENSORS, path, {"k": "v"})
    return path.read_bytes()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.001)


def equal(got):
    return got.keys() == TENSORS.keys() and all((got[n] == t).all() for n, t in TENSORS.items())


def test_all_ways_to_read(data):
    with Server({"m.rac": data}) as server:
        url = server.url("m.rac")
        assert equal(rac.load_file(url))
        assert equal(dict(rac.stream(url)))
        with rac.open(url) as f:
            assert f.metadata() == {"k": "v"}
            assert (f.get_slice("layer 3")[10:20, 5:] == TENSORS["layer 3"][10:20, 5:]).all()


def test_only_what_is_needed_is_read(data):
    with Server({"m.rac": data}) as server:
        with rac.open(server.url("m.rac")) as f:
            assert server.requests == 2
            assert server.sent <= 4096 + 65536
            server.sent = 0
            entry = f.archives[0].index.entries[7]
            f.get_tensor(entry.name)
            assert server.requests == 3
            assert server.sent == entry.size
        # all tensors lie side by side: few requests, each byte once
        server.sent = server.requests = 0
        rac.load_file(server.url("m.rac"))
        assert server.requests <= 3 + len(data) // (2 << 20)
        assert server.sent <= len(data) + 4096 + 65536


@pytest.mark.parametrize("read", [rac.load_file, lambda url: dict(rac.stream(url))])
def test_connections_that_break_ten_times(data, read):
    with Server({"m.rac": data}, drops=10) as server:
        assert equal(read(server.url("m.rac")))
        assert server.dropped == 10
        assert server.sent < 1.2 * len(data) + 70000  # what had come was not fetched again


def test_a_server_that_is_busy(data):
    with Server({"m.rac": data}, busy=3) as server:
        assert equal(rac.load_file(server.url("m.rac")))
    with Server({"m.rac": data}, busy=99) as server, pytest.raises(rac.SourceError, match="503 Service Unavailable"):
        rac.load_file(server.url("m.rac"))
    assert server.requests == remote.RETRIES + 1


def test_what_is_not_there(data):
    with Server({"m.rac": data}) as server:
        url = server.url("other.rac")
        with pytest.raises(rac.SourceError, match="404") as e:
            rac.load_file(url)
        assert e.value.file == url
        assert server.requests == 1
    with pytest.raises(rac.SourceError, match="cannot be reached"):
        rac.open("http://127.0.0.1:1/m.rac")
    with pytest.raises(rac.SourceError, match="nosuch"):
        rac.open("nosuch://bucket/m.rac")


def test_a_server_without_ranges(data, tmp_path, capsys):
    with Server({"m.rac": data, "cut.rac": data[:90_000]}, ranges=False) as server:
        url = server.url("m.rac")
        with pytest.raises(rac.SourceError, match=r"no range requests; read it with rac\.stream"):
            rac.open(url)
        assert equal(rac.load_file(url))
        assert equal({n: t.numpy() for n, t in rac.load_file(url, framework="pt").items()})
        with pytest.raises(rac.TruncatedError):
            rac.load_file(server.url("cut.rac"))
        assert main(["info", url]) == 0 and "12 tensors" in capsys.readouterr().out
        assert main(["ls", url]) == 0 and "layer 11" in capsys.readouterr().out
        assert equal(dict(rac.stream(url)))
        assert rac.verify(url).tensors == 12
        rac.unpack(url, tmp_path / "m.safetensors")
        assert main(["load", url]) == 0 and "12 tensors" in capsys.readouterr().out
        with pytest.raises(rac.TruncatedError):
            list(rac.stream(server.url("cut.rac")))
        with pytest.raises(rac.SourceError, match="404"):
            list(rac.stream(server.url("other.rac")))
    rac.pack(tmp_path / "m.safetensors", tmp_path / "m.rac")
    assert equal(rac.load_file(tmp_path / "m.rac"))
    broken = pytest.raises(rac.SourceError, match="the connection broke .*no ranges to go on by")
    with Server({"m.rac": data}, ranges=False, drops=2) as server, broken:
        list(rac.stream(server.url("m.rac")))


def test_shards_on_a_server_without_ranges(tmp_path):
    np.savez(tmp_path / "m.npz", **TENSORS)
    rac.pack(tmp_path / "m.npz", tmp_path / "s.rac", shard_size=6_000_000)
    files = {p.name: p.read_bytes() for p in sorted(tmp_path.glob("s-*.rac"))}
    assert len(files) == 2
    files |= {"other.rac": files["s-00001-of-00002.rac"], "t-00001-of-00002.rac": files["s-00001-of-00002.rac"]}
    files["t-00002-of-00002.rac"] = files["s-00001-of-00002.rac"]
    with Server(files, ranges=False) as server:
        assert equal(rac.load_file(server.url("s-00002-of-00002.rac")))
        with pytest.raises(rac.SourceError, match=r"is shard 1 of 2; its name must end in -00001-of-00002\.rac"):
            rac.load_file(server.url("other.rac"))
        with pytest.raises(rac.FormatError, match="is in two shards"):
            rac.load_file(server.url("t-00001-of-00002.rac"))


def test_a_file_that_is_still_being_written(data):
    with Server({"m.rac": data[: len(data) // 2]}) as server, pytest.raises(rac.TruncatedError, match="still being"):
        rac.load_file(server.url("m.rac"))
    with Server({"m.rac": data}, grow=100) as server, pytest.raises(rac.SourceError, match="still being written"):
        rac.load_file(server.url("m.rac"))
    with Server({"m.rac": b""}) as server, pytest.raises(rac.TruncatedError):
        rac.load_file(server.url("m.rac"))


def test_a_file_that_became_shorter(data):
    with Server({"m.rac": data}) as server, rac.open(server.url("m.rac")) as f:
        server.files["m.rac"] = data[:5000]
        with pytest.raises(rac.SourceError, match="still being written"):
            f.get_tensor("layer 9")


def test_closing_ends_what_is_under_way(data):
    with Server({"m.rac": data}) as server:
        access = open_url(server.url("m.rac"))
        access.close()
        with pytest.raises(rac.SourceError, match="was closed"):
            access.read_into(5000, memoryview(bytearray(10)))


def test_other_file_systems(data):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/rac-test/m.rac", data)
    try:
        assert equal(rac.load_file("memory://rac-test/m.rac"))
        with pytest.raises(rac.SourceError, match="no such file"):
            rac.open("memory://rac-test/other.rac")
    finally:
        fs.rm("/rac-test", recursive=True)


def test_chains_of_file_systems(data, tmp_path):
    import fsspec

    with Server({"m.rac": data}) as server:
        fsspec.filesystem("simplecache", target_protocol="http", cache_storage=str(tmp_path))
        assert equal(rac.load_file(f"simplecache::{server.url('m.rac')}"))


def test_a_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(rac.MissingDependencyError, match=r"rac-codec\[remote\]"):
        rac.open("https://example.invalid/m.rac")
