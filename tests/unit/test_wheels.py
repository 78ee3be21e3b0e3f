"""Wheels for all platforms, as tools/wheels.py makes them: contents, libraries, and what its check finds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import rac
import wheels
from rac.native import library
from support import ROOT

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="pip install rac-codec[wheels]"),
    pytest.mark.skipif(not importlib.util.find_spec("lief"), reason="pip install rac-codec[wheels]"),
]
TAGS = [p.tag for p in wheels.PLATFORMS]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """All wheels by tag; what is compiled stays in build/wheels, for other processes and the next time."""
    out = tmp_path_factory.mktemp("wheels")
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "wheels.lock"):
        return dict(zip(TAGS, wheels.make(wheels.PLATFORMS, out), strict=True))


def test_there_are_eight_and_nothing_is_wrong_with_them(built):
    assert len(built) == 8
    for tag, path in built.items():
        assert path.name == f"rac_codec-0.1.0-py3-none-{tag}.whl"
        assert list(wheels.wrong(path)) == []
        assert path.stat().st_size <= 2_000_000
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        cpus = ("generic", "avx2", "avx512") if "86" in tag or "amd64" in tag else ("generic", "neon")
        assert sorted(n for n in names if n.startswith("rac/native/_") and not n.endswith(".py")) == sorted(
            f"rac/native/_{cpu}{'.dll' if 'win' in tag else '.dylib' if 'mac' in tag else '.so'}" for cpu in cpus
        )
        assert not [n for n in names if n.endswith((".c", ".h")) or "test" in n]
        assert {"rac/py.typed", "rac/calibrate/texts/mix.txt.zst"} <= set(names)


def test_the_same_bytes_again(built, tmp_path, monkeypatch):
    """At another time, in another folder; and compiled anew, of the smallest library."""
    (path,) = wheels.make(wheels.PLATFORMS[:1], tmp_path)
    assert path.read_bytes() == built[TAGS[0]].read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    (path,) = wheels.make(wheels.PLATFORMS[:1], tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert {e.date_time for e in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}


@pytest.mark.parametrize("tag", ["manylinux_2_17_x86_64.manylinux2014_x86_64", "macosx_11_0_arm64", "win_amd64"])
def test_no_path_and_no_time_is_in_a_library(tmp_path, tag):
    """Two clones in folders of other names: one source file of the kernels, compiled and linked as all of them are."""
    at, how, made = next(p for p in wheels.PLATFORMS if p.tag == tag), wheels.setup(), []
    wheels.BUILT.mkdir(parents=True, exist_ok=True)
    for name in ("one", "another/and/longer"):
        sources = tmp_path / name / "src"
        shutil.copytree(ROOT / how.SOURCES, sources)
        command = [*how.FLAGS, *wheels.FLAGS, *how.CPUS[at.machine]["generic"], "-target", at.target]
        out = sources.parent / f"out{at.suffix}"
        wheels.compile_to(out, f"_generic{at.suffix}", command, [str(sources / "layout.c")], "EXPORTS\n rac_cpu\n")
        made.append(out.read_bytes())
    assert made[0] == made[1]
    assert str(tmp_path).encode() not in made[0]


@pytest.mark.slow
def test_the_same_wheel_from_two_clones(built, tmp_path):
    """All of it compiled anew, elsewhere, with nothing of what zig has kept: minutes."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    env = os.environ | {"PYTHONPATH": f"{clone}/codec:{clone}/tools", "ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "zig")}
    run = [sys.executable, "tools/wheels.py", "manylinux_2_17_x86_64", "-o", str(tmp_path)]
    subprocess.run(run, cwd=clone, env=env, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    assert path.read_bytes() == built[TAGS[0]].read_bytes()


def rewritten(path: Path, out: Path, change) -> Path:
    """A wheel whose files, by name, went through `change`; with the RECORD of what it was."""
    with zipfile.ZipFile(path) as archive:
        files = {e: archive.read(e) for e in archive.infolist()}
    with zipfile.ZipFile(out / path.name, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in change({e.filename: d for e, d in files.items()}).items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return out / path.name


def test_what_the_check_finds(built, tmp_path):
    linux, mac = built[TAGS[0]], built[TAGS[5]]
    with zipfile.ZipFile(built[TAGS[2]]) as archive:
        musl = archive.read("rac/native/_avx2.so")
    with zipfile.ZipFile(built[TAGS[1]]) as archive:
        arm = archive.read("rac/native/_neon.so")
    changes = {
        "lacks rac/py.typed": lambda f: {n: d for n, d in f.items() if n != "rac/py.typed"},
        "lacks rac/native/_avx512.so": lambda f: {n: d for n, d in f.items() if n != "rac/native/_avx512.so"},
        "holds tests/test_a.py, which is no part": lambda f: f | {"tests/test_a.py": b""},
        "RECORD that is not of its files: ['rac/errors.py']": lambda f: f | {"rac/errors.py": b"#"},
        "_avx2.so: needs libc.so": lambda f: f | {"rac/native/_avx2.so": musl},
        "_avx2.so: is for AARCH64": lambda f: f | {"rac/native/_avx2.so": arm},
        "_avx2.so: is no library of manylinux": lambda f: f | {"rac/native/_avx2.so": b"#!/bin/sh\n"},
        "states other tags in WHEEL": lambda f: {
            n: d.replace(b"2_17", b"2_99") if n.endswith("/WHEEL") else d for n, d in f.items()
        },
        "has more than it needs in METADATA: Requires-Dist: numba": lambda f: {
            n: b"Requires-Dist: numba>=0.61\n" + d if n.endswith("/METADATA") else d for n, d in f.items()
        },
        "more than 2000000": lambda f: f | {"rac/calibrate/texts/noise": os.urandom(2_000_000)},
    }
    for what, change in changes.items():
        assert what in "; ".join(wheels.wrong(rewritten(linux, tmp_path, change))), what
    assert "is no library of macosx" in "; ".join(
        wheels.wrong(rewritten(mac, tmp_path, lambda f: f | {"rac/native/_neon.dylib": arm}))
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the wheel of this machine is one for Linux")
def test_it_runs_where_no_compiler_is(built, tmp_path):
    """Installed beside what it requires: its own kernels run, and a small file is packed, verified and unpacked."""
    wheel, there = built[wheels.of_this_machine().tag], tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(there), str(wheel)]
    subprocess.run(pip, check=True)
    assert (there / "rac" / "native" / f"_generic{library.SUFFIX}").exists()
    code = f"import rac; assert rac.__file__.startswith({str(there)!r}), rac.__file__\n{wheels.DEMO}"
    done = run_in(there, code, tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "kernels   C" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the wheels are those of other machines on Linux")
@pytest.mark.parametrize("tag", ["musllinux_1_2_x86_64", "musllinux_1_2_aarch64", "win_amd64", "macosx_11_0_arm64"])
def test_a_wheel_of_another_platform(built, tmp_path, tag):
    """pip refuses it; who unpacks it nevertheless is told in one line why no kernels run."""
    path = next(path for path in built.values() if tag in path.name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(tmp_path / "x")]
    done = subprocess.run([*pip, str(path)], capture_output=True, text=True)
    assert done.returncode
    assert "is not a supported wheel on this platform" in done.stderr
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    rac.save_file({"w": np.arange(40000, dtype="f4")}, tmp_path / "m.rac")
    code = "import sys; sys.modules['numba'] = None; from rac.cli import main; sys.exit(main(['load', 'm.rac']))"
    done = run_in(tmp_path / "site", code, tmp_path, "default")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 0
    why = "do not load on this machine" if "linux" in tag else "beside rac are those of another platform or version"
    assert why in line
    assert library.AGAIN in line


def run_in(site, code, cwd, warned="error", before=(), **settings):
    """A process that has rac from a folder, and no other settings; its warnings are errors unless told else."""
    env = {"PATH": "", "PYTHONPATH": str(site), "HOME": str(cwd)} | settings
    command = [*before, sys.executable, "-W", warned, "-c", code]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the wheel of this machine is one for Linux")
def test_site_packages_that_nobody_may_write(built, tmp_path):
    """Not a word: nothing is written there. Only numba, without kernels, wants a place, and says how to name it."""
    site, cwd, before = tmp_path / "site", tmp_path / "work", ()
    cwd.mkdir()
    with zipfile.ZipFile(built[wheels.of_this_machine().tag]) as archive:
        archive.extractall(site)
    if os.geteuid() == 0:  # who may write everywhere, but for this
        before = (shutil.which("setpriv") or pytest.skip("no setpriv"), "--bounding-set=-dac_override")
    for path in (*site.rglob("*"), site):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        probe = f"open({str(site / 'x')!r}, 'w')"
        assert "Permission denied" in run_in(site, probe, cwd, before=before).stderr
        code = f"import rac; assert rac.__file__.startswith({str(site)!r})\n{wheels.DEMO}"
        done = run_in(site, code, cwd, before=before)
        assert (done.returncode, done.stderr) == (0, "")
        if importlib.util.find_spec("numba"):
            code = "import rac.native.library as l; l._FOLDER = l.Path('/nowhere'); from rac.cli import main\n"
            code += "assert main(['load', 'w.rac']) == 0"
            nowhere = {"HOME": str(site / "rac"), "XDG_CACHE_HOME": str(site / "rac")}
            first, line = run_in(site, code, cwd, "default", before, **nowhere).stderr.splitlines()
            assert "kernels were not built" in first
            assert line.startswith("rac: numba's cache cannot be used (")
            assert line.endswith("until you let NUMBA_CACHE_DIR name a folder that can be written")
        assert not list(site.rglob("__pycache__"))
    finally:
        for path in (site, *(p for p in site.rglob("*") if p.is_dir())):
            path.chmod(0o755)


def test_the_source_distribution_has_what_a_build_needs(tmp_path):
    path = wheels.sdist(tmp_path)
    data = path.read_bytes()
    os.utime(ROOT / "setup.py")
    assert wheels.sdist(tmp_path).read_bytes() == data
    with tarfile.open(path) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "codec/rac/py.typed"}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "codec" / "rac" / "native" / "src").iterdir()}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "codec" / "rac").rglob("*.py")}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "codec" / "rac" / "calibrate" / "texts").iterdir()}
    assert needed <= names
    assert not [n for n in names if n.endswith((".so", ".dll", ".dylib"))]
