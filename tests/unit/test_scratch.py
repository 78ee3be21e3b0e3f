"""Temporary folders: gone with a process however it ends, and where it could not, with the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from rac import scratch
from rac.calibrate.folder import DamagedError, Folder
from rac.scratch import Scratch
from support import environment

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs locks that see who lives, and signals")

MAKE = """
import sys
from rac.scratch import Scratch
made = Scratch("test")
(made.path / "file").write_text("x")
print(made.path, flush=True)
sys.stdin.read()
"""
RANK = """
import sys
from rac.cli import main
from rac.ranks.packer import RankPacker

def wait(*_):
    print("works", flush=True)
    while sys.stdin.read():
        pass

RankPacker._mended = wait
sys.argv[1:1] = ["pack"]
sys.exit(main())
"""
ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated"), signal.SIGHUP: (129, "terminated")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for temporary ones, of this process too."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    scratch._sweep.cache_clear()
    yield place
    scratch._sweep.cache_clear()


def begin(place, script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, env=environment() | {"TMPDIR": str(place)}, text=True, **pipes)
    return process, process.stdout.readline().strip()


def test_gone_with_its_end_and_its_owner(place):
    with Scratch("a") as a:
        assert [p.name for p in a.path.iterdir()] == ["owner"]
    b = Scratch("b")
    assert not a.path.exists()
    assert b.path.exists()
    del b
    assert not [*place.iterdir()]


def test_what_a_killed_process_left_goes_and_nothing_else(place):
    (killed, gone), (living, kept) = begin(place, MAKE), begin(place, MAKE)
    killed.kill()
    killed.communicate()
    elsewhere, old = place / "rac-elsewhere", place / "rac-old"
    for folder, owner in (elsewhere, b"another machine"), (old, None):
        folder.mkdir()
        if owner:
            (folder / "owner").write_bytes(owner)
    assert os.path.exists(os.path.join(gone, "file"))
    with Scratch("new"):
        assert not os.path.exists(gone)
        assert os.path.exists(os.path.join(kept, "file"))
    assert elsewhere.exists()
    assert old.exists()
    assert living.communicate("")[1] == ""
    assert {*place.iterdir()} == {elsewhere, old}


def test_one_that_another_process_is_about_to_own_stays(place, monkeypatch):
    """Between making a folder and locking its file."""
    monkeypatch.setattr(scratch, "lock", lambda _: scratch._sweep_one(next(place.iterdir())))
    with Scratch("a") as a:
        assert (a.path / "owner").exists()


def test_a_forked_process_removes_nothing(place):
    a = Scratch("a")
    child = os.fork()
    if not child:
        a.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert a.path.exists()
    a.close()
    assert not a.path.exists()


def test_where_no_locks_are_known(place, monkeypatch):
    def unknown(_):
        raise OSError("no locks")

    monkeypatch.setattr(scratch, "lock", unknown)
    with Scratch("a") as a:
        scratch._sweep_one(a.path)
        assert a.path.exists()
    assert not [*place.iterdir()]


@pytest.mark.parametrize(("error", "stays"), [(ValueError, False), (KeyboardInterrupt, False), (DamagedError, True)])
def test_a_calibration_that_fails_leaves_nothing_to_its_traceback(place, error, stays):
    pytest.importorskip("filelock")
    folder = Folder(None, "")
    with pytest.raises(error), folder.alone(lambda: None):  # what is raised refers to the folder
        folder.put("a.npy", np.zeros(3))
        raise error("x")
    assert folder.path.exists() == stays


@pytest.mark.parametrize("number", ENDS, ids=lambda n: n.name)
def test_signals_leave_nothing(number, place, tmp_path):
    model = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"w": np.zeros((256, 160), np.float32)}, model)
    given = [model, "-q", "--work", tmp_path / "work", "--world", "2", "--rank", "0"]
    process, said = begin(place, RANK, *given)
    assert said == "works"
    assert [p.name[:10] for p in place.iterdir()] == ["rac-ranks-"]
    process.send_signal(number)
    code, text = ENDS[number]
    error = process.communicate()[1]
    assert (process.returncode, text in error, error.count("\n")) == (code, True, 1), error
    assert not [*place.iterdir()]
