"""`rac ls`, `rac cat`, `rac diff`, `rac completion`, and what all commands share: --json, --quiet, pipes, names."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import rac
from rac.cli import COMMANDS, main

RAC = [sys.executable, "-m", "rac"]


@pytest.fixture
def run(capsysbinary):
    def call(*args):
        try:
            code = main([str(a) for a in args])
        except SystemExit as e:
            code = e.code
        out, err = capsysbinary.readouterr()
        return code, out, err.decode()

    return call


@pytest.fixture
def packed(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((64, 32)).astype(np.float32),
        "b.weight": rng.standard_normal((8, 8)).astype(ml_dtypes.bfloat16),
        "c": np.arange(5),
    }
    rac.save_file(tensors, tmp_path / "m.rac")
    return tmp_path / "m.rac", tensors


def test_ls(run, packed):
    path, _ = packed
    code, out, _ = run("ls", path)
    assert code == 0
    assert [line.split()[:3] for line in out.decode().splitlines()] == [
        ["a.weight", "F32", "64x32"],
        ["b.weight", "BF16", "8x8"],
        ["c", "I64", "5"],
    ]
    rows = json.loads(run("ls", path, "--match", "*.weight", "--json")[1])
    assert [(r["name"], r["nbytes"]) for r in rows] == [("a.weight", 8192), ("b.weight", 128)]
    code, _, err = run("ls", path, "--match", "nothing")
    assert code == 2
    assert "holds no tensor that matches 'nothing'" in err


def test_cat(run, packed):
    path, tensors = packed
    code, out, err = run("cat", path, "a.weight")
    assert (code, err) == (0, "")
    assert np.array_equal(np.load(io.BytesIO(out)), tensors["a.weight"])
    code, out, err = run("cat", path, "b.weight")
    assert "written as float32" in err
    assert np.array_equal(np.load(io.BytesIO(out)), tensors["b.weight"].astype(np.float32))
    assert run("cat", path, "b.weight", "--raw")[1] == tensors["b.weight"].tobytes()
    code, out, err = run("cat", path, "a.wieght")
    assert (code, out) == (2, b"")
    assert "did you mean 'a.weight'?" in err


def test_diff(run, packed, tmp_path):
    path, tensors = packed
    code, out, _ = run("diff", path, path)
    assert code == 0
    assert out.startswith(b"3 tensors: 3 equal by the digests that both archives state (rac verify checks these), 0 d")
    other = dict(tensors)
    other["a.weight"] = tensors["a.weight"].copy()
    other["a.weight"][3, 4] += 0.5
    other["b.weight"] = tensors["b.weight"].astype(np.float32)
    other["d"] = other.pop("c")
    rac.save_file(other, tmp_path / "n.rac")
    code, out, _ = run("diff", path, tmp_path / "n.rac", "--json")
    assert code == 1
    found = {d["name"]: d for d in json.loads(out)["differences"]}
    assert found["a.weight"]["largest"] == pytest.approx(0.5, rel=1e-5)
    assert found["a.weight"]["unequal"] == 1
    assert found["a.weight"]["snr"] == pytest.approx(
        10 * np.log10(np.square(tensors["a.weight"]).sum() / 0.25), abs=0.01
    )
    assert (found["b.weight"]["what"], found["b.weight"]["unequal"]) == ("BF16 in A, F32 in B", 0)
    assert (found["c"]["what"], found["d"]["what"]) == ("only in A", "only in B")
    out = run("diff", path, tmp_path / "n.rac")[1]
    assert b"a.weight: differs: " in out and b"4 tensors: 0 equal, 4 differ" in out


def test_diff_of_a_gguf_file_and_its_archive(run, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a.weight", np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run("pack", tmp_path / "m.gguf", "-o", tmp_path / "g.rac")[0] == 0
    code, out, _ = run("diff", tmp_path / "m.gguf", tmp_path / "g.rac")
    assert (code, out) == (0, b"1 tensors: 1 equal, 0 differ; 0 files differ\n")


def test_a_pipe_takes_an_archive_and_gives_it(packed, tmp_path, run):
    path, _ = packed
    run("unpack", path, "-o", tmp_path / "m.safetensors")
    made = subprocess.run([*RAC, "pack", tmp_path / "m.safetensors", "-o", "-"], capture_output=True, check=True)
    assert b"3 tensors" in made.stderr
    (tmp_path / "piped.rac").write_bytes(made.stdout)
    assert rac.verify(tmp_path / "piped.rac", tmp_path / "m.safetensors").tensors == 3
    assert not (tmp_path / "-").exists()
    code, _, err = run("pack", tmp_path / "m.safetensors", "-o", "-", "--resume")
    assert code == 2
    assert "does not go with --resume" in err


def test_names_where_none_are_given(packed, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("unpack", "m.rac")[:2] == (0, b"m/model.safetensors\n")
    assert run("unpack", "m.rac")[0] == 2  # it is there already
    assert run("pack", "m", "-q")[:2] == (2, b"")  # m.rac too
    (tmp_path / "m.rac").unlink()
    assert run("pack", "m", "-q")[:2] == (0, b"")
    assert rac.verify("m.rac", "m").tensors == 3


def test_json_is_all_of_standard_output(packed, tmp_path, run):
    path, _ = packed
    calls = (
        ["info", path],
        ["verify", path],
        ["load", path],
        ["unpack", path, "-o", tmp_path / "out"],
        ["pack", tmp_path / "out", "-o", tmp_path / "again.rac"],
        ["shard", path, "-o", tmp_path / "shards", "--size", "5kB"],
        ["merge", tmp_path / "shards", "-o", tmp_path / "merged.rac"],
    )
    for call in calls:
        code, out, err = run(*call, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)


def test_quiet(packed, run):
    assert run("verify", packed[0], "-q") == (0, b"", "")
    assert run("ls", packed[0], "-q") == (0, b"", "")


def test_completion(packed, tmp_path):
    script = tmp_path / "rac.bash"
    for shell in ("bash", "zsh", "fish"):
        out = subprocess.run([*RAC, "completion", shell], capture_output=True, check=True, text=True).stdout
        assert all(name in out for name in COMMANDS)
        if shell == "bash":
            script.write_text(out)
    ask = f'source {script}; COMP_WORDS=(rac pack --lev); COMP_CWORD=2; _rac; echo "${{COMPREPLY[@]}}"'
    ask += '; COMP_WORDS=(rac pack --level ""); COMP_CWORD=3; _rac; echo "${COMPREPLY[@]}"'
    out = subprocess.run(["bash", "-c", ask], capture_output=True, check=True, text=True).stdout
    assert out.splitlines() == ["--level", "fast default max"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of one file: matrices that are quantised, and some that are not."""
    where, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(1)
    tensors = {f"l.{i}.weight": rng.standard_normal((256, 192)).astype(ml_dtypes.bfloat16) for i in range(4)}
    tensors["embed.weight"] = rng.standard_normal((512, 64)).astype(ml_dtypes.bfloat16)
    rac.save_file(tensors, where / "m.rac")
    rac.unpack(where / "m.rac", where / "m.safetensors")
    return where


