"""Wheels for all platforms, as tools/wheels.py makes them: contents, libraries, and what its check finds."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

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
    env = {"PATH": "", "PYTHONPATH": str(there), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "kernels   C" in done.stdout


def test_the_source_distribution_has_what_a_build_needs(tmp_path):
    with tarfile.open(wheels.sdist(tmp_path)) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "codec/rac/py.typed"}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "codec" / "rac" / "native" / "src").iterdir()}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "codec" / "rac").rglob("*.py")}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "codec" / "rac" / "calibrate" / "texts").iterdir()}
    assert needed <= names
    assert not [n for n in names if n.endswith((".so", ".dll", ".dylib"))]
