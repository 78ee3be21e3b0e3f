"""What goes wrong among ranks that are processes of their own: one clear line each, and nothing packed wrong."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

import rac
from rac import cli
from rac.errors import OutputError
from rac.ranks import Asked, How, finish, open_store, pack_rank
from rac.ranks.lease import Heart
from rac.ranks.stage import Marker
from support import ROOT

ASKED = Asked(bits=3.0, calibrate="none", effort="fast")
GIVEN = ["--bits", "3", "--calibrate", "none", "--effort", "fast", "-q"]
QUICK = How(jobs=1, lease=0.4)
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(FORK is None, reason="needs fork")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(4)
    path = tmp_path_factory.mktemp("trouble") / "m.safetensors"
    save_file({f"w{i}": (rng.standard_normal((256, 160 + i)) * 0.02).astype(np.float32) for i in range(8)}, path)
    return path


def start(tmp_path, argv, first=lambda: None):
    """`rac` in a process that is forked; `first` is done there before. Its exit code, what it said is in `said`."""

    def run():
        first()
        with open(tmp_path / f"said{os.getpid()}", "w") as f:
            os.dup2(f.fileno(), 2)
            sys.stderr = f
            code = cli.main([str(a) for a in argv])
            f.flush()
        os._exit(code)

    process = FORK.Process(target=run)
    process.start()
    return process


def said(tmp_path, process):
    process.join()
    return process.exitcode, (tmp_path / f"said{process.pid}").read_text()


def ranks(tmp_path, model, work, numbers, world, *more):
    return [
        start(tmp_path, ["pack", model, *GIVEN, "--work", work, "--world", world, "--rank", rank, *more])
        for rank in numbers
    ]


@needs_fork
def test_a_rank_that_stands_still_is_given_up_and_may_go_on(model, alone, tmp_path):
    """A machine that hangs, and comes back when others have done its work."""
    work = tmp_path / "work"
    slow = ranks(tmp_path, model, work, [0], 2, "--lease", "0.4")[0]
    while not list(work.glob("*/*.claim")):
        assert slow.is_alive()
        time.sleep(0.005)
    os.kill(slow.pid, signal.SIGSTOP)
    try:
        finish(work, tmp_path / "m.rac", how=QUICK)
    finally:
        os.kill(slow.pid, signal.SIGCONT)
    assert said(tmp_path, slow) == (0, "")
    assert (tmp_path / "m.rac").read_bytes() == alone
    finish(work, tmp_path / "again.rac", how=QUICK)
    assert (tmp_path / "again.rac").read_bytes() == alone


@needs_fork
def test_processes_that_finish_at_once(model, alone, tmp_path):
    work, out = tmp_path / "work", tmp_path / "m.rac"
    pack_rank(model, work, ASKED, how=QUICK)
    given = ["pack", "--finish", "-q", "--work", work, "-o", out]
    ended = [said(tmp_path, p) for p in [start(tmp_path, given) for _ in range(3)]]
    assert sorted(code for code, _ in ended) == [0, 2, 2]
    for code, line in ended:
        assert (line.count("\n"), "another process is writing" in line or "exists already" in line) == (
            bool(code),
            bool(code),
        )
    assert out.read_bytes() == alone
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("m.rac")] == ["m.rac"]


@needs_fork
def test_the_number_of_ranks_may_change_between_restarts(model, alone, tmp_path):
    work = tmp_path / "work"
    first = ranks(tmp_path, model, work, [3, 1], 5)
    while not list(work.glob("*/*.json")):
        time.sleep(0.005)
    for process in first:
        process.kill()
        process.join()
    for process in ranks(tmp_path, model, work, [0, 1], 2, "--lease", "0.4"):
        assert said(tmp_path, process) == (0, "")
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


def test_other_instruction_sets_and_threads_make_the_same_file(model, alone, tmp_path):
    work = tmp_path / "work"
    running = []
    for rank, (kernels, threads) in enumerate([("generic", "1"), ("", "3")]):
        env = os.environ | {"RAC_CPU": kernels, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT / "codec")}
        argv = [*GIVEN, "--work", work, "--world", 2, "--rank", rank, "--jobs", threads]
        argv = [sys.executable, "-m", "rac.cli", "pack", model, *argv]
        running.append(subprocess.Popen([str(a) for a in argv], env={k: v for k, v in env.items() if v}))
    assert [process.wait() for process in running] == [0, 0]
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


@needs_fork
@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of files")
def test_a_rank_without_room_ends_and_the_others_go_on(model, alone, tmp_path):
    import resource

    work = tmp_path / "work"

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    argv = ["pack", model, *GIVEN, "--work", work, "--world", 2, "--rank", 0]
    code, line = said(tmp_path, start(tmp_path, argv, full))
    assert (code, line.startswith(f"rac: File too large [{work}"), line.count("\n")) == (2, True, 1)
    assert not [p for p in work.rglob("*") if p.name.startswith(".")]  # no half files
    assert said(tmp_path, ranks(tmp_path, model, work, [1], 2)[0]) == (0, "")
    out = tmp_path / "m.rac"
    code, line = said(tmp_path, start(tmp_path, ["pack", "--finish", "-q", "--work", work, "-o", out], full))
    assert (code, line.startswith("rac: File too large ["), line.count("\n")) == (2, True, 1)
    assert not out.exists()
    finish(work, out, how=QUICK)
    assert out.read_bytes() == alone


def powerless():
    """Take root's right to read and write what it may not."""
    if os.geteuid() == 0:
        head, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(head, none) == 0


