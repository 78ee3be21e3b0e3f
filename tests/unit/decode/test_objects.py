"""Tensors that use objects, by every way of reading, and what is kept and refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

import rac
from rac.cli import info
from rac.container.access import BytesAccess
from rac.decode import engine
from rac.decode import random as ld
from rac.decode.unpack import quantised
from rac.encode import resume as rs
from rac.encode.ties import digest
from rac.records import Limits
from support import products, tiles

DTYPES = ("F32", "F16", "BF16")


def fill(maker, rows=150, cols=140):
    """Objects quantised and not, two tensors of one basis."""
    maker.object("a", products.exact(products.normal(1, rows, 7)))
    maker.object("b", products.quantised(products.words(2, 7, cols), 2))
    for i, dtype in enumerate(DTYPES):
        m = products.quantised(products.words(10 + i, rows, cols), i, 5)
        maker.tensor(f"low/{dtype}", dtype, m, ("a", "b"))
    maker.object("u", products.exact(products.normal(3, cols, cols)))
    for i, dtype in enumerate(DTYPES):
        m = products.quantised(products.words(20 + i, rows, cols), 5 + i, 5, states=64)
        maker.tensor(f"turned/{dtype}", dtype, m, ("u",))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(path, dense words) of an archive of many tiles."""
    tiles.cut(monkeypatch)
    maker = products.Maker(tmp_path / "m.rac")
    fill(maker)
    maker.finish()
    return tmp_path / "m.rac", maker.dense


def same(got, words):
    return got.shape == words.shape and got.tobytes() == words.tobytes()


@pytest.mark.parametrize("small", [True, False])
def test_every_way_to_read(made, monkeypatch, small):
    path, dense = made
    if not small:  # records by rows of tiles, as large ones are
        monkeypatch.setattr(engine, "GROUP", 0)
    data = path.read_bytes()
    for threads in (1, 3):
        got = rac.load_file(path, threads=threads)
        assert list(got) == list(dense)
        assert all(same(got[n], w) for n, w in dense.items())
    assert all(same(t, dense[n]) for n, t in rac.iter_tensors(io.BytesIO(data)))
    done = rac.verify(path)
    assert (done.tensors, done.lossy) == (6, 6)
    with rac.RacFile(path, threads=2) as f:
        assert f.keys() == list(dense)
        grid = ld.parse(f.archives[0], f.archives[0].record(f.archives[0].index.entries[2])).grid
        assert grid.down > 1 and grid.across > 1
        for name, words in dense.items():
            part = f.get_slice(name)
            for index in (np.s_[:], np.s_[3], np.s_[40:120, 11:57], np.s_[:, 89], np.s_[149:, ::7], np.s_[5:5]):
                assert same(part[index], words[index]), (name, index)
            assert same(f.get_tensor(name), words)
    rac.unpack(path, path.with_suffix(".safetensors"))
    st = pytest.importorskip("safetensors.torch").load_file(path.with_suffix(".safetensors"))
    assert st.keys() == dense.keys()


def test_without_the_kernel(made):
    from rac import native

    path, dense = made
    with native.using(None):
        assert all(same(t, dense[n]) for n, t in rac.load_file(path, threads=1).items())


class Counting(BytesAccess):
    """Adds up what is read."""

    bytes = 0

    def read_into(self, at, out):
        self.bytes += len(out)
        super().read_into(at, out)

    def view(self, at, size):
        self.bytes += size
        return super().view(at, size)


def test_objects_are_read_once_and_slices_read_their_rows(made):
    path, dense = made
    access = Counting(path.read_bytes())
    with rac.RacFile(access, threads=1) as f:
        archive = f.archives[0]
        sizes = {e.name: e.size for e in archive.index.entries}
        assert not archive.kept
        first = f.get_slice("turned/BF16")
        access.bytes = 0
        first[:2]
        with_object, access.bytes = access.bytes, 0
        assert archive.kept.keys() == {"u"}
        first[:2]
        assert with_object - access.bytes >= sizes["u"] // 2
        rows, access.bytes = access.bytes, 0
        first[:, :2]
        assert rows < access.bytes  # all columns of all rows
        low = f.get_slice("low/BF16")
        low[:2, :2]
        access.bytes = 0
        low[:2, :2]
        tile, access.bytes = access.bytes, 0
        low[:2]
        assert tile < access.bytes
    assert not archive.kept


