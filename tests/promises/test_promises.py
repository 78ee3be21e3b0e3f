"""The ten promises of the format, one test each."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import rac
from rac.container import wire
from rac.container.access import BytesAccess, FileAccess
from rac.container.forward import Forward
from rac.container.reader import Archive
from rac.container.writer import Writer
from rac.container.zstd import digest
from rac.encode.pack import pack_source
from rac.encode.sources import Attachment, Source, from_arrays
from rac.records import Limits
from rac.tensor import parse

ROOT = Path(__file__).parents[2]
MB = 1_000_000
RAC = [sys.executable, "-m", "rac.cli"]


def gaussian(seed, *shape, dtype=np.float32):
    """Weights whose rows and columns have different scales, as those of a model."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal((*shape[:-1], 1)) + rng.standard_normal(shape[-1]))
    return (rng.standard_normal(shape) * scale * 0.02).astype(dtype)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def archive(path, records, header=None):
    """An archive of records (type, flags, head, units, index fields), without any check of what they say."""
    writer = Writer(path, force=True)
    writer.start({"features": []} | (header or {}))
    for kind, flags, head, units, fields in records:
        writer.add(kind, flags, head, units, **fields)
    writer.finish(bytes(16))
    writer.close()
    return path


def u8(name, data, stage="raw/1", **change):
    """Record of a U8 tensor of one tile, which is stored as it is."""
    head = {
        "axis": 0,
        "digest": bytes(16),
        "dtype": "U8",
        "name": name,
        "shape": [len(data)],
        "stages": [{"id": stage}],
        "tile": [1, len(data)],
    } | change
    parts = (0, 0, 0, 0, len(data), -len(data) % 16)
    fields = {"method": stage, "dtype": head["dtype"], "shape": tuple(head["shape"]), "parts": parts}
    return 1, 0, head, [data], fields


class Pipe:
    """What a decoder may count on: `read`, which gives less than asked for, and nothing else."""

    def __init__(self, data):
        self._file, self.taken = io.BytesIO(data), 0

    def read(self, size):
        got = self._file.read(min(size, 50_001))
        self.taken += len(got)
        return got


class Counting:
    """A file that counts what is read of it."""

    def __init__(self, path):
        self._file = FileAccess(path)
        self.name, self.size, self.parallel, self.reads = self._file.name, self._file.size, 4, []

    def read_into(self, at, out):
        self.reads.append(len(out))
        self._file.read_into(at, out)

    def close(self):
        self._file.close()


def test_01_streamable(tmp_path):
    tensors = {f"layer {i}": gaussian(i, 512, 1024) for i in range(24)}
    rac.save_file(tensors, tmp_path / "m.rac", level="fast")
    data = (tmp_path / "m.rac").read_bytes()
    digests = {name: hashlib.sha256(t).digest() for name, t in tensors.items()}
    largest = next(iter(tensors.values())).nbytes
    del tensors
    assert len(data) > 30 * MB

    stream, ring = Pipe(data), 8 * MB
    taken, found = [], {}
    tracemalloc.start()
    try:
        for name, t in rac.stream(stream, ring=ring):
            found[name] = hashlib.sha256(t).digest()
            taken.append(stream.taken)
            del t
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == digests
    assert list(found) == list(digests)
    # reading runs no further ahead than the ring allows
    stored = [e.at + e.size for e in Archive(BytesAccess(data)).index.entries]
    assert all(got <= end + ring for got, end in zip(taken, stored, strict=True))
    assert stream.taken == len(data)
    # the tensor that was handed out, the one in hand, the ring
    assert peak < 2 * largest + ring + MB