@needs_fork
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' capabilities")
def test_a_work_folder_that_may_not_be_written_or_read(model, tmp_path):
    work = tmp_path / "work"
    pack_rank(model, work, Asked(), how=QUICK)
    for path in work.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for mode in (0o555, 0o000):
        work.chmod(mode)
        line = f"rac: Permission denied [{work}]\n"
        assert said(tmp_path, start(tmp_path, ["pack", model, "-q", "--work", work], powerless)) == (2, line)
        jobs = start(tmp_path, ["jobs", "-q", work], powerless)
        assert said(tmp_path, jobs) == ((0, "") if mode else (2, line))
    for path in (work, *work.rglob("*")):
        path.chmod(0o755)


@pytest.mark.parametrize("given", [["pack", "MODEL"], ["jobs"], ["pack", "--finish", "-o", "m.rac"]])
def test_a_work_folder_that_is_a_file(model, tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    work = str(tmp_path / "work")
    (tmp_path / "work").write_text("mine")
    where = [work] if given[0] == "jobs" else ["--work", work]
    assert cli.main([str(model) if g == "MODEL" else g for g in given] + where + ["-q"]) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), work in err) == (1, True)
    assert (tmp_path / "work").read_text() == "mine"


def test_a_number_that_is_no_rank(model, tmp_path, capsys):
    for rank, world, what in ((2, 2, "rank 2 is not one of 0 to 1"), (7, 1, "rank 7 is not one of 0 to 0")):
        argv = ["pack", str(model), *GIVEN, "--work", str(tmp_path / "w"), "--world", str(world), "--rank", str(rank)]
        assert cli.main(argv) == 2
        assert what in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_clocks_that_differ_by_years_change_nothing(model, alone, tmp_path, monkeypatch):
    work, clock = tmp_path / "work", time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 4e8)
    pack_rank(model, work, ASKED, rank=1, world=2, how=QUICK)
    monkeypatch.setattr(time, "time", lambda: clock() - 4e8)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone
    assert cli.main(["jobs", "-q", str(work)]) == 0


def resealed(path, **wrong):
    """A marker with something else in it, and a seal that is right again."""
    stated = json.loads(path.read_text())
    del stated["seal"]
    path.write_bytes(Marker(**stated | wrong).dump())


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 10},
        {"check": "00"},
        {"rows": []},
        {"rows": [["w0", 1]]},
        {"rows": [["nobody", 1, [1], [], {}, None]]},
        {"rows": "w"},
        {"rows": [[]]},
        {"size": "x"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", ["units", "scale"])
def test_a_marker_that_lies_under_a_seal_that_fits(model, alone, tmp_path, wrong, stage):
    work = tmp_path / "work"
    pack_rank(model, work, ASKED, how=QUICK)
    for path in work.glob(f"{stage}*/00002.json"):
        resealed(path, **wrong)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


def test_a_size_that_is_not_that_of_the_records(model, tmp_path):
    work = tmp_path / "work"
    pack_rank(model, work, ASKED, how=QUICK)
    path = max(work.glob("scale*"), key=lambda p: p.stat().st_mtime) / "00002.json"
    rows = json.loads(path.read_text())["rows"]
    rows[0][1] -= 1  # so little that the same scale is found
    resealed(path, rows=rows)
    with pytest.raises(OutputError, match=r"'w2' takes \d+ bytes, and its marker says \d+: remove the work folder"):
        finish(work, tmp_path / "m.rac", how=QUICK)
    assert not (tmp_path / "m.rac").exists()


def test_a_claim_that_is_no_claim_is_none(model, alone, tmp_path):
    work = tmp_path / "work"
    for data in (b"", b"[]", b'{"owner": 7, "lease": 60}', b'{"owner": "x", "lease": "y"}', b"\xff"):
        open_store(work).put("units/00000.claim", data)
        open_store(work).put("ranks/00000.json", data)
        assert pack_rank(model, work, ASKED, rank=1, world=2, how=QUICK).items
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


def test_another_user_of_the_name_of_a_rank(model, alone, tmp_path):
    """Two processes have one number: the one whose file was replaced counts as stopped, and both leave the same."""
    work = tmp_path / "work"
    with Heart(open_store(work), 0, 60) as other:
        open_store(work).put("units/00000.claim", json.dumps({"owner": other.owner, "lease": 60}).encode())
        pack_rank(model, work, ASKED, rank=0, world=1, how=QUICK)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


def test_a_source_that_is_not_there_is_said_where_it_is_looked_for(model, tmp_path):
    work, moved = tmp_path / "work", tmp_path / "moved.safetensors"
    moved.write_bytes(model.read_bytes())
    pack_rank(moved, work, ASKED, how=QUICK)
    moved.unlink()
    with pytest.raises(rac.SourceError, match=r"no such path.*moved\.safetensors"):
        finish(work, tmp_path / "m.rac", how=QUICK)
    finish(work, tmp_path / "m.rac", src=model, how=QUICK)
    damaged = bytearray(model.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    moved.write_bytes(damaged[:-4])
    with pytest.raises((OutputError, rac.SourceError)):
        pack_rank(moved, work, ASKED, how=QUICK)
