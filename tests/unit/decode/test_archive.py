"""The reading side of the public interface."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import rac
from rac.container.access import BytesAccess, FileAccess
from rac.container.reader import Archive
from rac.encode.pack import pack_source
from rac.encode.sources import Attachment, Source, from_arrays

A = np.arange(35.0).reshape(5, 7)


@pytest.fixture
def path(tmp_path):
    rac.save_file({"a": A, "b": np.array(3, np.int8)}, tmp_path / "m.rac", {"k": "v"})
    return tmp_path / "m.rac"


def test_it_is_used_like_safetensors(path):
    with rac.open(path, framework="np", device="cpu") as f:
        assert f.keys() == ["a", "b"]
        assert f.metadata() == {"k": "v"}
        assert (f.get_tensor("a") == A).all()
        part = f.get_slice("a")
        assert (part.get_shape(), part.get_dtype()) == ([5, 7], "F64")
        assert (part[1:3, ::2] == A[1:3, ::2]).all()
        f.metadata()["k"] = "w"
        assert f.metadata() == {"k": "v"}
    with rac.open(str(path)) as f:
        assert f.get_tensor("b")[()] == 3


def test_results_are_writable_and_apart(path):
    with rac.open(path) as f:
        first, second, part = f.get_tensor("a"), f.get_tensor("a"), f.get_slice("a")[:]
        for array in (first, second, part):
            array[0, 0] = 99
            assert array.flags.c_contiguous
        assert f.get_tensor("a")[0, 0] == 0


def test_names_that_are_not_there(path):
    with rac.open(path) as f:
        for call, what in ((f.get_tensor, "tensor"), (f.get_slice, "tensor"), (f.attachment, "attachment")):
            with pytest.raises(rac.NameNotFoundError, match=f"holds no {what} 'zz'") as e:
                call("zz")
            assert isinstance(e.value, KeyError)
            assert str(path) in str(e.value)


REFUSED = {
    "no index": (1.5, "x", True, np.bool_(False), np.array(True), [1.5], ["x"], [[0], [1, 2]], (0, object())),
    "too many": ((0, 0, 0), (Ellipsis, Ellipsis), (np.ones((5, 7), bool), 0)),
    "outside": (5, -6, (0, 7), [0, 5], [-6], (slice(None), [7])),
    "mask": (np.ones(4, bool), [True] * 6, np.ones((7, 5), bool)),
    "step": (np.s_[::-1], np.s_[4:0:-1], np.s_[::0], np.s_[:, ::-2]),
}


@pytest.mark.parametrize("key", [key for keys in REFUSED.values() for key in keys])
def test_indices_that_are_refused(path, key):
    with rac.open(path) as f, pytest.raises(rac.RacError) as e:
        f.get_slice("a")[key]
    assert isinstance(e.value, IndexError)


PARTS = (
    *(np.s_[0:6], np.s_[5:9], np.s_[-6:2], np.s_[:, 3:8], np.s_[..., 8:], np.s_[:9:2], np.s_[3:1], np.s_[-30:]),
    *(None, np.s_[None, 1], np.s_[..., None, 2:4], np.s_[:, None, ::3]),
    *([0, 2], [-1, -1, 0], [], [[0, 2], [1, 1]], np.array([3, 1], np.uint8), np.s_[1:, [6, 0]], np.s_[2, [1, -7]]),
    *(
        [True, False, True, False, False],
        np.s_[:, np.arange(7) % 2 == 0],
        A > 17,
        np.s_[0, :, None],
        np.s_[[0, 1], None],
    ),
)


@pytest.mark.parametrize("key", PARTS)
def test_parts_are_those_of_numpy(path, key):
    """Ends are clamped as in Python, lists and masks gather, None makes a dimension."""
    with rac.open(path) as f:
        part = f.get_slice("a")[key]
    assert part.shape == A[key].shape and (part == A[key]).all()


def test_an_integer_beside_a_list_is_what_the_framework_makes_of_it(path):
    torch = pytest.importorskip("torch")
    cube = np.arange(24.0).reshape(2, 3, 4)
    rac.save_file({"cube": cube}, path)
    with rac.open(path) as f, rac.open(path, framework="pt") as g:
        for key in (np.s_[0, :, [1, 2]], np.s_[[0, 1], :, 1], np.s_[1, [0, 2]]):
            assert (f.get_slice("cube")[key] == cube[key]).all()
            assert torch.equal(g.get_slice("cube")[key], torch.from_numpy(cube)[key])
        assert g.get_slice("cube")[torch.tensor([1])].shape == (1, 3, 4)
        assert g.get_slice("cube")[torch.tensor(1), torch.tensor([True, False, True])].shape == (2, 4)


def test_a_list_of_rows_reads_their_tiles_alone(tmp_path):
    a = np.random.default_rng(0).standard_normal((8192, 64)).astype(np.float32)
    rac.save_file({"a": a}, tmp_path / "m.rac")
    size, read = (tmp_path / "m.rac").stat().st_size, []

    class Counted(FileAccess):
        def read_into(self, at, out):
            read.append(len(out))
            super().read_into(at, out)

    with rac.open(Counted(tmp_path / "m.rac")) as f:
        for key in ([3, 8000, 3, -1], np.s_[5::4000], np.s_[[7000, 1], 2:4]):
            part, start = f.get_slice("a"), sum(read)
            assert (part[key] == a[key]).all()
            assert sum(read) - start < size / 2  # three of eight tiles at most


def test_arguments_that_are_refused(path):
    for kwargs, match in (
        ({"framework": "tf"}, "'tf'"),
        ({"framework": "np", "device": "cuda"}, "CPU"),
        ({"threads": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            rac.open(path, **kwargs)


def test_attachments(tmp_path):
    files = (Attachment("config.json", b"{}"), Attachment("a", b""), Attachment("long", b"x" * 100_000))
    pack_source(Source("hf", from_arrays({"a": A}).tensors, files, {}), tmp_path / "m.rac")
    data = (tmp_path / "m.rac").read_bytes()
    with rac.open(BytesAccess(data)) as f:
        assert f.attachments() == ["config.json", "a", "long"]
        assert [f.attachment(n) for n in f.attachments()] == [b"{}", b"", b"x" * 100_000]
        assert f.keys() == ["a"]
    assert [n for n, _ in rac.iter_tensors(io.BytesIO(data))] == ["a"]


def test_bytes_of_all_kinds(path):
    data = path.read_bytes()
    for kind in (bytes, bytearray, memoryview):
        assert (rac.load(kind(data))["a"] == A).all()


def test_shards_that_do_not_fit(tmp_path):
    src = from_arrays({"a": A, "b": A + 1, "c": A + 2})
    done = pack_source(src, tmp_path / "m.rac", shard_size=300)
    assert len(done.paths) == 3
    one, two, three = (tmp_path / f"m-0000{i}-of-00003.rac" for i in (1, 2, 3))
    assert sorted(rac.load_file(two)) == ["a", "b", "c"]
    assert list(rac.load(two.read_bytes())) == ["b"]  # the bytes of one shard are an archive by themselves
    data = three.read_bytes()
    three.unlink()
    with pytest.raises(rac.SourceError, match="No such file"):
        rac.load_file(one)
    three.write_bytes(two.read_bytes())
    with pytest.raises(rac.FormatError, match="is not shard 3 of 3"):
        rac.load_file(one)
    three.write_bytes(data)
    other = tmp_path / "renamed.rac"
    one.rename(other)
    with pytest.raises(rac.SourceError, match="must end in -00001-of-00003.rac"):
        rac.load_file(other)


def test_errors_name_file_unit_and_offset(path):
    data = bytearray(path.read_bytes())
    archive = Archive(FileAccess(path))
    payload = archive.record(archive.index.entries[0]).payload
    data[payload + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(rac.ChecksumError) as e:
        rac.load_file(path)
    assert (e.value.file, e.value.unit) == (str(path), "'a' unit 0")
    assert str(e.value) == f"checksum does not match [{path}, 'a' unit 0, offset {payload}]"


def test_a_stream_is_whole_when_it_is_exhausted(path):
    data = path.read_bytes()
    for end in (len(data) - 1, len(data) - 32, len(data) - 100):
        stream = rac.iter_tensors(io.BytesIO(data[:end]))
        assert next(stream)[0] == "a"
        assert next(stream)[0] == "b"
        with pytest.raises(rac.TruncatedError):
            next(stream)


def test_several_threads_read_one_file(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal((200, 300)).astype(np.float32) for i in range(24)}
    rac.save_file(arrays, tmp_path / "m.rac")
    with rac.open(tmp_path / "m.rac") as f, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(f.get_tensor, [*arrays] * 3))
    for name, got in zip([*arrays] * 3, found, strict=True):
        assert got.tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32, 40])
@pytest.mark.parametrize("cols", [512, 523])
def test_small_tiles_whose_lanes_are_stepped_side_by_side(tmp_path, lanes, cols):
    """Classes of rows and columns, so that tables end at other places in each tile; the last tiles are smaller."""
    rng = np.random.default_rng(lanes)
    scale = np.exp2(rng.integers(0, 6, (600, 1)) + rng.integers(0, 6, cols))
    words = (rng.standard_normal((600, cols)) * scale).astype(np.float32).view(np.uint32) >> 16
    a = (words << 16).view(np.float32)
    pack_source(from_arrays({"a": a}), tmp_path / "m.rac", lanes=lanes, slices="fine")
    with rac.open(tmp_path / "m.rac") as f:
        assert (f.get_tensor("a") == a).all()
        assert (f.get_slice("a")[37:411, 100:-3] == a[37:411, 100:-3]).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("on_error", ["raise", "report"])
def test_a_file_that_is_cut_off_while_it_is_open(tmp_path, threads, on_error):
    """Bytes are read where they are decoded: it is no damage of one tensor that they are not there."""
    w = np.random.default_rng(0).standard_normal((3000, 512)).astype(np.float32)
    path = tmp_path / "w.rac"
    rac.save_file({name: w + i for i, name in enumerate("abc")}, path)
    with rac.RacFile(path, threads=threads) as f:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(rac.TruncatedError) as e:
            f.load(on_error=on_error)
    assert e.value.file == str(path)


def test_small_tensors_share_blocks_of_bounded_size(tmp_path):
    w = {f"w{i}": np.full((40, 1000 + i), i, np.float32) for i in range(200)}
    rac.save_file(w, tmp_path / "w.rac")
    for ring in (1 << 20, 1 << 28):
        back, blocks = rac.load_file(tmp_path / "w.rac", ring=ring), {}
        for name, a in back.items():
            np.testing.assert_array_equal(a, w[name])
            block = a
            while block.base is not None:
                block = block.base
            blocks.setdefault(id(block), []).append(a)
            assert block.nbytes <= max(ring // 16, a.nbytes) + (2 << 20)
            assert a.__array_interface__["data"][0] % 16 == 0
        assert len(blocks) == 200 if ring == 1 << 20 else len(blocks) < 20
    with rac.open(tmp_path / "w.rac") as f:
        assert f.get_tensor("w7").base.nbytes == w["w7"].nbytes


class Reads(BytesAccess):
    """Bytes that have to be read, and what was read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []

    def view(self, at, size):
        return None

    def read_into(self, at, out):
        self.reads.append((at, len(out)))
        super().read_into(at, out)


@pytest.mark.parametrize("threads", [1, 2])
def test_tensors_side_by_side_are_read_at_once_and_checked_each(path, threads):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.normal(size=(128, 256 + i)).astype(np.float32) for i in range(6)}
    rac.save_file(tensors, path)
    data = path.read_bytes()
    access = Reads(data)
    with rac.RacFile(access, threads=threads) as f:
        entries = f.archives[0].index.entries
        begun = len(access.reads)
        found = f.load()
    assert all((found[name] == a).all() for name, a in tensors.items())
    size = entries[-1].at + entries[-1].size - entries[0].at
    assert [n > size - 4096 for _, n in access.reads[begun:]].count(True) == 1
    for e in entries:
        bad = bytearray(data)
        bad[e.at + e.size - 200] ^= 1
        with (
            pytest.raises(rac.ChecksumError, match=f"'{e.name}' unit"),
            rac.RacFile(Reads(bytes(bad)), threads=threads) as f,
        ):
            f.load()
