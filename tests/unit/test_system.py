"""What other operating systems lack is not needed: Windows as far as it can be had here (support/windows.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import rac
from rac import system
from rac.container.access import FileAccess
from rac.decode.unpack import safe_name
from support import environment

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes away what Linux has")


def windows(*arguments, **how):
    """`rac` without what Windows lacks."""
    command = [sys.executable, "-W", "error", "-m", "support.windows", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=environment(), **how)


def test_every_module_is_imported_without_what_windows_lacks():
    done = windows("modules")
    assert (done.returncode, done.stderr) == (0, b"")
    assert int(done.stdout) > 150


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {f"t{i}": rng.standard_normal((40 + i, 333)).astype(ml_dtypes.bfloat16) for i in range(3)}
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def test_commands_without_what_windows_lacks(model):
    """Packed twice, so that a file is replaced; its bytes are those of this machine."""
    packed, out = model.with_suffix(".rac"), model.parent / "again"
    rac.pack(model, model.with_suffix(".here"))
    for arguments in (
        ("pack", model, "-o", packed, "-j", 2),
        ("pack", model, "-o", packed, "--force"),
        ("verify", packed, "--against", model),
        ("unpack", packed, "-o", out),
        ("unpack", packed, "-o", out, "--force"),
        ("load", packed, "--bench", "--timeline", model.parent / "t.svg"),
        ("shard", packed, "-o", model.parent / "shards", "--size", "50kB"),
    ):
        done = windows(*arguments, timeout=300)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), (arguments, done.stderr)
    assert packed.read_bytes() == model.with_suffix(".here").read_bytes()
    assert (out / "model.safetensors").read_bytes() == model.read_bytes()
    assert not list(model.parent.glob("*.part"))
    done = windows("verify", "-", input=packed.read_bytes())
    assert (done.returncode, done.stderr) == (0, b"")


def test_one_process_writes_a_file(model):
    """With the lock of Windows as with that of others."""
    packed = model.with_suffix(".rac")
    writer = rac.container.writer.Writer(packed)
    try:
        done = windows("pack", model, "-o", packed)
        assert done.returncode == 2
        assert done.stderr.decode().strip() == f"rac: another process is writing this file [{packed}.part]"
    finally:
        writer.discard()


@pytest.mark.parametrize("lacking", [[], ["preadv"], ["preadv", "pread", "pwrite"]])
def test_places_of_a_file_are_read_by_many_threads(tmp_path, monkeypatch, lacking):
    for name in lacking:
        monkeypatch.delattr(os, name)
    path, wrong = tmp_path / "f", []
    data = np.random.default_rng(2).integers(0, 256, 1 << 20, np.uint8).tobytes()
    path.write_bytes(data)
    access = FileAccess(path)

    def read(seed):
        out = bytearray(1000)
        for at in np.random.default_rng(seed).integers(0, len(data) - len(out), 300).tolist():
            access.read_into(at, memoryview(out))
            if out != data[at : at + len(out)]:
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    with pytest.raises(rac.TruncatedError):
        access.read_into(len(data) - 5, memoryview(bytearray(6)))
    access.close()
    with open(path, "r+b") as f:
        assert system.Positioned(f.fileno()).write(memoryview(b"abc"), 7) == 3
    assert path.read_bytes() == data[:7] + b"abc" + data[10:]


def test_names_that_windows_keeps_for_devices(monkeypatch):
    usable = ["config.json", "con", "a/nul.txt", "com1", "a. ", "what?", "console/auxiliary.txt", "com10"]
    for name in usable:
        assert safe_name(name) == name
    monkeypatch.setattr(system, "WINDOWS", True)
    for name in ("config.json", "console/auxiliary.txt", "com10"):
        assert safe_name(name) == name
    for name in ("con", "CON", "a/nul.txt", "com1", "Lpt9.json", "a./b", "a ", "what?", "aux.tar.gz"):
        with pytest.raises(rac.OutputError, match="no file of this system can be called"):
            safe_name(name)


def test_links_become_copies_where_they_are_not_allowed(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x")

    def refuse(*_):
        raise OSError(22, "A required privilege is not held by the client")

    system.link("d/f", str(tmp_path / "real"))
    assert os.readlink(tmp_path / "real") == "d/f"
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(OSError, match="privilege"):
        system.link("d/f", str(tmp_path / "link"))
    monkeypatch.setattr(system, "WINDOWS", True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        system.link("d/f", str(tmp_path / "link"))
        system.link("d", str(tmp_path / "folder"))
    assert [str(w.message) for w in said] == [
        "rac: symbolic links are not allowed here; copies stand in their place"
    ] * 2
    assert (tmp_path / "link").read_bytes() == (tmp_path / "folder" / "f").read_bytes() == b"x"
    assert not (tmp_path / "link").is_symlink()
