"""Going on with the part of an interrupted pack."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import rac
from rac.container.access import BytesAccess
from rac.container.reader import Archive
from rac.encode.pack import pack_source
from rac.encode.sources import Attachment, Source, SourceTensor, from_arrays

N = 6


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    out = {f"{i}": rng.standard_normal((200, 150)).astype(np.float32) for i in range(N)}
    return out | {"tied": out["2"]}


def source(arrays=None, attachments=((b"{}" * 50), b"vocabulary"), metadata=None):
    files = tuple(Attachment(f"file {i}", data) for i, data in enumerate(attachments))
    return Source("hf", from_arrays(arrays or tensors()).tensors, files, metadata or {"k": "v"})


@pytest.fixture
def whole(tmp_path):
    pack_source(source(), tmp_path / "whole.rac")
    return (tmp_path / "whole.rac").read_bytes()


@pytest.fixture
def resume(tmp_path):
    """Goes on with a part: (tensors that were finished already, bytes)."""

    def call(part, src=None, **options):
        out = tmp_path / "m.rac"
        out.unlink(missing_ok=True)
        Path(f"{out}.part").write_bytes(part)
        done = pack_source(src or source(), out, resume=True, **options)
        assert not os.path.exists(f"{out}.part")
        return done.resumed, out.read_bytes()

    return call


def ends(data):
    """Offsets at which a record ends, from the header on."""
    index = Archive(BytesAccess(data)).index
    return [index.header_size, *(e.at + e.size for e in index.entries)]


def test_every_place_to_stop(whole, resume):
    at = ends(whole)
    assert len(at) == 1 + 2 + N
    for k, end in enumerate(at):
        for extra in (-1, 0, 1, 40, 64):
            whole_records = sum(e <= end + extra for e in at) - 1
            assert resume(whole[: end + extra], src=None) == (max(0, whole_records - 2), whole), (k, extra)
    assert resume(whole[:-1]) == (N, whole)
    assert resume(whole) == (N, whole)
    for n in (0, 1, 31, 100):
        assert resume(whole[:n]) == (0, whole)


def test_damage_in_the_part(whole, resume):
    entries = Archive(BytesAccess(whole)).index.entries
    for k, e in enumerate(entries[:-1]):
        for at in (e.at + 5, e.at + 50, e.at + e.size // 2):
            bad = bytearray(whole[: entries[-1].at + 70])
            bad[at] ^= 4
            assert resume(bytes(bad)) == (max(0, k - 2), whole)
    bad = bytearray(whole)
    bad[40] ^= 1
    assert resume(bytes(bad)) == (0, whole)
    assert resume(b"something else" * 1000) == (0, whole)


def test_a_source_that_changed(whole, resume, tmp_path):
    changed = {n: t.copy() for n, t in tensors().items()}
    changed["3"][100, 100] += 1
    changed["tied"] = changed["2"]

    def check(src, expected, **options):
        pack_source(src, tmp_path / "other.rac", force=True, **options)
        assert resume(whole[:-100], src, **options) == (expected, (tmp_path / "other.rac").read_bytes())

    check(source(changed), 3)
    check(source({n: t for n, t in tensors().items() if n != "1"}), 1)
    check(source(dict(reversed(tensors().items()))), 0)
    check(source({n: t for n, t in tensors().items() if n != "tied"}), 2)
    check(source({"new": np.ones(3), **tensors()}), 0)
    check(source({**tensors(), "new": np.ones(3)}), N)
    check(source(attachments=(b"{}" * 50, b"other")), 0)
    check(source(attachments=(b"{}" * 50,)), 0)
    check(source(attachments=()), 0)
    check(source(metadata={"k": "w"}), 0)
    extra = [SourceTensor(t.name, t.dtype, t.shape, t.data, {"shard": "x"}, t.tie) for t in source().tensors]
    check(Source("hf", tuple(extra), source().attachments, {"k": "v"}), 0)


def test_settings_that_changed(whole, resume, tmp_path):
    """Whatever the part was made with: the result is that of a pack in one go."""
    for options in ({"level": "max"}, {"level": "fast"}, {"lanes": 3}, {"settings": {"include": ["*"], "exclude": []}}):
        pack_source(source(), tmp_path / "other.rac", force=True, **options)
        other = (tmp_path / "other.rac").read_bytes()
        assert other != whole
        assert resume(whole[:-100], **options) == (0, other), options
    assert resume(whole[:-100], jobs=1) == (N, whole)


def test_without_resume_the_part_is_forgotten(whole, tmp_path):
    (tmp_path / "m.rac.part").write_bytes(whole[:-100])
    assert pack_source(source(), tmp_path / "m.rac").resumed == 0
    assert (tmp_path / "m.rac").read_bytes() == whole


@pytest.fixture
def shards(tmp_path):
    """Packs a set of three shards: (summary, file name to bytes)."""

    def pack(folder, seed=0, **options):
        (tmp_path / folder).mkdir(exist_ok=True)
        done = pack_source(source(tensors(seed)), tmp_path / folder / "m.rac", shard_size=250_000, **options)
        assert len(done.paths) == 3
        return done, {os.path.basename(p): Path(p).read_bytes() for p in done.paths}

    return pack


def test_shards(shards):
    done, whole = shards("a")
    first, second, third = (Path(p) for p in done.paths)
    third.unlink()
    second.with_name(second.name + ".part").write_bytes(second.read_bytes()[:-100])
    second.unlink()
    again, data = shards("a", resume=True)
    assert data == whole
    assert again.resumed == 4  # two of the first shard, which has its final name, and two of the second
    assert first.read_bytes() == whole[first.name]


def test_shards_of_something_else(shards):
    """A finished shard under the right name need not be one of this set."""
    _, expected = shards("b", seed=1)
    done, _ = shards("a")
    Path(done.paths[0]).unlink()
    try:
        _, data = shards("a", seed=1, resume=True)
    except rac.OutputError:  # to refuse it is as good as to write it anew
        return
    assert data == expected
