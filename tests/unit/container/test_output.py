"""What --force may replace: regular files, the targets of links, and nothing else."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest

import rac
from rac.container import output, shards
from rac.container.access import FileAccess
from rac.container.reader import Archive
from rac.container.writer import Writer
from rac.decode.unpack import unpack
from rac.errors import OutputError, RacError


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "m.rac"
    rac.save_file({"w": np.arange(40, dtype=np.float32), "v": np.ones(9)}, path)
    return path


def special(kind, path):
    """A thing that is not a regular file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null is
        except PermissionError:
            pytest.skip("only the superuser makes devices")


def writers(packed, path):
    """All that write over an output, each as a function of nothing."""
    archive = Archive(FileAccess(packed))
    return {
        "save_file": lambda: rac.save_file({"w": np.zeros(3)}, path),
        "merge": lambda: shards.merge([archive], str(path), force=True),
        "copy": lambda: shards.write_all(
            [shards.File(str(path), archive.header, [(archive, archive.index.entries[0])])], force=True
        ),
        "unpack": lambda: unpack(packed, path, force=True),
    }


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
@pytest.mark.parametrize("through", ["", "link"])
def test_nothing_but_regular_files_is_replaced(packed, tmp_path, kind, through):
    path = tmp_path / "out.safetensors"
    special(kind, path)
    mode, before = path.stat().st_mode, sorted(os.listdir(tmp_path))
    if through:
        (tmp_path / "link.safetensors").symlink_to(path)
        path, before = tmp_path / "link.safetensors", sorted([*before, "link.safetensors"])
    for write in writers(packed, path).values():
        with pytest.raises(OutputError, match="is a (character device|pipe|directory)"):
            write()
        assert path.stat().st_mode == mode and sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_replaced(packed, tmp_path, there):
    target, link = tmp_path / "far" / "t.safetensors", tmp_path / "l.safetensors"
    target.parent.mkdir()
    link.symlink_to(target)
    for name, write in writers(packed, link).items():
        if there:
            target.write_bytes(b"old")
        write()
        assert link.is_symlink() and target.read_bytes()[:4] != b"old", name
        assert os.listdir(target.parent) == [target.name]
        target.unlink()


def test_an_existing_link_needs_force(tmp_path):
    (tmp_path / "l.rac").symlink_to(tmp_path / "nothing")
    with pytest.raises(OutputError, match="exists already"):
        Writer(tmp_path / "l.rac")


@pytest.mark.parametrize("kind", ["device", "pipe", "link"])
def test_parts_are_regular_files(packed, tmp_path, kind):
    part = tmp_path / "o.safetensors.part"
    (tmp_path / "victim").write_text("mine")
    part.symlink_to(tmp_path / "victim") if kind == "link" else special(kind, part)
    for write in writers(packed, tmp_path / "o.safetensors").values():
        with pytest.raises(RacError):
            write()
    assert (tmp_path / "victim").read_text() == "mine"


def test_shards_replace_others_only_when_all_are_whole(packed, tmp_path):
    """An error in the last file leaves the set that was there."""
    archive = Archive(FileAccess(packed))
    shards.shard([archive], str(tmp_path / "s"), 1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    assert len(before) == 2
    data = bytearray(packed.read_bytes())
    data[archive.index.entries[1].at + 300] ^= 1
    (tmp_path / "m.rac").write_bytes(data)
    with pytest.raises(RacError):
        shards.shard([Archive(FileAccess(tmp_path / "m.rac"))], str(tmp_path / "s"), 1, force=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before


def test_reports(tmp_path):
    path = tmp_path / "r.json"
    output.write_whole(path, "one")
    output.write_whole(path, b"two")
    assert path.read_text() == "two" and os.listdir(tmp_path) == ["r.json"]
    os.mkfifo(tmp_path / "pipe")
    fd = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    output.write_whole(tmp_path / "pipe", "three")
    assert os.read(fd, 10) == b"three"
    os.close(fd)
    with pytest.raises(OutputError, match="directory"):
        output.write_whole(tmp_path, "x")
    with pytest.raises(OutputError, match="No such file"):
        output.write_whole(tmp_path / "a" / "b", "x")


def test_a_writer_that_is_discarded_leaves_nothing(tmp_path):
    w = Writer(tmp_path / "m.rac")
    w.start({"features": []})
    w.seal(bytes(16))
    assert os.listdir(tmp_path) == ["m.rac.part"]
    w.discard()
    assert os.listdir(tmp_path) == []
