"""Launchers: local processes, a job array of Slurm played by a shell, a local cluster of Ray."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from rac import launch
from rac.errors import OutputError
from support import ROOT

BITS = ["--bits", "3", "--calibrate", "none", "--effort", "fast"]


def test_local_processes_one_of_them_killed(model, alone, tmp_path, capsys):
    out, work = tmp_path / "m.rac", tmp_path / "work"
    mine = subprocess.Popen

    def first(argv, **how):
        process = mine(argv, **how)
        if not killed:
            killed.append(argv)
            process.send_signal(signal.SIGKILL)
        return process

    killed = []
    subprocess.Popen = first
    try:
        assert (
            launch.main(["local", "--workers", "2", str(model), "-o", str(out), *BITS, "--work", str(work), "-q"]) == 0
        )
    finally:
        subprocess.Popen = mine
    assert out.read_bytes() == alone
    assert "rank 0 was killed by signal 9, and is run again" in capsys.readouterr().err


def test_an_array_of_slurm(model, alone, tmp_path, capsys, monkeypatch):
    """`scontrol` is a script that writes down what it is asked; a task that gets USR1 is queued again."""
    out, work = tmp_path / "m.rac", tmp_path / "work"
    given = [
        "slurm",
        "--workers",
        "2",
        "--sbatch=--time=0:10:00",
        str(model),
        "-o",
        str(out),
        *BITS,
        "--work",
        str(work),
    ]
    assert launch.main([*given, "-q"]) == 0
    script = tmp_path / "job.sh"
    script.write_text(text := capsys.readouterr().out)
    assert "#SBATCH --array=0-1\n" in text
    assert "#SBATCH --time=0:10:00\n" in text
    stub = tmp_path / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    env = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "77"}
    env["PYTHONPATH"] = str(ROOT / "codec")
    first = subprocess.Popen(["bash", script], env=env | {"SLURM_ARRAY_TASK_ID": "1"})
    time.sleep(0.2)
    first.send_signal(signal.SIGUSR1)
    assert first.wait() != 0
    assert (tmp_path / "asked").read_text() == "requeue 77_1\n"
    for task in "1", "0":
        subprocess.run(["bash", script], env=env | {"SLURM_ARRAY_TASK_ID": task}, check=True)
    assert out.read_bytes() == alone


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["local", "m"], "give --work"),
        (["local", "--workers", "0", "m", "--work", "w"], "--workers must be at least 1"),
        (["slurm", "m", "--work", "w", "--rank", "1"], "--rank is the launcher's to give"),
    ],
)
def test_wrong_use_is_one_line(given, said, capsys):
    assert launch.main(given) == 2
    assert said in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert launch.main(["ray", "m", "--work", "w"]) == 2
    assert "pip install ray" in capsys.readouterr().err


class Ray:
    """One that starts after some attempts."""

    def __init__(self, fails):
        self.fails, self.begun = fails, 0

    def is_initialized(self):
        return False

    def init(self, address, log_to_driver):
        self.begun += 1
        if self.begun <= self.fails:
            raise RuntimeError("The current node timed out during startup.\nMore of it.")

    def shutdown(self):
        pass

    def remote(self, **_):
        raise OutputError("got as far as its tasks")


@pytest.mark.parametrize(
    ("fails", "more", "begun", "said"),
    [
        (2, [], 3, "got as far as its tasks"),
        (9, [], launch.STARTS, "Ray does not start here, or cannot be reached"),
        (9, ["--address", "10.0.0.1:6379"], 1, "Ray does not start here, or cannot be reached [10.0.0.1:6379]"),
    ],
)
def test_ray_that_does_not_start_is_tried_again_then_one_line(monkeypatch, capsys, fails, more, begun, said):
    ray = Ray(fails)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert launch.main(["ray", *more, "m", "--work", "w"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"rac.launch: {said}"
    assert ray.begun == begun
    assert len(lines) == min(fails, begun) + 1


@pytest.mark.slow  # a cluster takes seconds to start, on a busy machine minutes: pytest -m slow tests/unit/ranks
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_of_ray_one_worker_killed(model, alone, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    out, work = tmp_path / "m.rac", tmp_path / "work"
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "codec"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or it would write a token into the home folder
    for attempt in range(launch.STARTS):
        try:
            ray.init(num_cpus=4, log_to_driver=False, include_dashboard=False)
            break
        except Exception:  # 30 seconds are too few for it on a busy machine
            ray.shutdown()
            assert attempt + 1 < launch.STARTS
    killed = []

    def kill():
        """The first worker that says it is alive."""
        while not killed and not out.exists():
            for file in sorted(work.glob("ranks/0*.json")):
                owner = file.read_text().partition('"owner": "')[2].partition('"')[0]
                os.kill(int(owner.split("-")[-2]), signal.SIGKILL)
                killed.append(owner)
                break
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        given = [str(model), "-o", str(out), *BITS, "--work", str(work), "--lease", "1", "-q"]
        assert launch.main(["ray", "--workers", "4", *given]) == 0
    finally:
        thread.join()
        ray.shutdown()
    assert killed
    assert out.read_bytes() == alone


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
def test_a_launcher_that_is_stopped_stops_its_ranks(tmp_path):
    rng = np.random.default_rng(1)
    src, work = tmp_path / "m.safetensors", tmp_path / "work"
    save_file({f"w{i}": rng.standard_normal((1024, 1024)).astype(np.float32) for i in range(8)}, src)

    def ranks() -> list[str]:
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    line = f.read()
            except OSError:
                continue
            found += [pid] if str(work).encode() in line and b"rac.cli" in line else []
        return found

    argv = ["local", "--workers", "2", str(src), "-o", str(tmp_path / "m.rac"), *BITS[:-1], "max", "--work", str(work)]
    process = subprocess.Popen([sys.executable, "-m", "rac.launch", *argv, "-q"], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(ranks()) < 2 or not (work / "ranks").is_dir():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    while ranks():
        assert time.monotonic() < until + 60
        time.sleep(0.02)
    assert not (tmp_path / "m.rac").exists()