def test_02_random_access(tmp_path):
    big, small = gaussian(1, 4096, 4096), gaussian(2, 100, 100)
    path = tmp_path / "m.rac"
    rac.save_file({"first": gaussian(3, 1024, 1024), "big": big, "small": small}, path)
    size = {e.name: e.size for e in Archive(FileAccess(path)).index.entries}
    access = Counting(path)

    def cost(read):
        access.reads.clear()
        got = read()
        return got, sum(access.reads)

    with rac.open(access) as f:
        assert len(access.reads) == 2
        assert sum(access.reads) <= 4096 + 65536
        assert f.keys() == ["first", "big", "small"]
        assert len(access.reads) == 2

        got, read = cost(lambda: f.get_tensor("small"))
        assert same(got, small)
        assert read <= size["small"]
        got, read = cost(lambda: f.get_tensor("big"))
        assert same(got, big)
        assert read <= 1.1 * size["big"]
        for part in range(8):
            rows = slice(part * 512, part * 512 + 512)
            got, read = cost(lambda rows=rows: f.get_slice("big")[rows])
            assert same(got, big[rows])
            assert read <= 1.1 * size["big"] / 8 + MB
            got, read = cost(lambda rows=rows: f.get_slice("big")[:, rows])
            assert same(got, np.ascontiguousarray(big[:, rows]))
            assert read <= 1.1 * size["big"] / 8 + MB


