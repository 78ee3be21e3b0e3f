"""Every failure of every command: one line on standard error, the exit code that the help states, nothing left."""

from __future__ import annotations

import builtins
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import rac
from rac.cli import EPILOG, main, parser

st = pytest.importorskip("safetensors.numpy")
RAC = [sys.executable, "-m", "rac.cli"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An archive; one with a flipped byte; one that is cut; a source; a text."""
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": (rng.standard_normal((256, 512)) * 0.02).astype(np.float32) for i in range(3)}
    st.save_file(tensors, root / "m.safetensors")
    rac.save_file(tensors, root / "good.rac")
    data = bytearray((root / "good.rac").read_bytes())
    (root / "cut.rac").write_bytes(data[: len(data) // 2])
    data[len(data) // 2] ^= 4
    (root / "flipped.rac").write_bytes(data)
    (root / "text.txt").write_text("a text " * 100)
    return root


COMMANDS = {
    "pack": "pack {file} -o {out}",
    "unpack": "unpack {file} -o {out}",
    "info": "info {file}",
    "verify": "verify {file}",
    "ls": "ls {file}",
    "cat": "cat {file} a",
    "diff": "diff {files}/m.safetensors {file}",
    "against": "verify {files}/good.rac --against {file}",
    "compare": "compare {files}/m.safetensors {file}",
    "analyze": "analyze {file}",
    "load": "load {file}",
    "shard": "shard {file} -o {out} --size 1MB",
    "merge": "merge {file} -o {out}",
    "generate": "generate {file} Once",
    "push": "push {file} org/name --dry-run",
    "perplexity": "perplexity {file} --text {files}/text.txt",
    "jobs": "jobs {file}",
    "hf": "pack {file} -o {out} --format hf",
}


def run(capsys, line):
    """(exit code, standard output, standard error)."""
    code = main(line.split())
    out = capsys.readouterr()
    return code, out.out, out.err


def one_line(err):
    assert re.fullmatch(r"rac: [^\n]+\n", err), err


def test_the_table_has_every_command():
    commands = next(a for a in parser()._actions if a.choices and "pack" in a.choices).choices
    assert {line.split()[0] for line in COMMANDS.values()} == set(commands) - {"completion"}  # which opens no file
    for command in commands.values():  # and each says what its exit codes mean
        assert EPILOG in command.format_help()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_path_that_is_not_there(files, tmp_path, capsys, name):
    line = COMMANDS[name].format(files=files, file=tmp_path / "nothing.rac", out=tmp_path / "out")
    code, out, err = run(capsys, line)
    assert code == 2 and "nothing.rac" in err
    assert not out or name == "compare"  # which prints the rows that it has
    one_line(err)
    assert os.listdir(tmp_path) == []


MODELS = ("generate", "perplexity", "hf")  # these say first that the file holds no model
PARTS = ("unpack", "verify", "load", "merge", "shard")


@pytest.mark.parametrize(
    ("kind", "name"), [*(("cut", n) for n in (*PARTS, *MODELS, "ls", "cat", "diff")), *(("flipped", n) for n in PARTS)]
)
def test_damage(files, tmp_path, capsys, name, kind):
    if name in MODELS:
        pytest.importorskip("transformers")
    code, out, err = run(capsys, COMMANDS[name].format(files=files, file=files / f"{kind}.rac", out=tmp_path / "out"))
    assert (code, out) == (1, "") and f"{kind}.rac" in err
    one_line(err)
    assert os.listdir(tmp_path) == []


def test_info_of_a_cut_file(files, capsys):
    code, _, err = run(capsys, f"info {files}/cut.rac")
    assert code == 1
    one_line(err)


@pytest.mark.parametrize("name", ["pack", "unpack", "shard", "merge", "hf"])
def test_an_output_that_cannot_be(files, tmp_path, capsys, name):
    """Below a file."""
    if name == "hf":
        pytest.importorskip("transformers")
    (tmp_path / "file").write_text("")
    source = files / ("m.safetensors" if name in ("pack", "hf") else "good.rac")
    out = tmp_path / "file" / "deeper" / "out"
    code, out, err = run(capsys, COMMANDS[name].format(files=files, file=source, out=out))
    assert (code, out) == (2, "") and "--resume" not in err
    one_line(err)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["unpack", "shard", "merge"])
def test_a_full_disk(files, tmp_path, name):
    line = COMMANDS[name].format(files=files, file=files / "good.rac", out=tmp_path / "out")
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 500; exec {' '.join(RAC)} {line}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "") and "File too large" in done.stderr
    assert "--resume" not in done.stderr  # there is none
    one_line(done.stderr)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["unpack", "load", "verify", "info"])
@pytest.mark.parametrize(
    ("error", "match"),
    [
        (OSError(5, "Input/output error", "/dev/sda"), r"Input/output error \[/dev/sda\]"),
        (MemoryError(), "not enough memory"),
        (ImportError("No module named 'xyz'"), "No module named 'xyz'"),
    ],
)
def test_whatever_the_machine_lacks(files, tmp_path, capsys, monkeypatch, name, error, match):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("rac.container.access.FileAccess.read_into", broken)
    code, out, err = run(capsys, COMMANDS[name].format(files=files, file=files / "good.rac", out=tmp_path / "out"))
    assert (code, out) == (2, "") and re.search(match, err)
    one_line(err)


def test_a_missing_extra(files, capsys, monkeypatch):
    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    for name in ("rac.runtime", "rac.runtime.text", "rac.runtime.folder", "rac.runtime.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    code, out, err = run(capsys, f"analyze {files} --text {files}/text.txt")
    assert (code, out) == (2, "")
    one_line(err)


def test_an_output_that_takes_no_more(files):
    for line in (f"info {files}/good.rac", f"verify {files}/good.rac"):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*RAC, *line.split()], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2 and "No space left" in done.stderr
        one_line(done.stderr)


def test_an_interrupt_in_a_pipe_that_stands_still(files):
    data = (files / "good.rac").read_bytes()
    with subprocess.Popen(
        [*RAC, "verify", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        process.stdin.write(data[:100_000])
        process.stdin.flush()
        while len(os.listdir(f"/proc/{process.pid}/task")) < 2:  # until somebody reads the pipe
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        process.wait(30)
        assert (process.returncode, process.stdout.read()) == (130, b"")
        assert process.stderr.read() == b"rac: interrupted\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--bits 0", "--bits is a number above 0, not 0"),
        ("--snr nan", "--snr is a number above 0, not nan"),
        ("--bits 3 --size 9MB", "--bits and --size are 2 budgets: give one of them"),
        ("--effort max --tokens 9", "--tokens, --effort: for lossy packing; give one of --bits"),
        ("--bits 3 --keep nosuch", "no tensor matches the pattern 'nosuch' of what is to be kept"),
        ("--bits 3 --keep nosuch --dry-run", "no tensor matches the pattern 'nosuch' of what is to be kept"),
        ("--bits 3 --measure {root}/nofile", "the text cannot be read"),
        ("--bits 3 --report {root}/no/r.json", "the folder of the report is not there"),
        ("--size 1000", "1000 bytes cannot be met: the nearest is about"),
    ],
)
def test_what_a_lossy_pack_is_asked_for(files, tmp_path, capsys, options, said):
    argv = ["pack", str(files / "m.safetensors"), "-o", str(tmp_path / "m.rac"), *options.format(root=files).split()]
    assert main(argv) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_no_source(tmp_path, capsys):
    (tmp_path / "graph").mkdir()
    for name in ("m.onnx", "m.bin"):
        (tmp_path / "graph" / name).touch()
    for src, said in {
        "http://host/a.safetensors": "only archives are read from a URL",
        str(tmp_path / "graph"): "name the .onnx file itself (m.onnx)",
    }.items():
        assert main(["pack", src, "-o", str(tmp_path / "m.rac")]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 0}, "^bits is a number above 0, not 0$"),
        ({"bits": 3, "kl": 0.1}, "^bits and kl are 2 budgets: give one of them$"),
        ({"effort": "max", "keep": ["w0"]}, "^effort, keep: for a lossy pack; give one of bits"),
    ],
)
def test_what_python_asks_of_a_lossy_pack(files, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        rac.pack(files / "m.safetensors", tmp_path / "m.rac", **options)
