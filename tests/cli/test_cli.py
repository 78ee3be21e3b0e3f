"""The `rac` command: exit codes, one-line errors, reports, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import rac
from rac.cli import main
from rac.container.access import FileAccess
from rac.container.reader import Archive
from rac.container.writer import Writer
from rac.encode.pack import pack_source
from rac.encode.sources import Attachment, Source, SourceTensor, from_arrays

st = pytest.importorskip("safetensors.numpy")
gguf = pytest.importorskip("gguf")
RAC = [sys.executable, "-m", "rac.cli"]


def weights(seed, *shape):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:-1], 1))) * 0.02).astype(np.float32)


@pytest.fixture
def run(capsys):
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def call(*args):
        try:
            code = main([str(a) for a in args])
        except SystemExit as e:
            code = e.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def model(tmp_path):
    """A safetensors file."""
    path = tmp_path / "m.safetensors"
    st.save_file({"a.weight": weights(1, 60, 70), "b": np.arange(5)}, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def packed(tmp_path, model):
    """Its archive."""
    path = tmp_path / "m.rac"
    rac.pack(model, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A sharded Hugging Face folder."""
    root = tmp_path / "hf"
    (root / "onnx").mkdir(parents=True)
    where = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        tensors = {f"layer.{i}.w": weights(i, 64, 80), f"layer.{i}.b": weights(i + 9, 80), f"same.{i}": np.ones(999)}
        st.save_file(tensors, root / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (root / "config.json").write_text("{}\n")
    (root / "onnx" / "größe.txt").write_bytes(bytes(range(256)))
    (root / "empty").write_bytes(b"")
    return root


def names(path):
    return sorted(p.name for p in path.iterdir())


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def refused(result, match, code=2):
    """One line on standard error, nothing on standard output."""
    assert (result[0], result[1]) == (code, "")
    assert re.fullmatch(rf"rac: [^\n]*{match}[^\n]*\n", result[2]), result[2]


# --- wrong use ------------------------------------------------------------------------------------


def test_sources_that_are_refused(run, tmp_path, model, packed):
    out = tmp_path / "new.rac"
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    for file in (tmp_path / "w.bin", tmp_path / "pickled" / "pytorch_model.bin"):
        file.write_bytes(pickle.dumps({"w": 1}))
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:-1])
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for src, match in (
        ("missing", "No such file"),
        ("note.txt", "no file of weights that rac knows"),
        ("empty", "no .*safetensors"),
        ("w.bin", "pickle"),
        ("pickled", "pickle"),
        ("cut.safetensors", "damaged safetensors"),
        ("cut.gguf", "damaged or unsupported GGUF"),
        ("m.rac", "already a .rac"),
    ):
        before = names(tmp_path)
        refused(run("pack", tmp_path / src, "-o", out), match)
        assert names(tmp_path) == before


def test_outputs_that_are_refused(run, tmp_path, model, packed):
    before = packed.read_bytes()
    refused(run("pack", model, "-o", packed), "exists already; give --force")
    refused(run("pack", model, "-o", packed, "--resume"), "exists already; give --force")
    refused(run("pack", model, "-o", tmp_path), "is a directory")
    refused(run("pack", model, "-o", tmp_path / "no" / "m.rac"), "No such file")
    assert packed.read_bytes() == before
    assert names(tmp_path) == ["m.rac", "m.safetensors"]
    code, out, err = run("pack", model, "-o", packed, "--force")
    assert (code, err) == (0, "")
    assert packed.read_bytes() == before
    original = model.read_bytes()
    refused(run("unpack", packed, "-o", model), "exists already; give --force")
    assert model.read_bytes() == original
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"mine")
    refused(run("unpack", packed, "-o", tmp_path / "out"), "exists already; give --force")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"mine"
    (tmp_path / "file").write_bytes(b"")
    assert run("unpack", packed, "-o", tmp_path / "file")[0] == 2
    assert run("unpack", packed, "-o", tmp_path / "out", "--force")[0] == 0
    assert st.load_file(tmp_path / "out" / "model.safetensors").keys() == {"a.weight", "b"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--jobs=-3"], "jobs must be at least 1"),
        (["--lanes", "0"], "lanes must be 1..1024"),
        (["--lanes", "1025"], "lanes must be 1..1024"),
        (["--shard-size", "0"], "positive"),
        (["--shard-size", "many"], "'many' is not a size"),
        (["--shard-size", ""], "not a size"),
        (["--shard-size=-5MB"], "not a size"),
        (["--include", "zzz*"], "no tensor matches"),
        (["--exclude", "*"], "no tensor is left"),
    ],
)
def test_options_that_are_refused(run, tmp_path, model, options, match):
    refused(run("pack", model, "-o", tmp_path / "x.rac", *options), match)
    assert names(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize(
    "args",
    [
        ["melt"],
        ["pack"],
        ["pack", "m", "-o", "x", "--level", "extreme"],
        ["pack", "m", "-o", "x", "--jobs", "two"],
        ["pack", "m", "-o", "x", "--lanes", "1.5"],
        ["unpack", "m", "-o", "x", "--jobs", "two"],
        ["info"],
        ["verify", "m", "--against"],
        ["pack", "m", "--bist", "3"],
    ],
)
def test_usage(run, args):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"rac[a-z ]*: .* \(see `rac[a-z ]* --help`\)\n", err)


