"""`rac load`, `rac shard`, `rac merge`, and URLs."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import rac
from rac.cli import main
from rac.cli.load import busy_time
from support.servers import Server

TENSORS = {f"t{i}": np.random.default_rng(i).standard_normal((300, 500)).astype(np.float32) for i in range(6)}


@pytest.fixture
def path(tmp_path):
    rac.save_file(TENSORS, tmp_path / "m.rac")
    return tmp_path / "m.rac"


def run(capsys, *args):
    code = main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("more", [(), ("--bench",), ("-j", "1", "--ring", "1MB")])
def test_load(path, capsys, more, tmp_path):
    code, out, err = run(capsys, "load", path, *more, "--timeline", tmp_path / "t.svg")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.match(rf"{path}: 6 tensors, 3\.\d MB -> 3\.6 MB in \d+\.\d+ s, \d+\.\d\d GB/s$", lines[0])
    assert re.match(r"  decoder  CPU \(.*, \d threads?\)$", lines[1])
    assert re.match(r"  read +3\.\d MB in +\d+\.\d+ s +\d+\.\d+ GB/s$", lines[2])
    assert re.match(r"  decode +3\.6 MB in +\d+\.\d+ s +\d+\.\d+ GB/s$", lines[3])
    assert re.match(r"  memory +\d+\.\d [MG]B at most$", lines[4])
    root = ET.parse(tmp_path / "t.svg").getroot()
    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if len(e)]
    assert {e.get("fill") for e in bars} == {"#4477aa", "#ee6677"}


def test_time_at_work():
    def event(a, b):
        return ("read", a, b, 1, 0)

    assert busy_time([]) == 0
    assert busy_time([event(4, 5), event(0, 2), event(1, 3), event(1.5, 1.7)]) == 4


def test_loads_that_fail(path, capsys, tmp_path):
    assert run(capsys, "load", tmp_path / "none.rac")[0] == 2
    assert run(capsys, "load", path, "--ring", "x")[0] == 2
    code, _, err = run(capsys, "load", path, "--ring", "1")
    assert (code, err) == (2, "rac: ring must be at least 65536 bytes\n")
    code, _, err = run(capsys, "load", path, "--timeline", tmp_path / "no" / "t.svg")
    assert code == 2 and "No such file" in err
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, out, err = run(capsys, "load", path)
    assert (code, out) == (1, "")
    assert "checksum" in err


def test_shard_and_merge(path, capsys, tmp_path):
    code, out, _ = run(capsys, "shard", path, "-o", tmp_path / "s", "--size", "1.2MB")
    assert code == 0
    assert out.splitlines() == [str(tmp_path / "s" / f"m-0000{k}-of-00003.rac") for k in (1, 2, 3)]
    code, out, _ = run(capsys, "merge", tmp_path / "s", "-o", tmp_path / "back.rac")
    assert (code, out) == (0, f"{tmp_path / 'back.rac'}\n")
    assert (tmp_path / "back.rac").read_bytes() == path.read_bytes()
    code, _, err = run(capsys, "merge", tmp_path / "s", "-o", tmp_path / "back.rac")
    assert code == 2 and "exists already" in err
    assert run(capsys, "merge", tmp_path / "s", "-o", tmp_path / "back.rac", "--force")[0] == 0
    for size in ("0", "many"):
        assert run(capsys, "shard", path, "-o", tmp_path / "t", "--size", size)[0] == 2


def test_commands_take_urls(path, capsys, tmp_path):
    pytest.importorskip("aiohttp")
    run(capsys, "shard", path, "-o", tmp_path / "s", "--size", "1.2MB")
    files = {p.name: p.read_bytes() for p in (path, *sorted((tmp_path / "s").iterdir()))}
    with Server(files) as server:
        code, out, _ = run(capsys, "info", server.url("m.rac"))
        assert code == 0 and "6 names" in out
        assert server.sent <= 4096 + 65536
        assert run(capsys, "load", server.url("m-00002-of-00003.rac"))[1].startswith(
            f"{server.url('m-00002-of-00003.rac')}: 6 tensors"
        )
        assert run(capsys, "verify", server.url("m.rac"))[0] == 0
        assert run(capsys, "unpack", server.url("m.rac"), "-o", tmp_path / "back")[0] == 0
        code, _, err = run(capsys, "info", server.url("none.rac"))
        assert (code, err) == (2, f"rac: the server answers 404 Not Found [{server.url('none.rac')}]\n")