@pytest.mark.parametrize("asked", [(), ("--level", "max"), ("--bits", "3"), ("--size", "90kB"), ("--quality", "good")])
def test_a_dry_run_says_what_the_pack_then_takes(folder, tmp_path, run, asked):
    calibration = () if asked in ((), ("--level", "max")) else ("--calibrate", "none")
    call = ("pack", folder / "m.safetensors", "-o", tmp_path / "out.rac", *asked, *calibration, "--json")
    code, out, _ = run(*call, "--dry-run")
    assert code == 0
    assert not list(tmp_path.iterdir())
    stated = json.loads(out)
    assert run(*call)[0] == 0
    really = (tmp_path / "out.rac").stat().st_size
    assert stated["size"] == pytest.approx(really, rel=0.05)
    assert stated["seconds"] > 0
    assert stated["core_seconds"] > 0
    assert bool(calibration) == any(p["how"] == "quantised" for p in stated["parts"])
    assert sum(p["weights"] for p in stated["parts"]) == stated["weights"]


def test_presets_are_announced_and_choose_one_budget(folder, tmp_path, run):
    call = ("pack", folder / "m.safetensors", "-o", tmp_path / "out.rac", "--calibrate", "none")
    code, _, err = run(*call, "--quality", "small")
    assert code == 0
    assert "--quality small is --bits 3: " in err
    code, _, err = run(*call, "--quality", "small", "--bits", "2")
    assert code == 2
    assert "does not go with --bits" in err