def test_what_was_meant(run):
    assert "did you mean '--bits'?" in run("pack", "m", "--bist=3")[2]
    assert "did you mean 'verify'?" in run("verfy", "m")[2]
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "rac pack model/" in err


def test_archives_that_are_refused(run, tmp_path, packed, model):
    whole = packed.read_bytes()
    for command in (["info"], ["verify"], ["unpack", "-o", tmp_path / "out"]):
        refused(run(*command, tmp_path / "missing"), "No such file")
        refused(run(*command, model), "wrong magic", 1)
        packed.write_bytes(whole[:-1])
        refused(run(*command, packed), "cut off", 1)
        packed.write_bytes(whole[:8] + b"\x09" + whole[9:])
        refused(run(*command, packed), "version 9 is not supported", 1)
        packed.write_bytes(b"")
        assert run(*command, packed)[0] == 1
        packed.write_bytes(whole)
    (tmp_path / "folder").mkdir()
    refused(run("info", tmp_path / "folder"), "0 archives")
    refused(run("unpack", packed, "-o", tmp_path / "x", "--jobs", "0"), "at least 1")
    refused(run("verify", packed, "--against", tmp_path / "missing"), "No such file")
    assert not (tmp_path / "out").exists()


def test_help(run):
    for command in ([], ["pack"], ["unpack"], ["info"], ["verify"]):
        code, out, err = run(*command, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: {' '.join(['rac', *command])}")
    assert "usage" in run("-h")[1]
    assert run("--version") == (0, f"rac-codec {rac.__version__}\n", "")
    done = subprocess.run([*RAC, "info", "-h"], capture_output=True, text=True, check=True)
    assert "--tensors" in done.stdout


# --- full disks, interrupts, pipes -----------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.safetensors"
    st.save_file({f"{i:02}": weights(i, 256, 512) for i in range(16)}, path)
    return path


def shell(command, *args):
    return subprocess.run(["bash", "-c", command, "bash", *map(str, args)], capture_output=True, text=True, check=False)


def test_full_disk(tmp_path, large):
    out = tmp_path / "m.rac"
    code = f"ulimit -f 1000; exec {sys.executable} -m rac.cli"
    done = shell(f'{code} pack "$1" -o "$2"', large, out)
    refused((done.returncode, done.stdout, done.stderr), "File too large.*--resume")
    assert names(tmp_path) == ["large.safetensors", "m.rac.part"]
    done = subprocess.run([*RAC, "pack", large, "-o", out, "--resume"], capture_output=True, text=True, check=True)
    resumed = re.match(r"(\d+) of 16 tensors were finished already", done.stdout)
    assert 0 < int(resumed[1]) < 16
    rac.verify(out, large)

    for target in ("out.safetensors", "out"):
        done = shell(f'{code} unpack "$1" -o "$2"', out, tmp_path / target)
        refused((done.returncode, done.stdout, done.stderr), "File too large")
        assert not [p for p in tmp_path.rglob("out*") if p.is_file()]


def test_interrupt(tmp_path):
    large = tmp_path / "large.safetensors"
    st.save_file({f"{i:02}": weights(i, 256, 512) for i in range(48)}, large)
    out, part = tmp_path / "m.rac", tmp_path / "m.rac.part"
    with subprocess.Popen(
        [*RAC, "pack", large, "-o", out, "--level", "max", "-j1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a shell hands down that SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not part.exists() or part.stat().st_size < 500_000:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        printed, error = process.communicate()
    assert (process.returncode, printed) == (130, "")
    assert error == "rac: interrupted; the finished part is kept, run again with --resume\n"
    assert not out.exists()
    done = subprocess.run(
        [*RAC, "pack", large, "-o", out, "--level", "max", "--resume"], capture_output=True, text=True, check=True
    )
    assert int(re.match(r"(\d+) of 48 tensors", done.stdout)[1]) > 0
    rac.verify(out, large)


def seconds_of(process):
    """Seconds of a processor that a process took: waiting for them is as long as the machine is busy."""
    user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_interrupt_before_anything_is_written(tmp_path):
    large = tmp_path / "large.safetensors"
    st.save_file({f"{i:02}": weights(i, 512, 512) for i in range(40)}, large)
    with subprocess.Popen(
        [*RAC, "pack", large, "-o", tmp_path / "m.rac", "--bits", "3", "--calibrate", "none", "-j1", "--effort", "max"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        begun = None  # seconds of a processor; the first byte is written after more than ten
        while begun is None or seconds_of(process) < begun + 1:  # all is imported: importing may swallow a signal
            assert process.poll() is None
            time.sleep(0.01)
            if begun is None and "rac/native/_" in Path(f"/proc/{process.pid}/maps").read_text():  # the kernels
                begun = seconds_of(process)
        process.send_signal(signal.SIGINT)
        printed, error = process.communicate()
    assert (process.returncode, printed, error) == (130, "", "rac: interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["large.safetensors"]


def test_broken_pipe(tmp_path):
    rac.save_file({f"{'name' * 10}.{i}": np.array(i) for i in range(3000)}, tmp_path / "m.rac")
    for option in ("--json", "--tensors"):
        with subprocess.Popen(
            [*RAC, "info", option, tmp_path / "m.rac"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 0


def test_pipes(run, packed, folder, tmp_path):
    rac.pack(folder, tmp_path / "hf.rac")
    for path in (packed, tmp_path / "hf.rac"):
        expected = json.loads(run("info", path, "--json")[1]) | {"files": ["<stdin>"]}
        done = shell(f'cat "$1" | {sys.executable} -m rac.cli info - --json', path)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == expected
    done = shell(f'cat "$1" | {sys.executable} -m rac.cli verify -', packed)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("-: whole. 2 tensors")
    done = shell(f'head -c 700 "$1" | {sys.executable} -m rac.cli verify -', packed)
    refused((done.returncode, done.stdout, done.stderr), "ends early", 1)
    done = shell(f'cat "$1" | {sys.executable} -m rac.cli info /dev/stdin', packed)
    assert done.returncode == 0
    assert f"{packed.stat().st_size:,}" in done.stdout


# --- info ------------------------------------------------------------------------------------------


def archives(tmp_path, folder):
    """Archives of all kinds: paths, and the size of all their files."""
    rng = np.random.default_rng(0)
    tensors = {
        "lanes": weights(1, 300, 200),
        "raw": rng.integers(0, 256, 999, np.uint8),
        "zstd": np.zeros(5000),
        "0d": np.array(1.5),
        "none": np.zeros((3, 0)),
        "same": weights(1, 300, 200),
        "tiles": weights(3, 800, 700),
    }
    for level in ("fast", "default", "max"):
        rac.save_file(tensors, tmp_path / f"{level}.rac", {"a": "b"}, level=level)
        yield tmp_path / f"{level}.rac", (tmp_path / f"{level}.rac").stat().st_size
    rac.save_file({}, tmp_path / "nothing.rac")
    yield tmp_path / "nothing.rac", (tmp_path / "nothing.rac").stat().st_size
    rac.pack(folder, tmp_path / "hf.rac")
    yield tmp_path / "hf.rac", (tmp_path / "hf.rac").stat().st_size
    done = rac.pack(folder, tmp_path / "set.rac", shard_size=40_000)
    assert len(done.paths) == 3
    yield done.paths[1], sum(map(os.path.getsize, done.paths))
    writer = Writer(tmp_path / "newer.rac")
    writer.start({"features": []})
    writer.add(77, 1, {"what": "a record of a later version"}, [b"?" * 1000])
    writer.finish(bytes(16))
    yield tmp_path / "newer.rac", (tmp_path / "newer.rac").stat().st_size


def test_info_adds_up(run, tmp_path, folder):
    for path, size in archives(tmp_path, folder):
        code, out, err = run("info", path, "--json")
        assert (code, err) == (0, "")
        report = json.loads(out)
        assert report["size"] == size
        assert sum(report["bytes"].values()) == size
        stored = sum(t["bytes"] for t in report["tensors"])
        files = sum(a["bytes"] for a in report["attachments"])
        rest = sum(report["bytes"][k] for k in ("header", "index", "trailer", "other records"))
        assert stored + files + rest == size

        code, out, err = run("info", path, "--tensors")
        assert (code, err) == (0, "")
        lines = [re.fullmatch(r"    ([a-z ]+?) +([\d,]+)  (.*)", line) for line in out.splitlines()]
        shown = {m[1]: int(m[2].replace(",", "")) for m in lines if m}
        assert shown.pop("total") == size
        assert shown == {k: n for k, n in report["bytes"].items() if n}
        assert all(t["name"] in out for t in report["tensors"])


def test_info_of_tensors(run, tmp_path, folder):
    a = weights(1, 128, 300)
    rac.save_file(
        {"w": a, "tied": a, "equal": a.copy(), "scalar": np.array(2.5), "none": np.zeros((0, 3))}, tmp_path / "m.rac"
    )
    report = json.loads(run("info", tmp_path / "m.rac", "--json")[1])
    w, scalar, none = report["tensors"]
    (entry, *_) = Archive(FileAccess(tmp_path / "m.rac")).index.entries
    assert (w["name"], w["dtype"], w["shape"], w["method"]) == ("w", "F32", [128, 300], "lanes/1")
    assert (w["bytes"], w["dense"]) == (entry.size, a.nbytes)
    assert w["ratio"] == entry.size / a.nbytes
    assert w["bits_per_weight"] == 8 * entry.size / a.size
    assert w["aliases"] == [{"name": "tied", "tied": True}, {"name": "equal", "tied": False}]
    assert (scalar["dtype"], scalar["shape"], scalar["dense"]) == ("F64", [], 8)
    assert (none["shape"], none["dense"], none["ratio"], none["bits_per_weight"]) == ([0, 3], 0, None, None)
    assert (report["tensor_names"], report["weights"]) == (5, 3 * a.size + 1)
    assert report["dense"] == 3 * a.nbytes + 8
    assert report["provenance"]["source"] == "memory"

    rac.pack(folder, tmp_path / "hf.rac", include=["layer*"])
    report = json.loads(run("info", tmp_path / "hf.rac", "--json")[1])
    assert {x["name"] for x in report["attachments"]} == {
        "config.json",
        "empty",
        "model.safetensors.index.json",
        "onnx/größe.txt",
    }
    assert report["metadata"] == {"format": "pt"}
    assert report["provenance"]["include"] == ["layer*"]
    out = run("info", tmp_path / "hf.rac", "--tensors")[1]
    assert re.search(r"^layer\.1\.w +F32 +64x80 +lanes/1 +[\d,]+ +\d+\.\d\d% +\d+\.\d{3}$", out, re.MULTILINE)


# --- verify ----------------------------------------------------------------------------------------


def test_verify_names_the_damage(run, tmp_path, packed):
    code, out, err = run("verify", packed)
    assert (code, err) == (0, "")
    assert re.match(rf"{packed}: whole\. 2 tensors .*, 0 attachments, content [0-9a-f]{{32}}, ", out)
    whole = packed.read_bytes()
    archive = Archive(FileAccess(packed))
    for entry in archive.index.entries:
        record = archive.record(entry)
        flip(packed, record.payload + 3)
        refused(run("verify", packed), re.escape(f"checksum does not match [{packed}, {entry.name!r} unit 0"), 1)
        packed.write_bytes(whole)
        if record.payload_size % 64:
            flip(packed, record.end - 1)
            refused(run("verify", packed), "padding is not zero", 1)
            packed.write_bytes(whole)
    for at in (0, 20, 50, archive.index.at + 100, len(whole) - 10):
        flip(packed, at)
        code, out, err = run("verify", packed)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        packed.write_bytes(whole)
    packed.write_bytes(whole + b"\0")
    assert run("verify", packed)[0] == 1


def test_verify_against(run, tmp_path, model, packed, folder):
    code, out, err = run("verify", packed, "--against", model)
    assert (code, err) == (0, "")
    assert f"equal to {model}" in out
    tensors = st.load_file(model)
    meta = {"format": "pt"}
    nan = tensors["a.weight"].copy()
    nan.view(np.uint32)[7, 7] ^= 1
    for changed, metadata, match in (
        (tensors | {"a.weight": nan}, meta, r"differs from the source .*'a\.weight'"),
        (tensors | {"b": tensors["b"].astype(np.int32)}, meta, r"is I64 \[5\], the source has I32 \[5\] .*'b'"),
        (tensors | {"b": tensors["b"].reshape(5, 1)}, meta, r"source has I64 \[5, 1\]"),
        (tensors | {"c": tensors["b"]}, meta, "1 tensors are missing, one is 'c'"),
        ({"b": tensors["b"]}, meta, "1 tensors are not in the source, one is 'a.weight'"),
        (tensors, {"format": "np"}, "metadata differs"),
    ):
        st.save_file(changed, tmp_path / "other.safetensors", metadata=metadata)
        refused(run("verify", packed, "--against", tmp_path / "other.safetensors"), match, 1)

    rac.pack(folder, tmp_path / "hf.rac", exclude=["same*"])
    assert run("verify", tmp_path / "hf.rac", "--against", folder)[0] == 0
    (folder / "config.json").write_text("{} \n")
    refused(run("verify", tmp_path / "hf.rac", "--against", folder), "attachment differs .*config.json", 1)
    (folder / "config.json").unlink()
    refused(run("verify", tmp_path / "hf.rac", "--against", folder), "attachment differs .*config.json", 1)


# --- unpack ----------------------------------------------------------------------------------------


def equal(a, b):
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes()) for n in a
    )


def test_unpack_to_one_file(run, tmp_path, model, packed):
    out = tmp_path / "out.safetensors"
    assert run("unpack", packed, "-o", out) == (0, f"{out}\n", "")
    assert equal(st.load_file(out), st.load_file(model))
    assert rac.pack(out, tmp_path / "again.rac").stored == packed.stat().st_size
    assert (tmp_path / "again.rac").read_bytes() == packed.read_bytes()
    assert run("unpack", packed, "-o", tmp_path / "dir" / "sub")[0] == 0
    assert equal(st.load_file(tmp_path / "dir" / "sub" / "model.safetensors"), st.load_file(model))
    assert names(tmp_path / "dir" / "sub") == ["model.safetensors"]


def test_unpack_a_sharded_folder(run, tmp_path, folder):
    for options in ([], ["--shard-size", "30kB"]):
        assert run("pack", folder, "-o", tmp_path / "x.rac", *options)[0] == 0
        start = tmp_path / "x.rac" if not options else tmp_path / "x-00002-of-00003.rac"
        if options:
            assert names(tmp_path)[-3:] == [f"x-{i:05}-of-00003.rac" for i in (1, 2, 3)]
        assert run("verify", start, "--against", folder)[0] == 0
        target = tmp_path / f"out{len(options)}"
        code, out, err = run("unpack", start, "-o", target)
        assert (code, err) == (0, "")
        found = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
        assert {p.relative_to(target) for p in target.rglob("*") if p.is_file()} == found
        assert sorted(out.splitlines()) == sorted(str(target / p) for p in found)
        for path in found:
            if path.suffix == ".safetensors":
                assert equal(st.load_file(target / path), st.load_file(folder / path))
            else:
                assert (target / path).read_bytes() == (folder / path).read_bytes()
        one = tmp_path / f"one{len(options)}.safetensors"
        assert run("unpack", start, "-o", one)[0] == 0
        assert len(st.load_file(one)) == 9
        (tmp_path / "x.rac").unlink(missing_ok=True)


def write_gguf(path, alignment=None):
    """Dense and quantised tensors, equal ones apart from each other, odd sizes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("größe")
    writer.add_array("tokens", ["a", "b", "c"])
    if alignment:
        writer.add_custom_alignment(alignment)
    q = weights(5, 8, 256)
    for name, data, kind in (
        ("first", weights(1, 33, 5), None),
        ("q8", gguf.quantize(q, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0),
        ("q4", gguf.quantize(q, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0),
        ("half", weights(2, 3, 64).astype(np.float16), None),
        ("bf", gguf.quantize(weights(3, 4, 64), gguf.GGMLQuantizationType.BF16), gguf.GGMLQuantizationType.BF16),
        ("q8 again", gguf.quantize(q, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0),
        ("first again", weights(1, 33, 5), None),
        ("int", np.arange(7, dtype=np.int32), None),
    ):
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_gguf_comes_back_byte_for_byte(run, tmp_path, alignment):
    source = write_gguf(tmp_path / "m.gguf", alignment)
    assert run("pack", source, "-o", tmp_path / "m.rac")[0] == 0
    assert run("verify", tmp_path / "m.rac", "--against", source)[0] == 0
    assert run("unpack", tmp_path / "m.rac", "-o", tmp_path / "out.gguf") == (0, f"{tmp_path / 'out.gguf'}\n", "")
    assert (tmp_path / "out.gguf").read_bytes() == source.read_bytes()
    assert run("unpack", tmp_path / "m.rac", "-o", tmp_path / "out")[0] == 0
    assert names(tmp_path / "out") == ["model.gguf"]
    assert (tmp_path / "out" / "model.gguf").read_bytes() == source.read_bytes()
    with rac.open(tmp_path / "m.rac") as f:
        assert f.get_tensor("q8").shape == (8, 272)
        assert f.get_tensor("q8").dtype == np.uint8
        assert f.get_tensor("bf").dtype.name == "bfloat16"
    done = rac.pack(source, tmp_path / "s.rac", shard_size=2500)
    assert len(done.paths) > 1
    assert run("unpack", done.paths[0], "-o", tmp_path / "s.gguf")[0] == 0
    assert (tmp_path / "s.gguf").read_bytes() == source.read_bytes()


def test_gguf_in_part(run, tmp_path):
    source = write_gguf(tmp_path / "m.gguf")
    assert run("pack", source, "-o", tmp_path / "m.rac", "--include", "f*", "--exclude", "*again")[0] == 0
    refused(run("unpack", tmp_path / "m.rac", "-o", tmp_path / "out.gguf"), "not hold a whole GGUF")
    assert run("verify", tmp_path / "m.rac", "--against", source)[0] == 0
    assert run("unpack", tmp_path / "m.rac", "-o", tmp_path / "out.safetensors")[0] == 0
    assert equal(st.load_file(tmp_path / "out.safetensors"), {"first": weights(1, 33, 5)})


LEADING_OUT = ["../x", "/tmp/x", "a/../../x", "a\\x", "..\\x", "C:x", "a//x", "./x", "x\0"]


@pytest.mark.parametrize("name", [*LEADING_OUT, "", ".", "..", "a/"])
def test_attachments_that_lead_elsewhere(run, tmp_path, name):
    source = from_arrays({"a": np.arange(9.0)})
    pack_source(Source("hf", source.tensors, (Attachment(name, b"!"),), {}), tmp_path / "m.rac")
    refused(run("unpack", tmp_path / "m.rac", "-o", tmp_path / "deep" / "out"), "not allowed", 1)
    assert names(tmp_path) == ["m.rac"]
    assert run("unpack", tmp_path / "m.rac", "-o", tmp_path / "w.safetensors")[0] == 0  # the tensors are not lost
    assert names(tmp_path) == ["m.rac", "w.safetensors"]


@pytest.mark.parametrize("name", [f"{n}.safetensors" for n in LEADING_OUT] + [""])
def test_shards_that_lead_elsewhere(run, tmp_path, name):
    (a,) = from_arrays({"a": np.arange(9.0)}).tensors
    a = SourceTensor(a.name, a.dtype, a.shape, a.data, {"shard": name})
    pack_source(Source("hf", (a,), (), {}), tmp_path / "m.rac")
    refused(run("unpack", tmp_path / "m.rac", "-o", tmp_path / "deep" / "out"), "not allowed", 1)
    assert names(tmp_path) == ["m.rac"]


def test_files_that_collide(run, tmp_path):
    source = from_arrays({"a": np.arange(9.0)})
    file = Attachment("model.safetensors", b"!")
    pack_source(Source("hf", source.tensors, (file,), {}), tmp_path / "m.rac")
    refused(run("unpack", tmp_path / "m.rac", "-o", tmp_path / "out"), "name of a weight file", 1)
    pack_source(
        Source("hf", source.tensors, (Attachment("x", b"1"), Attachment("x/y", b"2")), {}),
        tmp_path / "m.rac",
        force=True,
    )
    code, out, err = run("unpack", tmp_path / "m.rac", "-o", tmp_path / "out")
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_unpack_of_damage_leaves_nothing(run, tmp_path, packed):
    archive = Archive(FileAccess(packed))
    flip(packed, archive.record(archive.index.entries[0]).payload + 100)
    for target in ("out.safetensors", "out"):
        refused(run("unpack", packed, "-o", tmp_path / target), "'a.weight'", 1)
        assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name.startswith(("out", "model"))]


# --- pack ------------------------------------------------------------------------------------------


def test_pack_reports(run, tmp_path, model, folder):
    code, out, err = run("pack", model, "-o", tmp_path / "m.rac")
    assert (code, err) == (0, "")
    size = (tmp_path / "m.rac").stat().st_size
    bits = 8 * size / (60 * 70 + 5)
    assert re.match(rf"{tmp_path}/m\.rac: 2 tensors, 16\.8 kB -> [\d.]+ kB \([\d.]+%, {bits:.3f} bits per weight", out)
    (folder / ".git").mkdir()
    code, out, err = run("pack", folder, "-o", tmp_path / "f.rac", "--resume")
    assert (code, err) == (0, "rac: not packed: .git/\n")
    assert out.startswith("0 of 9 tensors were finished already\n")
    assert (
        run("pack", model, "-o", tmp_path / "i.rac", "--include", "a.*", "--lanes", "64", "--level", "max", "-j", "3")[
            0
        ]
        == 0
    )
    assert rac.load_file(tmp_path / "i.rac").keys() == {"a.weight"}


# --- import ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["pack", "unpack", "info", "verify", "load", "shard", "compare", "analyze", "generate"]
)
def test_commands_import_torch_when_they_need_it(command, model, packed, tmp_path):
    """Its import takes a second: more than packing a small model."""
    argv = {
        "pack": [model, "-o", tmp_path / "new.rac"],
        "unpack": [packed, "-o", tmp_path / "new.safetensors"],
        "info": [packed],
        "verify": [packed, "--against", model],
        "load": [packed],
        "shard": [packed, "-o", tmp_path / "shards", "--shard-size", "9000"],
    }.get(command, ["--help"])
    code = """if True:
        import contextlib, sys
        from rac.cli import main
        with contextlib.suppress(SystemExit):
            assert main(sys.argv[1:]) == 0
        assert not {"torch", "transformers", "triton", "numba"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code, command, *argv], check=True, capture_output=True)


def test_import_is_light():
    code = """if True:
        import sys, time
        start = time.process_time()
        import rac
        took = time.process_time() - start
        heavy = {"numpy", "torch", "triton", "numba", "constriction", "msgpack", "zstandard", "xxhash", "ml_dtypes"}
        print(took, *sorted(heavy & sys.modules.keys()))
    """
    times = []
    for _ in range(5):
        took, *heavy = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        assert heavy == []
        times.append(float(took))
    assert min(times) < 0.1


def test_reading_needs_no_torch_and_no_numba(tmp_path):
    rac.save_file({"a": weights(1, 64, 64)}, tmp_path / "m.rac")
    code = (
        "import sys, rac; rac.load_file(sys.argv[1]); print(*sorted({'torch', 'triton', 'numba'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.rac"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_public_names():
    assert set(dir(rac)) == set(rac.__all__)
    assert all(getattr(rac, name) is not None for name in rac.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'melt'"):
        _ = rac.melt
    assert Path(rac.__file__).with_name("py.typed").exists()