def _tree(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_03_self_contained(tmp_path):
    st = pytest.importorskip("safetensors.numpy")
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    shards = {"model-00001-of-00002.safetensors": ("a", "b"), "model-00002-of-00002.safetensors": ("größe",)}
    tensors = {"a": gaussian(1, 64, 64), "b": gaussian(2, 64, 64), "größe": gaussian(3, 7)}
    for file, names in shards.items():
        st.save_file({n: tensors[n] for n in names}, model / file, metadata={"format": "pt"})
    where = {n: file for file, names in shards.items() for n in names}
    index = json.dumps({"metadata": {}, "weight_map": where})
    (model / "model.safetensors.index.json").write_text(index)
    (model / "config.json").write_text('{"hidden_size": 64}\n')
    (model / "1_Pooling" / "config.json").write_bytes(bytes(range(256)) * 40)
    (model / "vocab.txt").write_bytes(b"")

    path = tmp_path / "m.rac"
    rac.pack(model, path)
    files = _tree(model)
    with rac.open(path) as f:
        assert set(f.attachments()) == files.keys() - shards.keys()
        assert all(f.attachment(n) == files[n] for n in f.attachments())
        assert f.metadata() == {"format": "pt"}
        assert f.archives[0].header["provenance"].keys() >= {"tool", "level", "source"}
    rac.unpack(path, tmp_path / "out")
    assert {n: d for n, d in _tree(tmp_path / "out").items() if n not in shards} == {
        n: d for n, d in files.items() if n not in shards
    }
    for file, names in shards.items():
        got = st.load_file(tmp_path / "out" / file)
        assert got.keys() == set(names)
        assert all(same(got[n], tensors[n]) for n in names)

    # several shards are one model, from each of them and from their folder
    (tmp_path / "set").mkdir()
    done = rac.pack(model, tmp_path / "set" / "m.rac", shard_size=20_000)
    assert [os.path.basename(p) for p in done.paths] == ["m-00001-of-00002.rac", "m-00002-of-00002.rac"]
    for start in (*done.paths, tmp_path / "set"):
        got = rac.load_file(start)
        assert got.keys() == tensors.keys()
        assert all(same(got[n], tensors[n]) for n in tensors)
    rac.unpack(done.paths[1], tmp_path / "out2")
    assert _tree(tmp_path / "out2") == _tree(tmp_path / "out")

    # ties are stored once and come back tied; what is only equal does not
    shared = gaussian(4, 128, 128)
    rac.save_file({"embed": shared, "head": shared, "copy": shared.copy()}, tmp_path / "t.rac")
    assert os.path.getsize(tmp_path / "t.rac") < shared.nbytes
    got = rac.load_file(tmp_path / "t.rac")
    assert got["embed"] is got["head"]
    assert not np.shares_memory(got["embed"], got["copy"])
    assert all(same(t, shared) for t in got.values())
    torch = pytest.importorskip("torch")
    weight = torch.from_numpy(shared)
    rac.save_file({"embed": weight, "head": weight, "copy": weight.clone()}, tmp_path / "t.rac")
    got = rac.load_file(tmp_path / "t.rac", framework="pt")
    assert got["embed"].untyped_storage().data_ptr() == got["head"].untyped_storage().data_ptr()
    assert got["embed"].untyped_storage().data_ptr() != got["copy"].untyped_storage().data_ptr()
    assert all(torch.equal(t, weight) for t in got.values())


def test_04_self_describing(tmp_path):
    tensors = {"w": gaussian(1, 300, 200), "bf": gaussian(2, 128, 128).view(np.uint16), "i": np.arange(999)}
    for level in ("fast", "default", "max"):
        rac.save_file(tensors, tmp_path / f"{level}.rac", level=level)
    code = """if True:
        import hashlib, sys
        sys.modules["rac.encode"] = None  # to import it is an error
        import rac
        for path in sys.argv[1:]:
            for name, t in rac.load_file(path).items():
                print(name, t.dtype, *t.shape, hashlib.sha256(t).hexdigest())
            with open(path, "rb") as f:
                assert [n for n, _ in rac.iter_tensors(f)] == ["w", "bf", "i"]
            with rac.open(path) as f:
                assert f.get_slice("w")[3:5].shape == (2, 200)
        assert not any(m.startswith("rac.encode.") for m in sys.modules)
        try:
            rac.save_file
        except ImportError:
            print("no encoder")
    """
    files = [str(tmp_path / f"{level}.rac") for level in ("fast", "default", "max")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(map(str, (n, t.dtype, *t.shape, hashlib.sha256(t).hexdigest()))) for n, t in tensors.items()]
    assert done.stdout.splitlines() == [*(lines * 3), "no encoder"]


def test_05_deterministic(tmp_path):
    st = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    tensors = {
        "tiles": gaussian(1, 600, 800),
        "small": gaussian(2, 64, 96, dtype=np.float16),
        "widened": (gaussian(3, 256, 128).view(np.uint32) & 0xFFFF0000).view(np.float32),
        "int": rng.integers(-9, 9, (100, 100), np.int8),
        "noise": rng.integers(0, 1 << 32, 5000, np.uint32),
        "sparse": np.where(rng.random((200, 200)) < 0.95, 0, rng.standard_normal((200, 200))),
    }
    source = tmp_path / "m.safetensors"
    st.save_file(tensors, source)
    for level in ("fast", "default", "max"):
        for name, jobs in (("one", 1), ("two", 2), ("five", 5), ("again", 5)):
            rac.pack(source, tmp_path / f"{level}-{name}", level=level, jobs=jobs)
    code = (
        "import rac, sys; [rac.pack(sys.argv[1], f'{sys.argv[2]}/{v}-slow', level=v) for v in ('fast','default','max')]"
    )
    subprocess.run([sys.executable, "-c", code, source, tmp_path], check=True, env={**os.environ, "RAC_NO_NATIVE": "1"})
    for level in ("fast", "default", "max"):
        expected = (tmp_path / f"{level}-one").read_bytes()
        for name in ("two", "five", "again", "slow"):
            assert (tmp_path / f"{level}-{name}").read_bytes() == expected, (level, name)
    # an unchanged tensor keeps the bytes of its record, wherever it lies
    rac.save_file({"x": tensors["small"], "tiles": tensors["tiles"]}, tmp_path / "moved.rac")

    def record(path):
        data = path.read_bytes()
        (e,) = (e for e in Archive(BytesAccess(data)).index.entries if e.name == "tiles")
        assert e.at % 64 == 0
        return data[e.at : e.at + e.size]

    assert record(tmp_path / "moved.rac") == record(tmp_path / "default-one")


def test_06_checked(tmp_path):
    tensors = {
        "lanes": gaussian(1, 1400, 1200),
        "zeros": np.zeros(5000, np.int64),
        "noise": np.random.default_rng(1).integers(0, 256, 5000, np.uint8),
    }
    source = from_arrays(tensors)
    file = Attachment("config.json", b"{}" * 100)
    path = tmp_path / "m.rac"
    pack_source(Source("hf", source.tensors, (file,), {}), path)
    data = path.read_bytes()
    whole = Archive(BytesAccess(data))
    entries = {e.name: e for e in whole.index.entries}
    assert {n: e.method for n, e in entries.items() if n in tensors} == {
        "lanes": "lanes/1",
        "zeros": "zstd/1",
        "noise": "raw/1",
    }

    def flipped(at, bit=0):
        out = bytearray(data)
        out[at] ^= 1 << bit
        return bytes(out)

    checked = 0
    for name in tensors:
        record = whole.record(entries[name])
        units = parse(record, Limits()).units
        for k, unit in enumerate(units):
            for at in sorted({0, unit.size // 2, unit.size - 1}):
                bad = flipped(record.payload + unit.offset + at, at % 8)
                for read in (rac.load, lambda d: dict(rac.iter_tensors(io.BytesIO(d)))):
                    with pytest.raises(rac.ChecksumError) as e:
                        read(bad)
                    assert e.value.unit == f"{name!r} unit {k}"
                    assert e.value.offset == record.payload + unit.offset
                    checked += 1
    assert checked > 50
    record = whole.record(entries["config.json"])
    with rac.open(BytesAccess(flipped(record.payload + 3))) as f, pytest.raises(rac.ChecksumError, match="config.json"):
        f.attachment("config.json")
    index = whole.index
    places = {
        "header": 40,
        "record head": entries["lanes"].at + 40,
        "index head": index.at + 33,
        "index": index.at + 64 * 2 + 30,
        "trailer": len(data) - 30,
    }
    for where, at in places.items():
        for read in (rac.load, lambda d: dict(rac.iter_tensors(io.BytesIO(d)))):
            with pytest.raises(rac.FormatError):
                read(flipped(at))
            assert where


def _hostile(tmp_path):
    """(what, bytes) of archives that claim more than they have."""
    path = tmp_path / "h.rac"
    good = archive(path, [u8("a", b"0123456789")]).read_bytes()
    at = Archive(BytesAccess(good)).index.entries[0].at
    index = Archive(BytesAccess(good)).index

    def record(kind, flags, body, payload):
        fixed = struct.pack("<4sHHIIQ", b"RREC", kind, flags, len(body), 0, payload)
        return fixed + struct.pack("<Q", wire.xxh3(fixed, body)) + body + bytes(wire.pad(32 + len(body)))

    yield "header length", good[:16] + b"\xff" * 4 + good[20:]
    yield "head length", good[: at + 8] + b"\xff" * 4 + good[at + 12 :]
    yield "payload length", good[:at] + record(40000, 1, b"\x80", 1 << 62)
    yield "payload length beyond the limit", good[:at] + record(40000, 1, b"\x80", (1 << 64) - 1)
    for n in ((1 << 24) - 1, (1 << 32) - 1):
        body = b"\x81\xa1x\xdd" + n.to_bytes(4, "big") + b"\xc0" * 5000
        yield "msgpack count", good[:at] + record(40000, 1, body, 0)
    tail = wire.trailer(index.at, (1 << 62) - 64)
    yield "index length", good[:-32] + tail
    units = {"units": struct.pack("<QQ", 1 << 63, 0)}
    for what, change in {
        "shape": {"shape": [1 << 58]},
        "shape product": {"shape": [1 << 40, 1 << 40]},
        "shape above 64 bits": {"shape": [(1 << 62) + 1]},
        "rank": {"shape": [1] * 65},
        "tile": {"shape": [1 << 40], "tile": [1, 1 << 40]},
        "dense size": {"shape": [1 << 30], "tile": [1, 1 << 20]},
    }.items():
        yield what, archive(path, [u8("a", b"0123456789", **change)]).read_bytes()
    kind, flags, head, _, fields = u8("a", b"0123456789")
    writer = Writer(path, force=True)
    writer.start({"features": []})
    writer.add(kind, flags, head, [b"0123456789"], **fields)
    prefix = path.with_name("h.rac.part")
    writer.flush()
    start = prefix.read_bytes()[:at]
    writer.close()
    prefix.unlink(missing_ok=True)
    body = wire.msg.pack(head | units)
    yield "unit size", start + record(1, 0, body, 16) + bytes(64)
    bomb = b"\x28\xb5\x2f\xfd" + b"\xe0" + (1 << 50).to_bytes(8, "little") + b"\x01\x00\x00"
    yield "zstd content size", archive(path, [u8("a", bomb, "zstd/1", shape=[1 << 20], tile=[1, 1 << 20])]).read_bytes()


def test_07_safe(tmp_path):
    seen = set()
    for what, data in _hostile(tmp_path):
        for read in (rac.load, lambda d: dict(rac.iter_tensors(Pipe(d)))):
            tracemalloc.start()
            try:
                with pytest.raises(rac.RacError):
                    read(data)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < 8 * MB, what
        seen.add(what)
    assert len(seen) == 14
    # nothing is executed: the codec has no way to, and an archive cannot name a path to write to
    for name in ("../x", "/x", "a/../../x", "a\\x", "C:x", "", "a//x", "."):
        source = Source("hf", from_arrays({"a": np.zeros(3)}).tensors, (Attachment(name, b"!"),), {})
        pack_source(source, tmp_path / "n.rac", force=True)
        with pytest.raises(rac.FormatError, match="not allowed"):
            rac.unpack(tmp_path / "n.rac", tmp_path / "deep" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.rac", "n.rac"]


def test_08_versioned(tmp_path):
    path = tmp_path / "m.rac"
    rac.save_file({"a": np.arange(100)}, path)
    data = path.read_bytes()

    def both(data, error, match):
        for read in (rac.load, lambda d: dict(rac.iter_tensors(io.BytesIO(d)))):
            with pytest.raises(error, match=match):
                read(data)

    for major in (1, 2, 65535):
        both(data[:8] + major.to_bytes(2, "little") + data[10:], rac.UnsupportedError, f"version {major}")
    # a later minor version is read
    pre = data[:10] + (7).to_bytes(2, "little") + data[12:24]
    body = data[32 : 32 + int.from_bytes(data[16:20], "little")]
    newer = pre + wire.xxh3(pre, body).to_bytes(8, "little") + data[32:]
    assert same(rac.load(newer)["a"], np.arange(100))

    # an addition marked as ancillary is skipped, one that is not is refused
    new = {"payload": "of a later version"}
    extra = [u8("a", b"xyz"), (9, 1, new, [b"?" * 100, b""], {}), u8("b", b"!"), (40000, 1, {}, [], {})]
    data = archive(path, extra).read_bytes()
    assert {n: t.tobytes() for n, t in rac.load(data).items()} == {"a": b"xyz", "b": b"!"}
    assert {n: t.tobytes() for n, t in rac.iter_tensors(Pipe(data))} == {"a": b"xyz", "b": b"!"}
    assert rac.load(archive(path, [u8("a", b"x", **{"x-note": 1})]).read_bytes())["a"].tobytes() == b"x"
    with pytest.raises(rac.UnsupportedError):
        Forward(Pipe(archive(path, [], {"features": ["lossy/1"]}).read_bytes()))
    unknown = {
        "record type 9": [(9, 0, new, [], {})],
        "stages 'lattice/1'": [u8("a", b"x", "lattice/1")],
        "stages 'raw/2'": [u8("a", b"x", "raw/2")],
        "stages 'raw/1, raw/1'": [u8("a", b"x", stages=[{"id": "raw/1"}] * 2)],
        "stage parameters": [u8("a", b"x", stages=[{"id": "raw/1", "x": 1}])],
        "dtype 'F6'": [u8("a", b"x", dtype="F6")],
        "needs": [u8("a", b"x", needs=["delta/1"])],
        "unknown field": [u8("a", b"x", later=1)],
    }
    for match, records in unknown.items():
        both(archive(path, records).read_bytes(), rac.UnsupportedError, match)
    for header, match in (({"features": ["lossy/1"]}, "lossy/1"), ({"later": 1}, "later")):
        both(archive(path, [u8("a", b"x")], header).read_bytes(), rac.UnsupportedError, match)


def _finished(part):
    """Whole tensor records of a part."""
    count = 0
    with open(part, "rb") as f:
        try:
            forward = Forward(f)
            for record in forward.records():
                for unit in parse(record, Limits()).units:
                    forward.unit(unit, record, 1 << 30, "")
                forward.skip(record)
                count += 1
        except rac.FormatError:
            pass
    return count


def test_09_crash_safe(tmp_path):
    st = pytest.importorskip("safetensors.numpy")
    source, whole, out = tmp_path / "m.safetensors", tmp_path / "whole.rac", tmp_path / "m.rac"
    part = Path(f"{out}.part")
    st.save_file({f"{i:02}": gaussian(i, 256, 512) for i in range(16)}, source)
    command = [*RAC, "pack", source, "--level", "max", "-j", "2", "-o"]
    subprocess.run([*command, whole], check=True, capture_output=True)
    size = whole.stat().st_size
    moments = np.random.default_rng(9).integers(0, size, 20)
    for k, moment in enumerate(moments.tolist()):
        with subprocess.Popen(
            [*command, out, *(["--resume"] if k % 2 else [])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None:
                if part.exists() and part.stat().st_size >= moment:
                    process.kill()
                    break
                time.sleep(0.0005)
        if out.exists():
            rac.verify(out, source)
            out.unlink()
    # the last part may be anything; then one that certainly has finished tensors and half a tensor
    fifth = Archive(FileAccess(whole)).index.entries[5]
    for cut in (None, fifth.at + fifth.size // 2):
        if cut is not None:
            part.write_bytes(whole.read_bytes()[:cut])
        expected = _finished(part) if part.exists() else 0
        assert cut is None or expected == 5
        done = subprocess.run([*command, out, "--resume"], check=True, capture_output=True, text=True)
        assert f"{expected} of 16 tensors were finished already" in done.stdout
        assert out.read_bytes() == whole.read_bytes()
        assert not part.exists()
        out.unlink()


def test_10_independently_readable(tmp_path):
    folder = ROOT / "format_spec" / "decoder"
    files = sorted(folder.rglob("*.py"))
    assert files
    allowed = {"numpy", "constriction", "msgpack", "zstandard", "xxhash", "decoder"} | sys.stdlib_module_names
    for file in files:
        text = file.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {n.split(".")[0] for n in names} <= allowed, file
        assert not re.search(
            r"importlib|__import__|\bcodec[/.]rac\b|\brac\.(container|decode|encode|entropy)\b", text
        ), file

    tensors = {
        "w": gaussian(1, 90, 70),
        "half": gaussian(2, 64, 64, dtype=np.float16),
        "i": np.arange(-50, 50, dtype=np.int16),
        "": np.zeros((2, 0)),
    }
    code = """if True:
        import sys
        sys.modules["rac"] = None  # to import it is an error
        from decoder.cli import main
        sys.exit(main())
    """
    for level in ("fast", "default", "max"):
        path = tmp_path / f"{level}.rac"
        rac.save_file(tensors, path, {"k": "v"}, level=level)
        done = subprocess.run(
            [sys.executable, "-c", code, path, "--json"], cwd=folder.parent, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), level
        report = json.loads(done.stdout)
        assert report["metadata"] == {"k": "v"}
        assert {t["name"]: t["xxh3_128"] for t in report["tensors"]} == {
            n: digest(t.tobytes()).hex() for n, t in tensors.items()
        }
