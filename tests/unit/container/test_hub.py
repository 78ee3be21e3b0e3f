"""The Hub, out of a local server that speaks its API: packing, reading by ranges, pushing, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import threading

import numpy as np
import pytest

hub_library = pytest.importorskip("huggingface_hub")
hub_constants = pytest.importorskip("huggingface_hub.constants")
save = pytest.importorskip("safetensors.numpy").save

import rac
from rac.cli import main
from rac.container import hub as door
from rac.encode.sources import hub as source
from support.hub import serving

rng = np.random.default_rng(11)
SHARDS = 5
INDEX = "model.safetensors.index.json"


def shard(k, rows=130):
    return f"model-{k + 1:05d}-of-{SHARDS:05d}.safetensors", {
        f"layer.{k}.{i}": rng.standard_normal((rows, 128)).astype(np.float32) for i in range(3)
    }


def sharded():
    """Files of a model in shards; two layers of different files are equal."""
    parts = dict(shard(k) for k in range(SHARDS))
    names = sorted(parts)
    parts[names[3]]["twin"] = parts[names[0]]["layer.0.1"]
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    files = {file: save(tensors, {"format": "pt"}) for file, tensors in parts.items()}
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files | {"config.json": b'{"model_type": "none"}', ".gitattributes": b"*.bin", "sub/tokens.txt": b"a\nb\n"}


FILES = sharded()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(monkeypatch, tmp_path) as server:
        server.commit = server.add("org/model", FILES)
        yield server


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def provenance(path):
    with rac.open(path) as f:
        return f.archives[0].header["provenance"]


def refused(capsys, *words, match):
    """The command fails in one line, and leaves nothing but what was there."""
    before = sorted(os.listdir("."))
    capsys.readouterr()
    assert main([str(w) for w in words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and match in err, err
    assert sorted(os.listdir(".")) == before


def largest_request(hub, k):
    """Bytes of the largest range of a shard that was asked for."""
    place = hashlib.sha256(FILES[shard(k)[0]]).hexdigest()
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", r[2]) for r in hub.asked(place)]
    return max(int(m[2]) - int(m[1]) + 1 for m in ranges)


# --- packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["org/model", "hf://org/model@main", "org/model@{commit}", "hf://models/org/model"])
def test_a_repository_packs_as_its_folder_does(hub, tmp_path, name):
    done = rac.pack(name.format(commit=hub.commit), tmp_path / "m.rac")
    assert (done.tensors, done.skipped) == (16, ())
    rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert tree(tmp_path / "out") == FILES
    stated = provenance(tmp_path / "m.rac")
    assert stated["hub"] == {"repository": "org/model", "revision": hub.commit}
    assert stated["sha256"] == {n: hashlib.sha256(d).hexdigest() for n, d in FILES.items()}
    rac.pack(tmp_path / "out", tmp_path / "folder.rac")
    assert rac.verify(tmp_path / "m.rac").digest == rac.verify(tmp_path / "folder.rac").digest
    assert rac.verify(tmp_path / "m.rac", against=tmp_path / "out") == rac.verify(
        tmp_path / "m.rac", against="org/model"
    )
    assert not hub.leaked


def test_each_byte_comes_about_once(hub, tmp_path):
    rac.pack("org/model", tmp_path / "m.rac")
    total = sum(map(len, FILES.values()))
    assert hub.sent < total + 16 * 3 * 4096 + SHARDS * 65536 + 2 * 66560 + 20_000  # samples, headers, the twins
    assert not (tmp_path / "cache").exists()
    assert sorted(os.listdir(tmp_path)) == ["m.rac"]


def test_what_is_in_work_fits_the_largest_shard(hub, tmp_path, monkeypatch):
    largest = max(map(len, FILES.values()))
    held = []

    class Tape(source.HubTape):
        def _keep(self, view):
            super()._keep(view)
            held.append(self._head - self._tail)
            assert os.fstat(self._file.fileno()).st_size <= largest

    monkeypatch.setattr(source, "HubTape", Tape)
    rac.pack("org/model", tmp_path / "m.rac", jobs=4)
    assert max(held) <= largest
    assert sum(held) > 0


def test_what_lies_in_the_cache_is_read_there(hub, tmp_path):
    name = shard(1)[0]
    path = hub_library.hf_hub_download("org/model", name)
    hub.requests.clear()
    rac.pack("org/model", tmp_path / "m.rac")
    assert not hub.asked(name)
    rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert tree(tmp_path / "out") == FILES
    blob = os.path.realpath(path)
    data = bytearray(FILES[name])
    data[-1] ^= 1
    os.chmod(blob, 0o644)
    with open(blob, "wb") as f:
        f.write(data)
    with pytest.raises(rac.SourceError, match="the Hub lists other bytes than this file of its cache has; delete it"):
        rac.pack("org/model", tmp_path / "bad.rac")


def test_a_snapshot_of_the_cache_states_where_it_is_from(hub, tmp_path, monkeypatch):
    folder = hub_library.snapshot_download("org/model")
    rac.pack(folder, tmp_path / "m.rac")
    stated = provenance(tmp_path / "m.rac")
    assert stated["hub"] == {"repository": "org/model", "revision": hub.commit}
    assert stated["sha256"] == {n: hashlib.sha256(d).hexdigest() for n, d in FILES.items()}
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(rac.SourceError, match=f"its cache has {folder}, which can be packed"):
        rac.pack("org/model", tmp_path / "offline.rac")
    path = os.path.realpath(os.path.join(folder, shard(0)[0]))
    os.chmod(path, 0o644)
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x7f")
    with pytest.raises(rac.SourceError, match="not the file that the Hub's cache takes it for"):
        rac.pack(folder, tmp_path / "bad.rac")


def test_interrupted_packs_go_on(hub, tmp_path):
    def stop(name, _):
        if name == "layer.2.0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rac.pack("org/model", tmp_path / "m.rac", progress=stop)
    assert (tmp_path / "m.rac.part").exists()
    hub.requests.clear()
    done = rac.pack("org/model", tmp_path / "m.rac", resume=True)
    assert done.resumed >= 6
    whole = {k for k in range(SHARDS) if largest_request(hub, k) > 100_000}
    assert whole == {2, 3, 4}
    rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert tree(tmp_path / "out") == FILES
    assert not [t for t in threading.enumerate() if t.name == "rac-hub"]


def test_parts_of_a_repository_and_shards(hub, tmp_path):
    rac.pack("org/model", tmp_path / "m.rac", include=["layer.1.*"])
    assert sorted(rac.load_file(tmp_path / "m.rac")) == [f"layer.1.{i}" for i in range(3)]
    assert not set(provenance(tmp_path / "m.rac")["sha256"]) & {shard(k)[0] for k in range(SHARDS)}
    done = rac.pack("org/model", tmp_path / "s.rac", shard_size=250_000)
    assert len(done.paths) > 3
    rac.unpack(done.paths[0], tmp_path / "out")
    assert tree(tmp_path / "out") == FILES


def test_lossy_packs_leave_no_download(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "org/model", "--bits", "4"]) == 0
    assert os.listdir(tmp_path) == ["model.rac"]
    assert provenance("model.rac")["hub"]["revision"] == hub.commit
    assert rac.verify("model.rac").lossy > 3
    hub.lies[shard(2)[0]] = FILES[shard(1)[0]]
    refused(
        capsys, "pack", "org/model", "-o", "bad.rac", "--bits", "4", match="SHA-256 is not the one that the Hub lists"
    )


def test_a_path_wins_over_an_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "model.safetensors").write_bytes(save({"w": np.zeros(3, np.float32)}))
    assert rac.pack("org/model", "m.rac").tensors == 1
    assert rac.pack("hf://org/model", "h.rac").tensors == 16
    with pytest.raises(rac.SourceError, match="No such file"):
        rac.pack("org/other", "o.rac")  # org/ is a folder here


# --- what goes wrong -------------------------------------------------------------------------------


def test_connections_that_break_and_a_hub_that_is_busy(hub, tmp_path):
    hub.drops, hub.busy = 12, 3
    rac.pack("org/model", tmp_path / "m.rac")
    assert hub.drops == hub.busy == 0
    rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert tree(tmp_path / "out") == FILES


def test_a_renamed_repository_whose_small_files_come_whole(hub, tmp_path):
    hub.plain, hub.page = True, 3
    hub.repos["old/name"] = hub.repos["org/model"]
    rac.pack("old/name", tmp_path / "m.rac")
    rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert tree(tmp_path / "out") == FILES


def test_errors_are_one_line(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(
        capsys, "pack", "org/nosuch", match="no such repository, or a private one; for those log in by `hf auth login`"
    )
    refused(capsys, "pack", "org/model@v9", match="has no revision 'v9' [hf://org/model]")
    refused(capsys, "pack", "hf://org/model/config.json", match="names a file; name the repository")
    refused(capsys, "pack", "hf://org", match="is no hf://ORG/NAME")
    refused(capsys, "info", "hf://org/model/no.rac", match="no such file in the repository [hf://org/model/no.rac]")
    hub.retry_after, hub.busy = "900", 1
    refused(capsys, "pack", "org/model", match="the Hub is asked too often: it says to wait 900 s")
    hub.retry_after, hub.busy = "0", 10_000
    refused(capsys, "pack", "org/model", match="the Hub answers 429")
    hub.busy = 0
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    refused(capsys, "pack", "org/model", match="the Hub is not asked, as HF_HUB_OFFLINE is set [hf://org/model]")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    hub.add("org/pickled", {"pytorch_model.bin": b"x"})
    refused(capsys, "pack", "org/pickled", match="pickled weights alone, which are not read from the Hub")


def test_gated_and_private_repositories(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hub.repos["org/model"].gated = True
    refused(capsys, "pack", "org/model", match="is gated: ask for access at")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["pack", "org/model"]) == 0
    hub.repos["org/model"].gated, hub.repos["org/model"].private = False, True
    assert main(["pack", "org/model", "--force"]) == 0
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(capsys, "pack", "org/model", match="set HF_TOKEN")
    assert not hub.leaked  # a token goes to the Hub alone, not where it sends us


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "SHA-256 of this file is not the one that the Hub lists"),
        (lambda d: d[: len(d) // 2], "was it uploaded whole?"),
    ],
)
def test_a_shard_that_is_not_what_the_hub_lists(hub, tmp_path, monkeypatch, capsys, lie, why):
    monkeypatch.chdir(tmp_path)
    name = shard(4)[0]
    hub.lies[name] = lie(FILES[name])
    refused(capsys, "pack", "org/model", match=why)
    refused(capsys, "pack", "org/model", "--shard-size", "250000", match=why)


def test_a_shard_that_changes_while_it_is_read(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = dict(FILES)
    other[shard(4)[0]] = save(
        {f"layer.4.{i}": rng.standard_normal((130, 128)).astype(np.float32) for i in range(3)}, {"format": "pt"}
    )
    work = source.HubTape.start

    def start(self, *given):  # a mirror that does not keep to commits
        hub.repos["org/model"].commits[hub.commit] = other
        self.access(next(f for f in self.files if f.name == shard(4)[0]))._place = None
        work(self, *given)

    monkeypatch.setattr(source.HubTape, "start", start)
    refused(capsys, "pack", "org/model", match="changed on the Hub while it was read")


def test_a_missing_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(rac.MissingDependencyError, match=r"rac-codec\[hub\]"):
        rac.pack("org/model", "m.rac")


# --- reading by ranges -----------------------------------------------------------------------------


@pytest.fixture
def packed(hub, tmp_path):
    rac.pack("org/model", tmp_path / "m.rac")
    data = (tmp_path / "m.rac").read_bytes()
    hub.add("org/packed", {"m.rac": data, "README.md": b"# m"})
    hub.requests.clear()
    hub.sent = 0
    return data


def test_archives_on_the_hub(hub, tmp_path, packed):
    want = rac.load_file(tmp_path / "m.rac")
    for name in ("hf://org/packed/m.rac", "hf://org/packed@main/m.rac", "org/packed", "hf://org/packed"):
        got = rac.load_file(name)
        assert got.keys() == want.keys() and all((got[n] == t).all() for n, t in want.items())
    assert dict(rac.stream("hf://org/packed/m.rac")).keys() == want.keys()
    assert rac.verify("hf://org/packed/m.rac").tensors == 16
    hub.sent = 0
    with rac.open("hf://org/packed/m.rac") as f:
        assert (f.get_slice("layer.2.1")[:10, :] == want["layer.2.1"][:10]).all()
    assert hub.sent < len(packed) / 2
    hub_library.hf_hub_download("org/packed", "m.rac")
    hub.requests.clear()
    rac.load_file("hf://org/packed/m.rac")
    assert not hub.asked("/cdn/")  # out of the cache
    hub.add("org/two", {"a.rac": packed, "b.rac": packed})
    with pytest.raises(rac.SourceError, match=r"has 2 archives; name one: hf://org/two/a\.rac"):
        rac.open("org/two")
    with pytest.raises(rac.SourceError, match=r"has no \.rac file"):
        rac.open("org/model")


# --- verifying -------------------------------------------------------------------------------------


def test_files_are_compared_with_those_that_were_packed(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rac.pack("org/model", "m.rac")
    assert (seen := rac.verify("m.rac")).files == len(FILES) and not seen.hub
    hub.requests.clear()
    seen = rac.verify("m.rac", hub=True)
    assert (seen.files, seen.hub, seen.others) == (len(FILES), f"org/model@{hub.commit}", ())
    assert not hub.asked("/resolve/")  # the list is enough
    assert main(["verify", "m.rac", "--hub"]) == 0
    assert f"{len(FILES)} files with the SHA-256 that org/model@" in capsys.readouterr().out
    rac.pack("org/model", "lossy.rac", bits=4, calibrate="none")
    seen = rac.verify("lossy.rac", hub=True)
    assert seen.others == tuple(sorted(shard(k)[0] for k in range(SHARDS))) and seen.files == 4
    rac.pack("org/model", "part.rac", include=["layer.1.*"])
    assert rac.verify("part.rac", hub=True).files == 4
    other = dict(FILES)
    other["config.json"] = b"{}"
    hub.repos["org/model"].commits[hub.commit] = other
    with pytest.raises(rac.MismatchError, match="is not the file that the Hub lists: another SHA-256") as e:
        rac.verify("m.rac", hub=True)
    assert e.value.unit == "'config.json'"
    assert main(["verify", "m.rac", "--hub"]) == 1
    capsys.readouterr()
    rac.save_file({"w": np.zeros(3)}, "own.rac")
    refused(capsys, "verify", "own.rac", "--hub", match="states no repository of the Hub")


def test_files_that_are_not_those_that_were_packed(hub, tmp_path):
    """A packer that states a SHA-256 and packs other bytes is found out without the Hub."""
    from dataclasses import replace

    from rac.encode.pack import pack_source
    from rac.encode.sources import open_source

    given = open_source("org/model")
    for name in (shard(0)[0], INDEX, "sub/tokens.txt"):
        wrong = {**given.sha256, name: hashlib.sha256(b"").hexdigest()}
        pack_source(replace(given, sha256=wrong, tape=None), tmp_path / "m.rac", force=True)
        with pytest.raises(rac.MismatchError, match="is not the file that was packed") as e:
            rac.verify(tmp_path / "m.rac")
        assert e.value.unit == repr(name)


def test_large_files_in_pieces(hub, tmp_path, monkeypatch):
    from rac.encode.sources import hf

    monkeypatch.setattr(hf, "MAX_ATTACHMENT", 40_000)
    large = rng.integers(0, 255, 130_001, np.uint8).tobytes()
    commit = hub.add("org/both", FILES | {"other.bin": large, "sub/more.bin": b"x" * 40_001})
    assert rac.pack("org/both", tmp_path / "small.rac").skipped == ("other.bin", "sub/more.bin")
    assert "other.bin" not in provenance(tmp_path / "small.rac")["sha256"]
    assert rac.pack("org/both", tmp_path / "m.rac", all_files=True).skipped == ()
    assert provenance(tmp_path / "m.rac")["pieces"] == {"other.bin": 4, "sub/more.bin": 2}
    rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert tree(tmp_path / "out") == FILES | {"other.bin": large, "sub/more.bin": b"x" * 40_001}
    assert rac.verify(tmp_path / "m.rac", hub=True).hub.endswith(commit)
    rac.unpack(tmp_path / "m.rac", tmp_path / "one", only=["*.bin"])
    assert set(tree(tmp_path / "one")) == {"other.bin", "sub/more.bin"}
    hub.lies["other.bin"] = large[:-1] + b"\0"
    with pytest.raises(rac.SourceError, match="SHA-256 is not the one that the Hub lists"):
        rac.pack("org/both", tmp_path / "bad.rac", all_files=True)
    assert not list(tmp_path.glob("bad*"))
    hub.lies.clear()
    rac.pack(tmp_path / "out", tmp_path / "folder.rac", all_files=True)
    assert rac.verify(tmp_path / "folder.rac", against="org/both").tensors == 16


def test_other_commands_read_repositories(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rac.pack("org/model", "lossy.rac", bits=4, calibrate="none", effort="fast")
    assert main(["compare", "org/model", "lossy.rac"]) == 0
    assert "lossy.rac" in capsys.readouterr().out
    tensor = source.read(door.Address("org/model", None)).tensors[1]
    again = pickle.loads(pickle.dumps(tensor))  # for a process that reads by itself
    assert (again.read(0, 1000) == tensor.read(0, 1000)).all()
    hub.add("org/packed", {"m.rac": b""})
    refused(capsys, "pack", "org/packed", match="name the .rac file itself")


# --- pushing ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # of huggingface_hub
def test_an_archive_is_pushed_with_its_card(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    rac.pack("org/model", "q.rac", bits=4, calibrate="none", effort="fast")
    hub.requests.clear()
    assert main(["push", "q.rac", "me/quick", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not hub.requests
    assert main(["push", "q.rac", "me/quick", "--private"]) == 0
    repo = hub.repos["me/quick"]
    files = repo.commits[repo.refs["main"]]
    card = files["README.md"].decode()
    assert files["q.rac"] == (tmp_path / "q.rac").read_bytes() and card in printed
    assert repo.asked_private in (True, "private")
    digest, size = rac.verify("q.rac").digest.hex(), (tmp_path / "q.rac").stat().st_size
    for part in (
        "base_model: org/model",
        "base_model_relation: quantized",
        f"rac pack org/model@{hub.commit} -o q.rac --bits 4 --calibrate none --effort fast",
        f"{size:,} bytes",
        f"`{digest}`",
        "**Lossy**: ",
        'rac.load_model("me/quick")',
    ):
        assert part in card, part
    assert rac.load_file("me/quick").keys() == rac.load_file("q.rac").keys()
    # again: nothing new, and a card of theirs stays
    hub.add("me/quick", files | {"README.md": b"mine"})
    assert main(["push", "q.rac", "me/quick", "--revision", "v2"]) == 0
    assert "stays (--card replaces it)" in capsys.readouterr().out
    assert repo.commits[repo.refs["v2"]]["README.md"] == b"mine"
    assert main(["push", "q.rac", "me/quick", "--revision", "v2", "--card"]) == 0
    assert repo.commits[repo.refs["v2"]]["README.md"].decode() == card


@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # of huggingface_hub
def test_shards_are_pushed_together(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    paths = rac.pack("org/model", "s.rac", shard_size=300_000).paths
    assert main(["push", paths[1], "me/shards", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["files"]) == set(paths)
    assert rac.load_file("me/shards").keys() == rac.load_file(paths[0]).keys()
    assert rac.verify("me/shards").tensors == 16


def test_what_cannot_be_pushed(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rac.save_file({"w": np.zeros(9)}, "q.rac")
    refused(capsys, "push", "q.rac", "me/quick", match="the Hub answers 401 Unauthorized; log in by `hf auth login`")
    refused(capsys, "push", "q.rac", "me", match="is no hf://ORG/NAME")
    refused(capsys, "push", "q.rac", "me/quick/file", match="is no ORG/NAME")
    refused(capsys, "push", "none.rac", "me/quick", match="No such file")
