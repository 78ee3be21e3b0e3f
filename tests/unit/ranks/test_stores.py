"""Work folders that are no disk: an object store by S3's protocol, and a store that shows late and fails at times."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from importlib.util import find_spec

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rac import cli
from rac.errors import OutputError, SourceError
from rac.ranks import Asked, How, finish, look, open_store, pack_rank, store
from support import ROOT

ASKED = Asked(bits=3.0, calibrate="none", effort="fast")
GIVEN = ["--bits", "3", "--calibrate", "none", "--effort", "fast", "-q"]


class Moody(MemoryFileSystem):
    """Lists nothing, shows a file only when it was asked for a few times, and fails at every tenth request or so."""

    protocol = "moody"
    store: dict = {}
    pseudo_dirs: list = [""]
    lock = threading.Lock()
    asked: dict = {}
    failed: list = []
    chance = random.Random(3)
    never = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("moody://", "memory://"))

    def _ask(self, path, late):
        with self.lock:
            if self.never or self.chance.random() < 0.1:
                self.failed.append(path)
                raise OSError("503 Slow Down")
            self.asked[path] = self.asked.get(path, 0) + 1
            if late and self.asked[path] < 3:
                raise FileNotFoundError(path)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._ask(path, late=True)
        return super().cat_file(path, start, end, **kwargs)

    def size(self, path):
        self._ask(path, late=True)
        return super().size(path)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._ask(path, late=False)
        return super().pipe_file(path, value, mode=mode, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        self._ask(rpath, late=False)
        return super().put_file(lpath, rpath, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        return []


@pytest.fixture
def moody(monkeypatch):
    fsspec.register_implementation("moody", Moody, clobber=True)
    for name in ("store", "asked"):
        monkeypatch.setattr(Moody, name, {})
    monkeypatch.setattr(Moody, "failed", [])
    monkeypatch.setattr(store, "BACKOFF", 0.001)
    monkeypatch.setattr(store, "WAITS", (0.001,) * 8)
    return Moody


def test_a_store_that_shows_late_and_fails_at_times(model, alone, tmp_path, moody):
    work, wrong = f"moody://{tmp_path.name}/work", []

    def one(rank):
        try:
            pack_rank(model, work, ASKED, rank=rank, world=4, how=How(jobs=1, lease=0.5))
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    finish(work, tmp_path / "m.rac", src=model, asked=ASKED, how=How(jobs=1, lease=0.5))
    assert not wrong
    assert (tmp_path / "m.rac").read_bytes() == alone
    assert len(moody.failed) > 5
    assert {rank.rank for rank in look(open_store(work)).ranks} <= {0, 1, 2, 3}


def test_a_store_that_fails_each_time_is_one_line(model, tmp_path, moody, monkeypatch, capsys):
    work = f"moody://{tmp_path.name}/work"
    monkeypatch.setattr(moody, "never", True)
    assert cli.main(["pack", str(model), "--work", work, *GIVEN]) == 2
    assert capsys.readouterr().err == f"rac: 503 Slow Down; gave up after 7 attempts [{work}]\n"
    folder = open_store(work)
    with pytest.raises(OutputError, match="gave up after 7 attempts"):
        folder.put("a", b"")
    with pytest.raises(OutputError, match="gave up after 7 attempts"), folder.writing("a") as f:
        f.write(b"1")
    with pytest.raises(SourceError, match="503 Slow Down"):
        folder.access("a")


def test_what_cannot_change_is_not_asked_for_again(tmp_path, moody, monkeypatch):
    def refused(*_, **__):
        asked.append(1)
        raise PermissionError("Access Denied")

    asked = []
    monkeypatch.setattr(moody, "cat_file", refused)
    with pytest.raises(SourceError, match="Access Denied"):
        open_store("moody://w").get("job.json")
    assert len(asked) == 1


def test_nothing_is_sent_of_a_file_that_an_error_cut_off(tmp_path, moody):
    folder = open_store("moody://w")
    with pytest.raises(KeyboardInterrupt), folder.writing("a") as f:
        f.write(b"1")
        raise KeyboardInterrupt
    assert not moody.store


def test_a_driver_that_is_missing_is_one_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.chdir(tmp_path)
    for command in (
        ["pack", str(model), *GIVEN, "--work", "s3://bucket/job"],
        ["pack", "--finish", "-q", "-o", "m.rac", "--work", "s3://bucket/job"],
        ["jobs", "s3://bucket/job"],
    ):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.splitlines() == [
            "rac: s3://bucket/job needs a package that is not installed (Install s3fs to access S3)"
        ]


@pytest.mark.slow  # servers and processes: pytest -m slow tests/unit/ranks
@pytest.mark.skipif(not (find_spec("moto") and find_spec("s3fs")), reason="pip install 'moto[server]' s3fs")
def test_four_ranks_by_the_protocol_of_s3(model, alone, tmp_path):
    code = "from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', 0, verbose=False); s.start()"
    code += "; print(s.get_host_and_port()[1], flush=True); input()"
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    port = server.stdout.readline().strip()
    env = os.environ | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    env |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "PYTHONPATH": str(ROOT / "codec"), "NO_PROXY": "127.0.0.1"}

    def rac_(*given):
        how = {"env": env, "cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-m", "rac.cli", *map(str, given)], **how)

    def done(process):
        out, err = process.communicate()
        return process.returncode, out, err

    try:
        assert done(rac_("pack", model, *GIVEN, "--work", "s3://nobody/job")) == (
            2,
            "",
            "rac: The specified bucket does not exist [s3://nobody/job]\n",
        )
        make = "import s3fs; s3fs.S3FileSystem().mkdir('bucket')"
        subprocess.run([sys.executable, "-c", make], env=env, check=True)
        ranks = [
            rac_("pack", model, *GIVEN, "--work", "s3://bucket/job", "--world", 4, "--rank", rank, "--lease", 5)
            for rank in range(4)
        ]
        ranks[2].kill()
        codes = [done(process) for process in ranks]
        assert [code for code, *_ in codes[:2] + codes[3:]] == [0, 0, 0], codes
        assert done(rac_("pack", "--finish", "-q", "-o", "m.rac", "--work", "s3://bucket/job", "--lease", 5))[0] == 0
        assert (tmp_path / "m.rac").read_bytes() == alone
        code, said, _ = done(rac_("jobs", "s3://bucket/job"))
        assert (code, "ended: " in said) == (0, True)
        assert done(rac_("jobs", "--clean", "-q", "s3://bucket/job")) == (0, "", "")
        assert "holds no job" in done(rac_("jobs", "s3://bucket/job"))[2]
    finally:
        server.communicate("\n")
