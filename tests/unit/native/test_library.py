"""Libraries of kernels that are not there, not of this machine, or of another version: one line each."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import rac
from rac import native
from rac.cli import main
from rac.native import lanes, library
from rac.native.prototypes import VERSION, layout

CODE = """
import sys
from pathlib import Path
from rac.native import library
library._FOLDER = Path(sys.argv.pop(1))
sys.modules |= dict.fromkeys(sys.argv.pop(1).split(), None)
from rac.cli import main
sys.exit(main(sys.argv[1:]))
"""


def cli(folder, *arguments, missing="numba", **env):
    """`rac` with the libraries of a folder, without some modules: exit code, output, lines of errors and warnings."""
    base = {k: v for k, v in os.environ.items() if k not in ("RAC_NO_NATIVE", "RAC_CPU", "NUMBA_CACHE_DIR")}
    command = [sys.executable, "-c", CODE, str(folder), missing, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=base | env)
    return done.returncode, done.stdout, done.stderr.splitlines()


def ours(folder, *cpus):
    """Copies of the libraries of this machine."""
    for cpu in cpus:
        shutil.copy(library._path(cpu), folder)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "m.rac"
    rac.save_file({"w": np.random.default_rng(1).standard_normal((60, 300)).astype("f4")}, path)
    return path


@pytest.mark.parametrize("twin", ["numba", "numpy"])
def test_no_library_at_all_is_said_once(tmp_path, archive, twin):
    code, out, said = cli(tmp_path, "load", archive, "--bench", missing="numba" if twin == "numpy" else "")
    assert code == 0
    assert f"CPU ({twin}, " in out
    (line,) = said
    assert line.startswith("rac: the C kernels were not built; to get them, install rac-codec again")
    assert f"Until then {twin} decodes, " in line
    assert "nothing can be packed with loss" in line


def test_constriction_is_needed_without_a_library_only(tmp_path):
    np.save(tmp_path / "w.npy", np.random.default_rng(1).standard_normal((200, 300)).astype("f4"))
    pack = ("pack", tmp_path / "w.npy", "-o", tmp_path / "w.rac")
    code, _, said = cli(tmp_path, *pack, missing="constriction")
    assert code == 2 and "coding without the C kernels needs constriction: pip install" in said[-1]
    assert not (tmp_path / "w.rac").exists()
    ours(tmp_path, *native.cpus())
    assert cli(tmp_path, *pack, missing="constriction")[0] == 0
    assert cli(tmp_path, "verify", tmp_path / "w.rac", missing="constriction")[0] == 0


def test_packing_with_loss_without_a_library(tmp_path, archive):
    np.save(tmp_path / "w.npy", np.random.default_rng(1).standard_normal((200, 300)).astype("f4"))
    code, _, said = cli(tmp_path, "pack", tmp_path / "w.npy", "-o", tmp_path / "w.rac", "--bits", "3")
    assert code == 2
    assert "lossy packing needs the C kernel" in said[-1]
    assert not (tmp_path / "w.rac").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("_generic.dll" if library.SUFFIX != ".dll" else "_generic.so", "are those of another platform or version"),
        (f"_generic{library.SUFFIX}", "do not load on this machine"),
    ],
)
def test_a_library_of_another_platform(tmp_path, archive, name, why):
    (tmp_path / name).write_bytes(b"MZ" + bytes(4000))
    code, _, said = cli(tmp_path, "load", archive)
    assert code == 0
    assert len(said) == 1
    assert why in said[0]
    assert name in said[0]
    code, out, said = cli(tmp_path, "--version", "--verbose")
    assert code == 0
    assert why in out
    code, _, said = cli(tmp_path, "load", archive, RAC_CPU="generic")
    assert code == 1
    assert len(said) == 1
    assert said[0].startswith("rac: RAC_CPU is 'generic', but the C kernels")
    assert why in said[0]


def test_a_library_of_another_version(tmp_path, archive):
    ours(tmp_path, *native.cpus())
    path = tmp_path / library._path(native.cpus()[-1]).name
    numbers = [value for _, value in layout()][1:6]
    begin, data = struct.pack("<6q", VERSION, *numbers), path.read_bytes()
    assert data.count(begin) == 1
    path.write_bytes(data.replace(begin, struct.pack("<6q", VERSION - 1, *numbers)))
    code, _, said = cli(tmp_path, "load", archive)
    assert code == 2
    assert said == [
        f"rac: {path.name} is not of this version of rac (version); {library.AGAIN} [{path}]",
    ]


@pytest.mark.skipif(library.SUFFIX != ".so", reason="macOS and Windows refuse such a file themselves")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_library_that_is_half_written(tmp_path, archive, share):
    """An installation that was cut off: loading such a file, the system would touch what is missing, and end all."""
    *slower, fastest = native.cpus()
    ours(tmp_path, *native.cpus())

    def cut(cpu):
        path = tmp_path / library._path(cpu).name
        os.truncate(path, int(path.stat().st_size * share))

    if slower:
        cut(fastest)
        code, out, said = cli(tmp_path, "load", archive)
        assert code == 0 and f"CPU ({library.CPUS[slower[-1]]}, " in out
        (line,) = said
        assert line.startswith(f"rac: the kernels for {fastest} do not load (") and library.AGAIN in line
        code, _, said = cli(tmp_path, "load", archive, RAC_CPU=fastest)
        (line,) = said
        assert code == 1 and line.startswith(f"rac: RAC_CPU is {fastest!r}, whose kernels do not load (")
    cut("generic")
    code, out, said = cli(tmp_path, "load", archive)
    assert code == 0 and "CPU (numpy, " in out
    (line,) = said
    assert line.startswith("rac: the C kernels do not load on this machine (") and library.AGAIN in line


def test_a_library_of_something_else(tmp_path):
    found = next(iter(Path(np.__file__).parent.rglob("_umath_linalg*")))  # loads, and has no kernels
    shutil.copy(found, tmp_path / f"_generic{library.SUFFIX}")
    with pytest.raises(rac.RacError, match="is no library of this version of rac"):
        library.Library(tmp_path / f"_generic{library.SUFFIX}")


def test_what_rac_cpu_asks_for_and_is_not_there(tmp_path, archive):
    ours(tmp_path, "generic")
    code, out, said = cli(tmp_path, "load", archive)
    assert (code, said) == (0, [])
    assert "CPU (C, " in out
    for cpu in native.cpus()[1:]:
        code, _, said = cli(tmp_path, "load", archive, RAC_CPU=cpu)
        assert (code, said) == (1, [f"rac: RAC_CPU is {cpu!r}, for which no kernels are here; {library.AGAIN}"])
    lacking = next(cpu for cpu in library.CPUS if cpu not in library._has())
    code, _, said = cli(tmp_path, "load", archive, RAC_CPU=lacking)
    assert (code, len(said)) == (1, 1)
    assert said[0].startswith(f"rac: RAC_CPU is {lacking!r}, which this processor lacks; it has generic")


def test_version_says_which_kernels_run(capsys):
    assert main(["--version", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert f"kernels   {native.kernel()}" in said
    assert ", ".join(native.cpus()) in said


def test_a_cache_of_numba_that_cannot_be_used(archive, monkeypatch):
    """Half-written, or in a place where nothing can be written: one warning, and the same numbers."""
    expected, real = rac.load_file(archive)["w"], lanes._compiled

    def damaged(cache):
        if cache:
            raise EOFError("Ran out of input")
        return real(cache)

    monkeypatch.setattr(lanes, "_compiled", damaged)
    monkeypatch.setattr(lanes, "_uncached", [])
    with native.using(None), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert (rac.load_file(archive)["w"] == expected).all()
    (one,) = said
    assert str(one.message).startswith("rac: numba's cache cannot be used (Ran out of input); ")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A file, and what a process without kernels that read it has left of numba's."""
    pytest.importorskip("numba")
    there = tmp_path_factory.mktemp("numba")
    rac.save_file({"w": np.random.default_rng(1).standard_normal((60, 300)).astype("f4")}, there / "m.rac")
    (there / "empty").mkdir()
    code, _, said = cli(there / "empty", "load", there / "m.rac", missing="", NUMBA_CACHE_DIR=str(there / "cache"))
    assert (code, len(said)) == (0, 1)
    return there


@pytest.mark.parametrize(("kind", "share"), [("nbi", 0.5), ("nbc", 0.9)])
def test_a_cache_of_numba_that_is_half_written(cache, tmp_path, kind, share):
    """The index, or what was compiled: one line that says what to delete."""
    shutil.copytree(cache / "cache", tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob(f"*.{kind}")
    os.truncate(path, int(path.stat().st_size * share))
    env = {"missing": "", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    code, out, (first, line) = cli(cache / "empty", "load", cache / "m.rac", **env)
    assert code == 0 and "CPU (numba, " in out and "kernels were not built" in first
    assert line.startswith("rac: numba's cache cannot be used (") and line.endswith(f"until you delete {path.parent}")
