"""Small tensors decoded in bundles, and each by itself: the same tensors, the same errors."""

from __future__ import annotations

import copy
import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import rac
from fuzz import fuzz_reader
from golden.model import parse
from rac import native
from rac.container.access import BytesAccess
from rac.decode import bundles, jobs
from rac.decode.engine import Cpu
from rac.native.prototypes import Stored
from support import kernels, readers
from support.fence import fenced

GOOD = sorted((readers.GOLDEN / "good").glob("*.rac"))


@contextmanager
def apart() -> Iterator[None]:
    """No bundles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cpu, "bundle", 0)
        yield


def outcome(data: bytes, threads: int = 1) -> tuple:
    """What a file loads to, as far as it can be compared."""
    try:
        with rac.RacFile(BytesAccess(data), threads=threads) as f:
            return [(n, v.dtype, v.shape, v.tobytes()) for n, v in f.load().items()]
    except rac.RacError as e:
        return type(e), str(e), e.unit, e.offset


def both(data: bytes) -> tuple:
    """The outcome, with bundles and without."""
    with apart():
        alone = outcome(data)
    assert outcome(data) == alone
    return alone


@pytest.fixture
def declined(monkeypatch) -> Iterator[list[str]]:
    """Names of the tensors that were in a bundle for nothing; beside them stands how many were not."""
    names, run = [], bundles.Bundle.run

    def note(self):
        run(self)
        names.extend(e.name if words is None else "" for e, words in zip(self.entries, self.words, strict=True))

    monkeypatch.setattr(bundles.Bundle, "run", note)
    return names


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    """Tensors of each plain stage: one tile and several, pairs and single symbols, classes with frames and without."""
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.integers(-4, 4, (256, 1))) * np.exp2(rng.integers(-4, 4, 384))
    wide = (rng.standard_normal((256, 384)) * scale).astype(ml_dtypes.bfloat16)
    tensors = {
        "wide": wide,
        "half": wide[:64].astype("f2"),
        "single": rng.standard_normal((90, 100)).astype("f4"),
        "vector": np.linspace(0, 1, 700).astype(ml_dtypes.bfloat16),
        "counts": np.arange(500).reshape(1, 500),
        "noise": rng.integers(0, 256, 5000, np.uint8),
        "escapes": np.where(rng.random((70, 300)) < 0.01, 1e30, wide[:70, :300]).astype(ml_dtypes.bfloat16),
        "one": np.float32(3).reshape(()),
        "ü" * 40: wide[:5],
    }
    out, folder = {}, tmp_path_factory.mktemp("bundles")
    for level in ("fast", "default", "max"):
        rac.save_file(tensors, folder / "m.rac", level=level)
        out[level] = (folder / "m.rac").read_bytes()
    return out


@pytest.mark.parametrize("cpu", kernels.CPUS)
def test_tensors(cpu, model, declined):
    with kernels.using(cpu):
        for data in model.values():
            assert len(both(data)) == 9
    assert len(declined) == 24  # the other has words of 32 bits
    assert not any(declined)


@pytest.mark.parametrize("extra", [{}, {"at": 64, "shard": "a.safetensors"}, {"at": 1 << 40, "name": "n" * 300}])
def test_what_the_source_says_more(extra, declined):
    """Maps of texts and numbers are passed over; of others, and of texts that are not ASCII, the twin decides."""
    a = parse((readers.GOLDEN / "good" / "example.rac").read_bytes())
    a.records[0].head["extra"] = extra
    assert isinstance(both(a.build()), list)
    assert declined == [""]
    for other in ({**extra, "x": "ä"}, {**extra, "x": {}}, {**extra, "": None}, {**extra, "x": -1}):
        a.records[0].head["extra"] = other
        assert isinstance(both(a.build()), list)
    assert declined[1:] == ["a"] * 4


def test_threads_and_files(tmp_path, model):
    with apart():
        alone = outcome(model["default"])
    (tmp_path / "m.rac").write_bytes(model["default"])
    for threads in (1, 2, 3):
        found = rac.load_file(tmp_path / "m.rac", threads=threads, ring=1 << 16)
        assert [(n, v.dtype, v.shape, v.tobytes()) for n, v in found.items()] == alone


@pytest.mark.parametrize("kind", ["good", "bad", "unsupported"])
def test_golden_files(kind):
    """Of each the same, with what an error says."""
    for name in readers.manifest()[kind]:
        data = (readers.GOLDEN / kind / name).read_bytes()
        if len(data) < 50_000:
            both(data)


@pytest.mark.parametrize("level", ["fast", "default", "max"])
def test_damage(level, model):
    """Bits of heads, of front units, of tiles and of padding: the same error, with its place."""
    data, rng = model[level], random.Random(5)
    with rac.open(data) as f:
        places = [0, 700, len(data) - 90]
        for e in f.archives[0].index.entries:
            payload = e.at + e.size - -(-e.payload_size // 64) * 64
            places += [e.at + k for k in rng.sample((0, 4, 6, 9, 13, 17, 25, 33, 40), 3)]
            places += [payload - 1, payload, payload + 40, payload + e.payload_size - 1, e.at + e.size - 1]
    for at in places:
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        both(bytes(broken))


def test_heads_that_were_changed():
    """Fields, lists and units of golden files, with checksums that are right again."""
    models = [parse(p.read_bytes()) for p in GOOD if p.stat().st_size < 20_000]
    rng, read = random.Random(3), 0
    for _ in range(100):
        a = copy.deepcopy(rng.choice(models))
        for _ in range(rng.choice((1, 1, 2))):
            fuzz_reader.change_fields(a, rng)
        read += isinstance(both(fuzz_reader.build(a)), list)
    assert 10 < read < 90


def test_bytes_around_a_bundle_are_not_touched(model, monkeypatch):
    """Neither behind the bytes that were read nor behind tables or tensors."""
    with apart():
        alone = {level: outcome(data) for level, data in model.items()}
    monkeypatch.setattr(bundles.Bundle, "_read", lambda self, read=bundles.Bundle._read: fenced(read(self)))
    monkeypatch.setattr(bundles.scratch, "take", lambda size: fenced(np.zeros(size, np.uint8)))
    monkeypatch.setattr(jobs.Room, "part", lambda self, size: fenced(np.zeros(size, np.uint8)))
    for cpu in native.cpus():
        with native.using(cpu):
            assert {level: outcome(data) for level, data in model.items()} == alone


def test_few_tables_at_once(model, monkeypatch, declined):
    """Memory for tables that suffices for few tensors, or for none of several tables."""
    for room, most in ((400_000, 0), (50_000, 6), (1 << 10, 9)):
        monkeypatch.setattr(bundles, "TABLES", room)
        declined.clear()
        both(model["default"])
        assert sum(map(bool, declined)) <= most


def test_where_most_was_declined_no_more_are_made(monkeypatch, declined, tmp_path):
    """What is read for a bundle that is declined is read in vain."""
    rac.save_file({f"t{i}": np.full(3000, i, np.uint8) for i in range(40)}, tmp_path / "m.rac")
    monkeypatch.setattr(bundles, "TABLES", 1)
    monkeypatch.setattr(bundles, "DENSE", 10_000)
    both((tmp_path / "m.rac").read_bytes())
    assert declined == ["t0", "t1", "t2"]


def test_without_memory(model, monkeypatch, declined):
    """They are read one after the other, each by itself."""

    def none(*_):
        raise MemoryError

    monkeypatch.setattr(bundles, "np", SimpleNamespace(empty=none, uint8=np.uint8, frombuffer=np.frombuffer))
    assert len(both(model["fast"])) == 9
    assert all(declined)


def test_rows_are_those_of_the_kernel():
    assert native.records._ROW.size == ctypes.sizeof(Stored)
    assert list(native.Row._fields) == [name for name, *_ in Stored._fields_]
