"""Reading an archive at random and forward: the index against the records."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
import pytest

import rac
from rac.container import index as ix
from rac.container import wire, zstd
from rac.container.access import BytesAccess, FileAccess, read
from rac.container.forward import Forward
from rac.container.reader import TAIL, Archive
from rac.container.writer import Writer
from rac.errors import ChecksumError, FormatError, LimitError, RacError, SourceError, TruncatedError
from rac.records import Limits


def tensor(name, data=b"0123456789", **row):
    head = {
        "axis": 0,
        "digest": zstd.digest(data),
        "dtype": "U8",
        "name": name,
        "shape": [len(data)],
        "stages": [{"id": "raw/1"}],
        "tile": [1, len(data)],
    }
    fields = {
        "method": "raw/1",
        "dtype": "U8",
        "shape": (len(data),),
        "parts": (0, 0, 0, 0, len(data), -len(data) % 16),
    }
    return head, [data], fields | row


def build(path, records, change=lambda entries: entries):
    """Bytes of an archive whose index rows went through `change`."""
    writer = Writer(path, force=True)
    writer.start({"features": []})
    for head, units, fields in records:
        writer.add(1, 0, head, units, **fields)
    writer.entries = change(writer.entries)
    writer.finish(bytes(16))
    writer.close()
    return path.read_bytes()


@pytest.fixture
def good(tmp_path):
    return build(tmp_path / "m.rac", [tensor("a"), tensor("b", b"xyz")])


def forward(data, limits=None):
    reader = Forward(io.BytesIO(data), "f", limits)
    return [r.head["name"] for r in reader.records()], reader


def test_both_readers_see_the_same(good):
    archive = Archive(BytesAccess(good))
    names, reader = forward(good)
    assert names == ["a", "b"] == [e.name for e in archive.index.entries]
    assert reader.index == archive.index
    assert reader.header == archive.header == {"features": []}
    assert reader.at == len(good)
    a, b = archive.index.entries
    assert (a.at, a.at + a.size, b.at + b.size) == (archive.index.header_size, b.at, archive.index.at)
    assert archive.index.at + archive.index.size + 32 == len(good)
    record = archive.record(b)
    assert good[record.payload : record.payload + 3] == b"xyz"


class Counting(BytesAccess):
    def __init__(self, data):
        super().__init__(data)
        self.reads = []

    def read_into(self, at, out):
        self.reads.append((at, len(out)))
        super().read_into(at, out)


def test_reads(tmp_path, good):
    access = Counting(good)
    Archive(access)
    assert len(access.reads) == 2
    # an index that does not fit the tail costs one read more
    many = build(tmp_path / "many.rac", [tensor("a")], lambda e: e)
    assert len(many) < TAIL
    rng = np.random.default_rng(0)
    large = build(tmp_path / "large.rac", [tensor(rng.bytes(40).hex()) for _ in range(3000)])
    access = Counting(large)
    archive = Archive(access)
    assert archive.index.size > TAIL
    assert len(access.reads) == 3
    assert len(archive.index.entries) == 3000


def test_rows_that_do_not_fit(tmp_path):
    path = tmp_path / "m.rac"
    records = [tensor("a"), tensor("b"), tensor("c")]

    def change(i, **fields):
        return lambda e: [*e[:i], e[i]._replace(**fields), *e[i + 1 :]]

    at = Archive(BytesAccess(build(path, records))).index.entries
    seen_by_index = {
        "swapped": lambda e: [e[1], e[0], e[2]],
        "missing": lambda e: e[:2],
        "first missing": lambda e: e[1:],
        "twice": lambda e: [*e, e[2]],
        "moved": change(1, at=at[1].at + 64),
        "overlap": change(1, at=at[0].at),
        "out of the file": change(2, at=1 << 40),
        "payload too long": change(1, payload_size=1 << 40, parts=(0, 0, 0, 0, 1 << 40, 0)),
        "same name": change(1, name="a"),
        "alias of a name": change(0, aliases=(("c", True),)),
        "alias twice": change(0, aliases=(("d", True), ("d", False))),
        "wrong sum": change(1, parts=(0, 0, 0, 0, 10, 7)),
        "too few parts": change(1, parts=(0, 0, 0, 0, 16)),
        "negative": change(1, parts=(0, 0, 0, 0, 17, -1)),
        "shape": change(1, shape=(1 << 40, 1 << 40)),
        "rank": change(1, shape=(1,) * 65),
        "type of the index": change(1, type=4),
        "unknown type": change(1, type=9),
        "ancillary tensor": change(1, flags=1),
    }
    for what, how in seen_by_index.items():
        data = build(path, records, how)
        for reader in (lambda d: Archive(BytesAccess(d)), forward):
            with pytest.raises(RacError):
                reader(data)
            assert what
    seen_by_record = {
        "other name": change(1, name="z"),
        "other dtype": change(1, dtype="I8"),
        "other shape": change(1, shape=(5, 2)),
        "other method": change(1, method="zstd/1"),
        "other alias": change(1, aliases=(("z", True),)),
        "other checksum": change(1, check=5),
    }
    for what, how in seen_by_record.items():
        data = build(path, records, how)
        archive = Archive(BytesAccess(data))
        with pytest.raises(FormatError, match="not the one that the index names"):
            archive.record(archive.index.entries[1])
        with pytest.raises(FormatError, match="not the one that the index names"):
            forward(data)
        with pytest.raises(FormatError, match="not the one that the index names"):
            rac.load(data)
        assert archive.record(archive.index.entries[0]).head["name"] == "a", what


def test_index_maps_that_are_refused(tmp_path, good):
    archive = Archive(BytesAccess(good))
    whole = wire.msg.unpack(zstd.decompress(_index_unit(good, archive), _index_size(good, archive)))
    row = whole["records"][0]

    def with_index(body, **head):
        unit = zstd.compress(body)
        head = {"size": len(body), "units": wire.directory([unit])} | head
        pad = bytes(-len(unit) % 16)
        fixed, _, _ = wire.record_head(4, 0, head, len(unit) + len(pad))
        data = fixed + unit + pad
        data += bytes(-len(data) % 64)
        return good[: archive.index.at] + data + wire.trailer(archive.index.at, len(data))

    body = wire.msg.pack(whole)
    assert Archive(BytesAccess(with_index(body))).index.entries == archive.index.entries
    bad = {
        "no digest": wire.msg.pack({"records": whole["records"]}),
        "short digest": wire.msg.pack(whole | {"digest": bytes(15)}),
        "one key more": wire.msg.pack(whole | {"x-note": 1}),
        "rows no list": wire.msg.pack(whole | {"records": {}}),
        "row no map": wire.msg.pack(whole | {"records": [1, 2]}),
        "row with one key more": wire.msg.pack(whole | {"records": [row | {"x-note": 1}, whole["records"][1]]}),
        "row without name": wire.msg.pack(whole | {"records": [{k: v for k, v in row.items() if k != "name"}]}),
        "at is a bool": wire.msg.pack(whole | {"records": [row | {"at": True}, whole["records"][1]]}),
        "short check": wire.msg.pack(whole | {"records": [row | {"check": b"1234567"}, whole["records"][1]]}),
        "name no text": wire.msg.pack(whole | {"records": [row | {"name": 5}, whole["records"][1]]}),
        "not canonical": body + b"\0",
    }
    for what, map_ in bad.items():
        for reader in (lambda d: Archive(BytesAccess(d)), forward):
            with pytest.raises(FormatError):
                reader(with_index(map_))
        assert what
    for head in ({"size": len(body) + 1}, {"size": None}, {"x-note": 1}, {"units": b""}, {"size": True}):
        for reader in (lambda d: Archive(BytesAccess(d)), forward):
            with pytest.raises(FormatError):
                reader(with_index(body, **head))
    for reader in (lambda d: Archive(BytesAccess(d)), forward):
        with pytest.raises(LimitError):
            reader(with_index(body, size=Limits().index + 1))


def _index_unit(data, archive):
    record = archive.parse_record(archive.index.at, data[archive.index.at :])
    size = int.from_bytes(record.head["units"][:8], "little")
    return data[record.payload : record.payload + size]


def _index_size(data, archive):
    return archive.parse_record(archive.index.at, data[archive.index.at :]).head["size"]


def test_trailer(good):
    archive = Archive(BytesAccess(good))
    at, size = archive.index.at, archive.index.size
    for a, s in (
        (0, len(good) - 32),
        (32, len(good) - 64),
        (at - 64, size + 64),
        (at + 64, size - 64),
        (at, size + 64),
    ):
        data = good[:-32] + wire.trailer(a, s)
        for reader in (lambda d: Archive(BytesAccess(d)), forward):
            with pytest.raises(FormatError):
                reader(data)
    for n in (1, 31, 32, 33, 64):
        with pytest.raises(TruncatedError):
            Archive(BytesAccess(good[:-n]))
        with pytest.raises(TruncatedError):
            forward(good[:-n])
    with pytest.raises(FormatError):
        forward(good + b"\0")
    with pytest.raises(TruncatedError):
        Archive(BytesAccess(good + b"\0"))


def test_limits(good):
    for limits in (Limits(header=8), Limits(head=8), Limits(index=8)):
        with pytest.raises(LimitError):
            forward(good, limits)
        with pytest.raises(LimitError):
            Archive(BytesAccess(good), limits)


def test_forward_reads_units_in_order_and_checks_them(good):
    reader = Forward(io.BytesIO(good))
    record = next(reader.records())
    (unit,) = wire.parse_units(record.head["units"], record.payload_size)
    with pytest.raises(LimitError):
        reader.unit(unit, record, 9, "u")
    assert reader.unit(unit, record, 10, "u") == b"0123456789"
    with pytest.raises(ValueError, match="in order"):
        reader.unit(unit, record, 10, "u")
    bad = bytearray(good)
    bad[record.payload + 1] ^= 1
    reader = Forward(io.BytesIO(bytes(bad)), "name")
    record = next(reader.records())
    with pytest.raises(ChecksumError) as e:
        reader.unit(unit, record, 10, "what")
    assert (e.value.file, e.value.unit, e.value.offset) == ("name", "what", record.payload)
    bad = bytearray(good)
    bad[record.payload + 12] = 1  # a skipped unit is not looked at, the padding of the record is
    assert forward(bytes(bad))[0] == ["a", "b"]
    bad[record.payload + 12], bad[record.payload + 20] = 0, 1
    with pytest.raises(FormatError, match="padding"):
        forward(bytes(bad))


def test_stream_that_fails():
    class Broken:
        def read(self, size):
            raise OSError(5, "Input/output error")

    with pytest.raises(SourceError, match="Input/output error"):
        Forward(Broken())


def test_access(tmp_path, good):
    (tmp_path / "m.rac").write_bytes(good)
    for access in (FileAccess(tmp_path / "m.rac"), BytesAccess(good), BytesAccess(memoryview(bytearray(good)))):
        assert access.size == len(good)
        assert read(access, 5, 20) == good[5:25]
        assert read(access, len(good), 0) == b""
        for at, size in ((len(good) - 1, 2), (-1, 1), (0, -1), (1 << 70, 1), (0, 1 << 70)):
            with pytest.raises(TruncatedError):
                read(access, at, size)
        out = bytearray(10)
        with pytest.raises(TruncatedError):
            access.read_into(len(good) - 5, memoryview(out))
        access.close()
        access.close()
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SourceError):
            FileAccess(path)


def test_refused_files_are_closed(tmp_path, good):
    (tmp_path / "bad.rac").write_bytes(good[:-5])
    (tmp_path / "m.rac").write_bytes(good)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(FormatError):
            rac.open(tmp_path / "bad.rac")
        with pytest.raises(rac.RacError):
            FileAccess(tmp_path)
        rac.load_file(tmp_path / "m.rac")
    assert len(os.listdir("/proc/self/fd")) == before


def test_row_of_an_unknown_ancillary_record(tmp_path):
    writer = Writer(tmp_path / "m.rac")
    writer.start({"features": []})
    writer.add(1000, 1, {"anything": [1]}, [b"abc"])
    writer.finish(bytes(16))
    data = (tmp_path / "m.rac").read_bytes()
    (entry,) = Archive(BytesAccess(data)).index.entries
    assert (entry.type, entry.flags, entry.name, entry.payload_size) == (1000, 1, "", 16)
    assert forward(data)[0] == []
    assert ix.needed(1000, 1, 0) is False
    assert struct.unpack_from("<HH", data, entry.at + 4) == (1000, 1)