def test_limit_of_objects(made):
    path, dense = made
    size = 4 * (150 * 7 + 7 * 140 + 140 * 140)
    data = path.read_bytes()
    for limit, error in ((size, None), (size - 1, rac.LimitError)):
        limits = Limits(objects=limit)
        for read in (
            lambda limits=limits: rac.RacFile(BytesAccess(data), limits=limits).load(),
            lambda limits=limits: dict(rac.iter_tensors(io.BytesIO(data), limits=limits)),
        ):
            if error:
                with pytest.raises(error, match="objects"):
                    read()
            else:
                assert read().keys() == dense.keys()


def test_info_counts_everything(made):
    path, dense = made
    report = info.report(str(path))
    assert sum(report["bytes"].values()) == report["size"] == path.stat().st_size
    assert {t["method"] for t in report["tensors"]} == {"lowrank/1", "basis/1"}
    with rac.RacFile(path) as f:
        entries = f.archives[0].index.entries
        count, bits = quantised(entries)
        assert (count, report["quantised"], report["quantised_bits"]) == (6, 6, bits)
        assert bits == 8 * sum(e.size for e in entries) / sum(w.size for w in dense.values())


def test_resume_keeps_objects(tmp_path):
    """A part that ends behind an object, and one that is cut inside of a tensor."""
    path = tmp_path / "m.rac"
    source = products.Maker(path)
    fill(source, 40, 30)
    source.stop()
    part = Path(f"{path}.part")

    def scan():
        found = rs.scan(str(part), rs.Contents("", products.HEADER, (), source.groups))
        assert found is not None
        return found

    assert scan().digests == []  # the digest of what was packed is not that of any source
    source = products.Maker(path)
    m = products.quantised(products.words(1, 20, 9), 1)
    source.object("u", products.exact(products.normal(1, 9, 9)))
    source.tensor("t", "BF16", m, ("u",))
    source.object("v", products.exact(products.normal(2, 9, 9)))
    again = products.Maker(tmp_path / "n.rac")
    again.object("u", products.exact(products.normal(1, 9, 9)))
    again.tensor("t", "BF16", m, ("u",), digest(source.groups[0].tensor))
    again.object("v", products.exact(products.normal(2, 9, 9)))
    again.tensor("w", "F16", m, ("v",))
    source.stop()
    again.stop()
    part = tmp_path / "n.rac.part"
    found = scan()
    assert [e.name for e in found.entries] == ["u", "t", "v"]
    assert (len(found.digests), found.objects, found.files) == (1, {"u", "v"}, 0)
    part.write_bytes(part.read_bytes()[: found.at - 100])
    found = scan()
    assert ([e.name for e in found.entries], found.objects) == (["u", "t"], {"u"})


@pytest.mark.parametrize("why", ["missing", "later", "twice"])
def test_what_is_refused(tmp_path, why):
    maker = products.Maker(tmp_path / "m.rac")
    u, m = products.exact(products.normal(1, 5, 5)), products.quantised(products.words(1, 4, 5), 1)
    maker._objects["u"] = u.values
    if why == "twice":
        maker.object("u", u)
        maker.object("u", u)
    maker.tensor("t", "F32", m, ("u",))
    if why == "later":
        maker.object("u", u)
    maker.finish()
    data = (tmp_path / "m.rac").read_bytes()
    for read in (rac.load, lambda d: list(rac.iter_tensors(io.BytesIO(d)))):
        with pytest.raises(rac.FormatError, match="'u'"):
            read(data)
