"""Writing an archive: the name comes last, and never to half a file."""

from __future__ import annotations

import pytest

from rac.container.access import BytesAccess
from rac.container.reader import Archive
from rac.container.writer import Writer
from rac.errors import OutputError

HEADER = {"features": []}


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_the_name_comes_last(tmp_path):
    path = tmp_path / "m.rac"
    writer = Writer(path)
    writer.start(HEADER)
    writer.add(1000, 1, {}, [b"abc", b"", b"d" * 17])
    writer.flush()
    assert names(tmp_path) == ["m.rac.part"]
    assert (tmp_path / "m.rac.part").stat().st_size == writer.at == 64 + 192
    writer.finish(b"0123456789abcdef")
    assert names(tmp_path) == ["m.rac"]
    writer.close()
    index = Archive(BytesAccess(path.read_bytes())).index
    assert index.digest == b"0123456789abcdef"
    assert [(e.at, e.payload_size) for e in index.entries] == [(64, 16 + 0 + 32)]


def test_a_writer_that_stops(tmp_path):
    writer = Writer(tmp_path / "m.rac")
    writer.start(HEADER)
    writer.close()
    assert names(tmp_path) == []  # nothing worth going on with
    writer = Writer(tmp_path / "m.rac")
    writer.start(HEADER)
    writer.add(1000, 1, {}, [b"1" * 64])
    writer.add(1000, 1, {}, [b"2" * 64])
    entries, at = writer.entries[:1], writer.entries[1].at
    writer.close()
    assert names(tmp_path) == ["m.rac.part"]
    # going on gives the bytes of a writer that never stopped
    writer = Writer(tmp_path / "m.rac")
    writer.go_on(entries, at)
    writer.add(1000, 1, {}, [b"3" * 64])
    writer.finish(bytes(16))
    once = Writer(tmp_path / "once.rac")
    once.start(HEADER)
    once.add(1000, 1, {}, [b"1" * 64])
    once.add(1000, 1, {}, [b"3" * 64])
    once.finish(bytes(16))
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "once.rac").read_bytes()


def test_start_forgets_the_part(tmp_path):
    (tmp_path / "m.rac.part").write_bytes(b"x" * 5000)
    writer = Writer(tmp_path / "m.rac")
    writer.start(HEADER)
    writer.finish(bytes(16))
    assert Archive(BytesAccess((tmp_path / "m.rac").read_bytes())).index.entries == ()


def test_outputs_that_are_refused(tmp_path):
    (tmp_path / "m.rac").write_bytes(b"old")
    (tmp_path / "link.rac").symlink_to(tmp_path / "nowhere")
    for path, match in (
        (tmp_path / "m.rac", "exists already"),
        (tmp_path / "link.rac", "exists already"),
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "m.rac", "No such file"),
    ):
        with pytest.raises(OutputError, match=match):
            Writer(path)
    with pytest.raises(OutputError, match="is a directory"):
        Writer(tmp_path, force=True)
    assert (tmp_path / "m.rac").read_bytes() == b"old"
    writer = Writer(tmp_path / "m.rac", force=True)
    writer.start(HEADER)
    assert (tmp_path / "m.rac").read_bytes() == b"old"
    writer.finish(bytes(16))
    assert (tmp_path / "m.rac").read_bytes().startswith(b"\x89RAC")
    assert names(tmp_path) == ["link.rac", "m.rac"]


def test_two_writers_of_one_file(tmp_path):
    first = Writer(tmp_path / "m.rac")
    first.start(HEADER)
    first.add(1000, 1, {}, [b"abc"])
    with pytest.raises(OutputError, match="another process"):
        Writer(tmp_path / "m.rac")
    first.finish(bytes(16))
    assert len(Archive(BytesAccess((tmp_path / "m.rac").read_bytes())).index.entries) == 1
