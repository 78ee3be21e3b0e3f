"""Packs that ranks share: the bytes of one machine, whatever becomes of the ranks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import rac
from rac import cli
from rac.encode.sources import open_source
from rac.errors import BudgetError, OutputError, SourceError
from rac.ranks import Asked, How, finish, look, open_store, pack_rank
from rac.ranks import packing as ranks_packing
from rac.ranks.job import job_of
from rac.ranks.lease import Heart, Watch, file_of
from rac.ranks.stage import Home, Marker, Stage
from rac.ranks.store import Disk, Far

ASKED = {
    "lossless": Asked(),
    "max": Asked(level="max"),
    "bits": Asked(bits=3.0, calibrate="none"),
    "file": Asked(file_bits=6.0, calibrate="none", effort="fast"),
    "snr": Asked(snr=14.0, calibrate="none", effort="fast"),
}
ASK_FAST = ["--calibrate", "none", "--effort", "fast"]
QUICK = How(jobs=1, lease=0.4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": (rng.standard_normal((130 + 8 * i, 128)) * 0.02).astype(np.float32) for i in range(7)}
    tensors |= {"norm": np.ones(64, np.float32), "again": tensors["w2"]}
    path = tmp_path_factory.mktemp("ranks") / "m.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def alone(model):
    """What one machine writes, by a name in ASKED."""
    made = {}

    def call(what):
        if what not in made:
            asked = ASKED[what].changed
            rac.pack(model, model.with_name(f"{what}.rac"), **asked)
            made[what] = model.with_name(f"{what}.rac").read_bytes()
        return made[what]

    return call


def together(model, work, asked, world, how=QUICK):
    """All ranks at once, as threads; what went wrong."""
    wrong = []

    def one(rank):
        try:
            pack_rank(model, work, asked, rank=rank, world=world, how=how)
        except Exception as e:
            wrong.append(e)

    numbers = list(range(world))
    random.Random(world).shuffle(numbers)
    threads = [threading.Thread(target=one, args=(rank,)) for rank in numbers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return wrong


@pytest.mark.parametrize("world", [1, 2, 4, 7])
@pytest.mark.parametrize("what", ["lossless", "bits"])
def test_any_number_of_ranks_makes_the_same_bytes(model, alone, tmp_path, what, world):
    how = How(jobs=1 + world % 3, lease=30)
    assert not together(model, tmp_path / "work", ASKED[what], world, how)
    done = finish(tmp_path / "work", tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone(what)
    assert all(np.isfinite(f.snr) for f in done.fidelity)
    assert len(done.fidelity) == (7 if what == "bits" else 0)


@pytest.mark.parametrize("what", ["max", "file", "snr"])
def test_other_budgets_and_levels_too(model, alone, tmp_path, what):
    assert not together(model, tmp_path / "work", ASKED[what], 2)
    finish(tmp_path / "work", tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone(what)


def test_a_sample_for_the_scale_is_shared_too(model, tmp_path, monkeypatch):
    monkeypatch.setattr("rac.encode.allocate.few.LEAST", 1000)
    asked = Asked(bits=3.2, calibrate="none", effort="fast")
    rac.pack(model, tmp_path / "alone.rac", **asked.changed)
    assert not together(model, tmp_path / "work", asked, 3)
    finish(tmp_path / "work", tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "alone.rac").read_bytes()
    samples = list((tmp_path / "work").glob("scale*-sample"))
    assert samples
    assert not [p for folder in samples for p in folder.glob("*.rac")]  # sizes alone


def test_one_that_finishes_does_what_is_left(model, alone, tmp_path):
    finish(tmp_path / "work", tmp_path / "m.rac", src=model, asked=ASKED["bits"], how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone("bits")


@pytest.mark.parametrize("what", ["lossless", "bits"])
def test_what_is_large_is_not_held(model, alone, tmp_path, monkeypatch, what):
    for module in ("packer", "records"):
        monkeypatch.setattr(f"rac.ranks.{module}.LARGE", 5000)
    pack_rank(model, tmp_path / "work", ASKED[what], how=QUICK)
    finish(tmp_path / "work", tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone(what)


def test_shards_are_those_of_one_machine(model, tmp_path):
    asked = Asked(shard_size=200_000)
    rac.pack(model, tmp_path / "a.rac", shard_size=200_000)
    pack_rank(model, tmp_path / "work", asked, how=QUICK)
    done = finish(tmp_path / "work", tmp_path / "b.rac", how=QUICK)
    assert len(done.paths) > 1
    for path in map(Path, done.paths):
        assert path.read_bytes() == path.with_name("a" + path.name[1:]).read_bytes()


def test_ranks_may_be_killed_and_run_again(model, alone, tmp_path):
    work, rng = tmp_path / "work", random.Random(7)
    fork = multiprocessing.get_context("fork")

    def start(rank):
        job = fork.Process(
            target=pack_rank, args=(model, work, ASKED["bits"]), kwargs={"rank": rank, "world": 3, "how": QUICK}
        )
        job.start()
        return job

    running = {rank: start(rank) for rank in range(3)}
    for _ in range(8):
        time.sleep(rng.random() / 10)
        rank = rng.randrange(3)
        running[rank].kill()
        running[rank].join()
        running[rank] = start(rank)
    running[0].kill()  # and this one is not run again
    for job in running.values():
        job.join()
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone("bits")
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_the_work_folder_may_be_a_url(model, alone, tmp_path, kind):
    work = f"memory://{tmp_path.name}" if kind == "memory" else f"file://{tmp_path}/work"
    assert not together(model, work, ASKED["bits"], 2)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone("bits")


class Late(Far):
    """A store that lists nothing, and shows a new file only when it has been asked for a while."""

    def __init__(self, url):
        super().__init__(url)
        self._asked = {}

    def get(self, name):
        found = super().get(name)
        if found is not None:
            self._asked[name] = self._asked.get(name, 0) + 1
        return found if self._asked.get(name, 0) > 2 else None

    def names(self, folder):
        return []


def test_a_store_may_list_late(model, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks_packing, "open_store", lambda where: Late(str(where)))
    work = f"memory://late-{tmp_path.name}"
    assert not together(model, work, ASKED["bits"], 3)
    finish(work, tmp_path / "m.rac", src=model, asked=ASKED["bits"], how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone("bits")


def test_the_largest_items_are_dealt_first():
    from rac.encode.sources import SourceTensor
    from rac.encode.ties import Group

    sizes = [100, 900, 300, 800, 200, 700]
    groups = [Group(SourceTensor(str(i), "U8", (n,), np.zeros(n, np.uint8)), (), {}) for i, n in enumerate(sizes)]
    stage = Stage.of("s", "", groups)
    dealt = [[item.size for item in share] for share in stage.deal(2)]
    assert dealt == [[900, 300, 200, 100], [800, 700]]
    for rank in (None, 0, 1):
        assert sorted(i.number for i in stage.order(2, rank)) == list(range(6))
    assert [i.size for i in stage.order(2, 1)] == [800, 700, 100, 200, 300, 900]
    many = [Group(SourceTensor(str(i), "U8", (1000,), np.zeros(1000, np.uint8)), (), {}) for i in range(4000)]
    assert len(Stage.of("s", "", many).items) < 700  # small ones together


def test_what_shares_a_factor_is_dealt_to_one_rank_in_every_stage():
    from rac.encode.sources import SourceTensor
    from rac.encode.ties import Group

    def group(name, n):
        return Group(SourceTensor(name, "U8", (n,), np.zeros(n, np.uint8)), (), {})

    inputs = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    homes = {name: Home(i, 1000 * 3**i) for i, names in enumerate(inputs) for name in names}
    groups = [group(name, 100 + i) for i, name in enumerate(["down", "gate", "k", "norm", "o", "q", "up", "v", "bias"])]
    by_name = {g.tensor.name: g for g in groups}
    looks = Stage.parted("units", "", [[by_name[name] for name in names] for names in inputs], homes)
    assert [[g.tensor.name for g in item.groups] for item in looks.items] == inputs
    tries = Stage.of("scale", "", groups, homes)
    assert [len(item.groups) for item in tries.items] == [1] * 9
    for world in (1, 2, 3, 7):
        dealt = [
            [{g.tensor.name for item in share for g in item.groups} & homes.keys() for share in stage.deal(world)]
            for stage in (looks, tries)
        ]
        assert dealt[0] == dealt[1]
    assert max(len(item.groups) for item in Stage.of("", "", groups * 600).items) > 2  # without homes: together


def test_a_rank_that_vanished_is_waited_for_as_long_as_its_lease(model, alone, tmp_path):
    work = tmp_path / "work"
    gone = Heart(Disk(str(work)), 5, lease=0.3)
    gone.beat()
    stages = ["lossless/00000", "lossless/00003"]
    for name in stages:
        Disk(str(work)).put(f"{name}.claim", json.dumps({"owner": gone.owner, "lease": 0.3}).encode())
    share = pack_rank(model, work, ASKED["lossless"], how=QUICK)
    assert (share.items - share.done) == 2
    start = time.monotonic()
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert time.monotonic() - start > 0.25
    assert (tmp_path / "m.rac").read_bytes() == alone("lossless")


def test_clocks_of_machines_may_differ(tmp_path):
    """An owner is alive while its file changes, whatever time that states."""
    store, now = Disk(str(tmp_path)), [1000.0]
    watch = Watch(store, lambda: now[0])
    heart = Heart(store, 3)
    for at in (-1e9, 0.0, 1e12):
        heart.beat()
        stated = json.loads((tmp_path / heart.name).read_text()) | {"at": at}
        (tmp_path / heart.name).write_text(json.dumps(stated))
        assert watch.alive(heart.owner, 60)
        now[0] += 59
        assert watch.alive(heart.owner, 60)
        now[0] += 2
        assert not watch.alive(heart.owner, 60)
    heart.beat(ended=True)
    assert not watch.alive(heart.owner, 60)
    assert watch.alive("00009-never-seen", 60)  # its file may show late
    now[0] += 61
    assert not watch.alive("00009-never-seen", 60)
    again = Heart(store, 3)
    again.beat()
    assert watch.alive(again.owner, 60)
    assert not watch.alive(heart.owner, 60)


def ruined(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "gone":
        path.unlink()
    elif how == "bit":
        at = len(data) // 3
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    else:  # something else that is whole
        others = [p for p in sorted(path.parent.glob(f"*{path.suffix}")) if p != path]
        path.write_bytes(others[0].read_bytes())


@pytest.mark.parametrize("ending", ["json", "rac"])
@pytest.mark.parametrize("how", ["cut", "gone", "bit", "other"])
@pytest.mark.parametrize("what", ["lossless", "bits"])
def test_what_is_damaged_is_made_again(model, alone, tmp_path, what, how, ending):
    work = tmp_path / "work"
    pack_rank(model, work, ASKED[what], how=QUICK)
    last = max((p for p in work.iterdir() if (p / "00001.rac").exists()), key=lambda p: p.stat().st_mtime)
    ruined(last / f"00001.{ending}", how)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone(what)


def test_a_poisoned_marker_is_no_marker(tmp_path):
    good = Marker("j", "k", 1, 100, "00", 50, 0.5, "me", [["w", 3]])
    assert Marker.load(good.dump()) == good
    stated = json.loads(good.dump())
    for wrong in (b"", b"{}", b"[]", b"\xff", json.dumps(stated | {"size": 99}).encode(), good.dump()[:-4]):
        assert Marker.load(wrong) is None
    assert Marker.load(json.dumps(stated | {"more": 1}).encode()) is None


def test_two_that_finish_write_one_file(model, alone, tmp_path):
    work, out, said = tmp_path / "work", tmp_path / "m.rac", []
    pack_rank(model, work, ASKED["lossless"], how=QUICK)

    def one():
        try:
            finish(work, out, how=QUICK)
        except OutputError as e:
            said.append(str(e))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert out.read_bytes() == alone("lossless")
    assert len(said) == 2
    assert all("another process is writing this file" in e or "exists already" in e for e in said)
    assert not out.with_name("m.rac.part").exists()
    finish(work, out, force=True, how=QUICK)
    assert out.read_bytes() == alone("lossless")


def test_a_work_folder_of_another_job_is_refused(model, tmp_path, monkeypatch, capsys):
    work = str(tmp_path / "work")
    asked = ["pack", str(model), "--work", work, "--calibrate", "none", "-q"]
    assert cli.main([*asked, "--bits", "3"]) == 0
    assert cli.main([*asked, "--bits", "4"]) == 2
    assert capsys.readouterr().err == f"rac: is the work folder of another job: bits is 3.0 there, 4.0 here [{work}]\n"
    other = tmp_path / "other.safetensors"
    save_file({"w": np.zeros((200, 200), np.float32)}, other)
    with pytest.raises(
        OutputError, match=r"its source is another \(.*m\.safetensors there, .*other.safetensors here\)"
    ):
        pack_rank(other, work, ASKED["bits"], how=QUICK)
    monkeypatch.setattr("rac.ranks.job.VERSION", "9.9")
    with pytest.raises(OutputError, match=r"another job: rac is 0\.\d+\.\d+ there, 9\.9 here"):
        finish(work, tmp_path / "m.rac", how=QUICK)
    monkeypatch.undo()
    (Path(work) / "job.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        pack_rank(model, work, ASKED["bits"], how=QUICK)
    with pytest.raises(SourceError, match="holds no job"):
        finish(work, tmp_path / "m.rac", how=QUICK)


def test_another_library_is_refused(model, tmp_path, monkeypatch):
    pack_rank(model, tmp_path, ASKED["lossless"], how=QUICK)
    monkeypatch.setattr("rac.ranks.job.version", lambda package: "7.0")
    with pytest.raises(OutputError, match=r"numpy is [\d.]+ there, 7\.0 here"):
        pack_rank(model, tmp_path, ASKED["lossless"], how=QUICK)


class Full(Disk):
    """A disk that is full but for small files."""

    @contextmanager
    def writing(self, name):
        if name.endswith(".rac"):
            raise OutputError(os.strerror(errno.ENOSPC), file=self.where)
        with super().writing(name) as f:
            yield f


def test_a_full_disk_of_one_rank_is_its_own(model, alone, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    with monkeypatch.context() as m:
        m.setattr(ranks_packing, "open_store", lambda where: Full(str(where)))
        assert cli.main(["pack", str(model), "--work", str(work), "-q"]) == 2
    assert capsys.readouterr().err == f"rac: No space left on device [{work}]\n"
    pack_rank(model, work, ASKED["lossless"], rank=1, world=2, how=How(lease=600))  # what it had begun is free at once
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone("lossless")


def test_the_command_line_does_all_of_it(model, alone, tmp_path, capsys):
    work = str(tmp_path / "work")
    for rank in range(2):
        given = ["--bits", "3", "--calibrate", "none", "--world", "2", "--rank", str(rank), "--work", work]
        assert cli.main(["pack", str(model), "-o", "unused.rac", *given]) == 0
    assert "rank 1 of 2: all is done" in capsys.readouterr().out
    assert cli.main(["jobs", work]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{work}: {model} (bits 3.0, calibrate none)"
    assert said[2].startswith("choosing units")
    assert said[3].startswith("looking for the scale: 3.000 bits, pass 1")
    assert said[-1].startswith("ended: rank 0 on ")
    out = tmp_path / "m.rac"
    assert cli.main(["pack", "--finish", "--work", work, "-o", str(out)]) == 0
    assert out.read_bytes() == alone("bits")
    assert cli.main(["jobs", work, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert {rank["rank"] for rank in found["ranks"]} == {0, 1, None}
    assert not os.path.exists("unused.rac")


@pytest.mark.parametrize("url", ["", "memory://"])
def test_a_finished_job_is_cleaned_away(model, tmp_path, capsys, url):
    work = f"{url}{tmp_path}/work"
    pack_rank(model, work, ASKED["bits"], how=QUICK)
    assert cli.main(["jobs", "--clean", work]) == 2
    assert "is not finished: its file was not written; give --yes" in capsys.readouterr().err
    finish(work, tmp_path / "m.rac", how=QUICK)
    store = open_store(work)
    store.put("notes.txt", b"mine")
    store.put("scales/of.fish", b"mine")
    late = Heart(store, 5)
    late.beat()
    assert cli.main(["jobs", "--clean", work]) == 2
    assert "1 of its ranks are alive; give --yes" in capsys.readouterr().err
    late.beat(ended=True)
    assert cli.main(["jobs", "--clean", work]) == 0
    assert "; 2 other files stay" in capsys.readouterr().out
    assert store.names("") == ["notes.txt", "scales"]
    assert cli.main(["jobs", "--clean", "--yes", work]) == 2
    assert "holds no job" in capsys.readouterr().err
    assert cli.main(["jobs", "--yes", work]) == 2
    assert "--yes goes with --clean" in capsys.readouterr().err


def test_an_unfinished_job_goes_if_one_says_so(model, tmp_path):
    work = tmp_path / "work"
    pack_rank(model, work, ASKED["lossless"], how=QUICK)
    assert cli.main(["jobs", "--clean", "--yes", "-q", str(work)]) == 0
    assert not work.exists()


KINDS = {
    "device is not given there, mps here": (("cpu", ""), ("mps", "")),
    "device is mps there, cuda here": (("mps", ""), ("cuda", "")),
    r"device is cuda \(A\) there, cuda \(B\) here": (("cuda", "A"), ("cuda", "B")),
}


@pytest.mark.parametrize("said", KINDS)
def test_all_ranks_have_one_device(model, tmp_path, monkeypatch, said):
    there, here = KINDS[said]
    store = open_store(tmp_path)

    def join(device, kind):
        monkeypatch.setattr("rac.ranks.job.name_of", lambda device: f"{device} ({kind})")
        asked = Asked(bits=3.0, calibrate="t.txt", device=device)
        job_of(str(model), open_source(model), asked).join(store)

    join(*there)
    join(*there)
    with pytest.raises(OutputError, match=f"is the work folder of another job: {said}"):
        join(*here)


def test_whole_numbers_are_one_request_however_they_are_written(model, tmp_path):
    made = [tmp_path / "a.rac", tmp_path / "b.rac", tmp_path / "c.rac"]
    rac.pack(model, made[0], bits=3, calibrate="none", effort="fast")
    rac.pack(model, made[1], bits=3.0, calibrate="none", effort="fast")
    assert cli.main(["pack", str(model), "-o", str(made[2]), "--bits", "3", *ASK_FAST, "-q"]) == 0
    assert len({path.read_bytes() for path in made}) == 1
    pack_rank(model, tmp_path / "work", Asked(bits=3, calibrate="none", effort="fast"), how=QUICK)
    given = ["pack", str(model), "--bits", "3", *ASK_FAST, "--work", str(tmp_path / "work"), "-q"]
    assert cli.main(given) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--world", "2"], "give --work too"),
        (["--work", "w", "--world", "2", "--rank", "2"], "rank 2 is not one of 0 to 1"),
        (["--work", "w", "--format", "hf"], "--work does not go with --format hf"),
        (["--work", "w", "--resume"], "--work does not go with --resume"),
        (["--work", "nope://w"], "nope"),
    ],
)
def test_wrong_use_is_one_line(model, tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pack", str(model), *given]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_finishing_nothing_is_one_line(tmp_path, capsys):
    assert cli.main(["pack", "--finish", "--work", str(tmp_path), "-o", str(tmp_path / "m.rac")]) == 2
    assert "holds no job" in capsys.readouterr().err
    assert cli.main(["jobs", str(tmp_path)]) == 2
    assert "holds no job" in capsys.readouterr().err


def test_a_budget_that_cannot_be_met_is_said_by_each(model, tmp_path):
    for rank in range(2):
        with pytest.raises(BudgetError, match="cannot be met"):
            pack_rank(model, tmp_path, Asked(size=1500, calibrate="none", effort="fast"), rank=rank, world=2, how=QUICK)


def test_the_view_knows_the_dead(model, tmp_path):
    work = Disk(str(tmp_path))
    pack_rank(model, tmp_path, ASKED["lossless"], how=QUICK)
    for number in (1, 2, 3):
        (tmp_path / f"lossless/0000{number}.json").unlink()
    alive, gone = Heart(work, 1, about={"jobs": 2}), Heart(work, 2, lease=-1.0)
    alive.beat()
    gone.beat()
    for number, heart in ((1, alive), (2, gone)):
        work.put(f"lossless/0000{number}.claim", json.dumps({"owner": heart.owner, "lease": 60}).encode())
    (tmp_path / "lossless/00003.claim").unlink()
    found = look(open_store(tmp_path))
    stage = found.stages[0]
    assert (stage.items, stage.done, stage.claimed, stage.dead, stage.left) == (8, 5, 1, 1, 1)
    assert {r.rank: r.state for r in found.ranks} == {0: "ended", 1: "alive", 2: "silent"}
    assert stage.eta is not None
    assert file_of(alive.owner) == "ranks/00001.json"