def test_names_are_cut_to_a_terminal_only(monkeypatch):
    from rac.cli import terminal

    names = ["model.layers.*.self_attn.q_proj.weight", "short"]
    assert terminal.fitted(names, 60) == names
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal.fitted(names, 60) == ["…" + names[0][-19:], "short"]


def test_codes_are_compared_by_what_they_stand_for(tmp_path, run):
    rng = np.random.default_rng(2)
    codes = rng.standard_normal((128, 128)).astype(ml_dtypes.float8_e4m3fn)
    (tmp_path / "model").mkdir()
    tensors = {"l.weight": codes, "l.weight_scale": np.full((128, 1), 0.5, np.float32)}
    rac.save_file(tensors, tmp_path / "codes.rac")
    rac.unpack(tmp_path / "codes.rac", tmp_path / "model" / "model.safetensors")
    rac.pack(tmp_path / "model", tmp_path / "m.rac", bits=5, calibrate="none")
    code, out, err = run("diff", tmp_path / "model", tmp_path / "m.rac", "--json")
    (one,) = json.loads(out)["differences"]
    assert (code, err, one["name"]) == (1, "", "l.weight")
    assert one["snr"] > 20
    code, _, err = run("diff", tmp_path / "codes.rac", tmp_path / "m.rac")
    assert code == 1
    assert "holds codes" in err


def test_arguments_of_named_methods_need_one(packed, tmp_path, run):
    for asked in (("--group", "64"), ("--fixed-rate",), ("--seed", "3")):
        code, _, err = run("pack", packed[0], "-o", tmp_path / "x.rac", *asked)
        assert code == 2
        assert f"{asked[0]}: for named methods alone" in err


def test_what_is_known_before_the_work_is_said_before_it(folder, tmp_path, run, monkeypatch):
    """Nothing is written, and the line names what the user named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pointer.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n"
    )
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html><body>Log in</body></html>")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    before = sorted(p.name for p in tmp_path.iterdir())
    source = folder / "m.safetensors"
    for asked, match in (
        ((source, "--recipe", "rtn", "--dry-run"), "does not take --dry-run"),
        ((source, "--format", "hf"), f"holds no config.json: --format hf takes the folder of a model [{source}]"),
        (("",), "SRC is an empty name"),
        (("pointer.safetensors",), "is a pointer of Git LFS"),
        (("page.safetensors",), "is a page of HTML"),
        (("model.safetensors.index.json",), "name the folder"),
    ):
        code, out, err = run("pack", *asked)
        assert (code, out) == (2, b"")
        assert match in err
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    code, out, _ = run("pack", source, "--format", "hf", "--dry-run", "--json")
    assert (code, json.loads(out)["size"] > 0) == (0, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_one_pattern_may_be_text(folder, tmp_path):
    done = rac.pack(folder / "m.safetensors", tmp_path / "x.rac", include="l.*", exclude="l.0.*", bits=4, keep="l.1.*")
    assert (done.tensors, done.quantised) == (3, 2)


def test_arrays_are_packed_to_a_budget(tmp_path):
    w = np.random.default_rng(3).standard_normal((256, 128)).astype(np.float32)
    done = rac.pack({"w": w, "b": w[0]}, tmp_path / "x.rac", bits=4, calibrate="none")
    assert (done.tensors, done.quantised) == (2, 1)
    back = rac.load_file(tmp_path / "x.rac")
    assert np.array_equal(back["b"], w[0])
    assert 0 < np.square(back["w"] - w).mean() < 0.01


def test_options_in_front_of_a_command(run):
    code, out, err = run("-q", "pack", "m")
    assert (code, out) == (2, b"")
    assert "options go behind it" in err
