"""Calibrated packs that ranks share."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import rac
from rac import cli
from rac.errors import SourceError
from rac.ranks import Asked, How, finish, pack_rank
from support.models import TEXT, write

QUICK = How(jobs=1, lease=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write("llama", path / "m")
    (path / "text.txt").write_text(TEXT * 3)
    return path


@pytest.fixture(scope="module")
def asked(folder):
    return Asked(bits=3.0, calibrate=[str(folder / "text.txt")], tokens=512, context=64, effort="fast")


@pytest.fixture(scope="module")
def alone(folder, asked):
    rac.pack(folder / "m", folder / "alone.rac", **asked.changed)
    return (folder / "alone.rac").read_bytes()


def together(folder, work, asked, world):
    threads = [
        threading.Thread(
            target=pack_rank, args=(folder / "m", work, asked), kwargs={"rank": r, "world": world, "how": QUICK}
        )
        for r in random.Random(0).sample(range(world), world)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


@pytest.mark.parametrize(("world", "url"), [(1, ""), (3, ""), (2, "memory://")])
def test_a_calibrated_pack_has_the_bytes_of_one_machine(folder, asked, alone, tmp_path, world, url):
    work = f"{url}{tmp_path}/work"
    together(folder, work, asked, world)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


def test_a_text_may_lie_elsewhere_but_is_the_same(folder, asked, tmp_path, capsys):
    other = tmp_path / "text.txt"
    other.write_text(TEXT * 3)
    given = ["--tokens", "512", "--context", "64", "--effort", "fast", "--work", str(tmp_path / "work")]
    pack_rank(folder / "m", tmp_path / "work", asked, how=QUICK)
    capsys.readouterr()
    assert cli.main(["pack", str(folder / "m"), "--bits", "3", "--calibrate", str(other), *given]) == 0
    other.write_text(TEXT * 2)
    assert cli.main(["pack", str(folder / "m"), "--bits", "3", "--calibrate", str(other), *given]) == 2
    assert "is the work folder of another job: texts" in capsys.readouterr().err


def test_what_is_wrong_with_a_calibration_is_said_by_each(folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("few")
    for rank in range(2):
        with pytest.raises(SourceError, match="tokens, at least"):
            pack_rank(
                folder / "m", tmp_path / "work", Asked(bits=3.0, calibrate=str(short)), rank=rank, world=2, how=QUICK
            )


def test_a_calibration_that_was_damaged_is_run_again(folder, asked, alone, tmp_path):
    work = tmp_path / "work"
    pack_rank(folder / "m", work, asked, how=QUICK)
    for made in work.glob("calibration*/*.calibration"):
        data = bytearray(made.read_bytes())
        data[-100:] = bytes(100)
        made.write_bytes(data)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


def test_another_version_of_torch_is_refused(folder, asked, tmp_path, monkeypatch):
    pack_rank(folder / "m", tmp_path, asked, how=QUICK)
    monkeypatch.setattr("rac.ranks.job.version", lambda package: "0.1" if package == "torch" else torch.__version__)
    with pytest.raises(rac.OutputError, match="there, 0.1 here|numpy"):
        pack_rank(folder / "m", tmp_path, asked, how=QUICK)
