"""Whatever can be packed comes back bit for bit, by every way of reading."""

from __future__ import annotations

import io
import os
import tempfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rac
from rac import native
from rac import tensor as tn
from rac.container.access import BytesAccess
from rac.container.reader import Archive
from rac.decode import random as ld
from rac.encode.pack import pack_source
from rac.encode.sources import from_arrays
from support import kernels, tiles
from support.indices import indices
from support.reference import reference

SETTINGS = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
PLAIN = ["f8", "f4", "f2", "c8", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
ML = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu)
ML += (ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz)
DTYPES = [np.dtype(d) for d in (*PLAIN, *ML)]
NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
LEVELS = st.sampled_from(["fast", "default", "max"])
LANES = st.none() | st.sampled_from([1, 2, 3, 7, 32, 1000, 1024]) | st.integers(1, 1024)
TEXT = st.text(max_size=12)


def random_bits(dtype, shape, seed):
    """Any bit pattern: NaN payloads, denormals, negative zeros, bools that are neither 0 nor 1."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape)


@st.composite
def laid_out(draw, array):
    """The same values in another memory layout or byte order."""
    kind = draw(st.sampled_from(["plain", "fortran", "reversed", "strided", "broadcast", "swapped"]))
    if kind == "fortran":
        return np.asfortranarray(array)
    if kind == "reversed" and array.ndim:
        return array[::-1].copy()[::-1]
    if kind == "strided" and array.ndim:
        return np.repeat(array, 3, axis=-1)[..., 1::3]
    if kind == "broadcast":
        return np.broadcast_to(array, (draw(st.integers(1, 3)), *array.shape))
    if kind == "swapped" and array.dtype.itemsize > 1 and array.dtype.type is not ml_dtypes.bfloat16:
        return array.byteswap().view(array.dtype.newbyteorder(">"))
    return array


@st.composite
def any_array(draw):
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    return draw(laid_out(random_bits(draw(st.sampled_from(DTYPES)), shape, draw(st.integers(0, 1 << 32)))))


def structured(kind, dtype, rows, cols, seed):
    """Arrays that real models hold."""
    rng = np.random.default_rng(seed)
    if kind == "integers":
        low = -rng.integers(0, 100) if dtype.kind == "i" else 0
        return rng.integers(low, low + rng.integers(2, 100), (rows, cols)).astype(dtype)
    if kind == "constant":
        return np.full((rows, cols), rng.integers(0, 100)).astype(dtype)
    weights = rng.standard_normal((rows, cols))
    if kind == "scaled":
        weights *= np.exp2(rng.integers(-6, 6, (rows, 1)) + rng.integers(-3, 3, cols))
    if kind == "sparse":
        weights *= rng.random((rows, cols)) < 0.05
    if kind == "outliers":
        weights[rng.random((rows, cols)) < 0.001] *= 1e4
        weights.flat[0] = np.nan
    if kind == "two":
        weights = np.where(weights < 0, -1.0, 2.0)
    weights = (weights * 0.02 if kind != "two" else weights).astype(dtype)
    if kind == "widened":  # low half zero, as in float32 that holds bfloat16
        word = np.dtype(f"u{4 if dtype.kind == 'c' else dtype.itemsize}")
        weights = (weights.view(word) & ~word.type((1 << (4 * word.itemsize)) - 1)).view(dtype)
    return weights


FLOATS = [d for d in DTYPES if d.name in ("float64", "float32", "float16", "complex64", "bfloat16", "float8_e4m3fn")]
INTEGERS = [d for d in DTYPES if d.kind in "iu" and d.name in NAMES]


@st.composite
def structured_array(draw, most_rows=90, most_cols=300):
    kind = draw(st.sampled_from(["scaled", "plain", "sparse", "outliers", "two", "widened", "integers", "constant"]))
    dtype = draw(st.sampled_from(INTEGERS if kind == "integers" else FLOATS))
    if kind == "outliers" and dtype.itemsize == 1:
        kind = "scaled"
    shape = draw(st.integers(1, most_rows)), draw(st.integers(1, most_cols))
    return structured(kind, dtype, *shape, draw(st.integers(0, 1 << 32)))


def plain(array):
    """Little-endian, contiguous."""
    array = np.asarray(array)
    if array.dtype.byteorder == ">":
        array = array.byteswap().view(array.dtype.newbyteorder("<"))
    return np.array(array, order="C", copy=True)


def equal(got, expected):
    return got.dtype == expected.dtype and got.shape == expected.shape and got.tobytes() == expected.tobytes()


def check(data, arrays, metadata, indices):
    """All ways of reading give `arrays`."""
    expected = {name: plain(a) for name, a in arrays.items()}

    def all_equal(got):
        assert got.keys() == expected.keys()
        for name, array in expected.items():
            assert equal(got[name], array), name

    all_equal(rac.load(data))
    all_equal(dict(rac.iter_tensors(io.BytesIO(data))))
    with rac.open(BytesAccess(data), threads=3) as f:
        assert f.metadata() == metadata
        assert sorted(f.keys()) == sorted(expected)
        all_equal({name: f.get_tensor(name) for name in expected})
        for name, array in expected.items():
            part = f.get_slice(name)
            assert part.get_shape() == list(array.shape)
            assert part.get_dtype() == NAMES[array.dtype.name]
            for index in indices(array.shape):
                got = part[index]
                # numpy makes True of a bool that it takes out alone, whatever its byte was
                opaque = np.asarray(array.view(f"V{array.itemsize}")[index]).view(array.dtype)
                assert equal(got, opaque), (name, index)


def indices_from(data, count):
    def draw(shape):
        return [data.draw(indices(shape)) for _ in range(count)]

    return draw


def packed(arrays, metadata=None, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.rac")
        pack_source(from_arrays(arrays, metadata), path, **options)
        with open(path, "rb") as f:
            return f.read()


@given(st.data())
@SETTINGS
def test_any_dict_of_arrays(data):
    arrays = data.draw(st.dictionaries(TEXT, any_array(), max_size=4))
    metadata = data.draw(st.dictionaries(TEXT, TEXT, max_size=3))
    level, lanes = data.draw(LEVELS), data.draw(LANES)
    check(packed(arrays, metadata, level=level, lanes=lanes), arrays, metadata, indices_from(data, 2))


@given(st.dictionaries(TEXT, any_array(), max_size=4), st.dictionaries(TEXT, TEXT, max_size=3), LEVELS)
@SETTINGS
def test_files(arrays, metadata, level):
    expected = {name: plain(a) for name, a in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "größe.rac")
        rac.save_file({"other": np.zeros(3)}, path)
        rac.save_file(arrays, path, metadata, level=level)
        assert os.listdir(folder) == ["größe.rac"]
        got = rac.load_file(path)
        assert got.keys() == expected.keys()
        assert all(equal(got[n], a) for n, a in expected.items())
        with open(path, "rb") as f:
            assert all(equal(t, expected[n]) for n, t in rac.iter_tensors(f))
        rac.verify(path)


@given(st.data())
@SETTINGS
def test_structured_arrays_in_many_tiles(data):
    arrays = data.draw(st.dictionaries(TEXT, structured_array(), min_size=1, max_size=2))
    level, lanes = data.draw(LEVELS), data.draw(LANES)
    with pytest.MonkeyPatch.context() as patch:
        most = data.draw(st.sampled_from([1 << 8, 1 << 14, 1 << 20]))
        tiles.cut(patch, ((1, most), (3, 2 * most), (8, 1 << 62)))
        archive = packed(arrays, {}, level=level, lanes=lanes)
    check(archive, arrays, {}, indices_from(data, 3))


@pytest.mark.parametrize("level", ["fast", "default", "max"])
@pytest.mark.parametrize("shape", [(301, 1999), (600_007,), (64, 80, 9, 9), (9, 45_003)])
def test_large_arrays(level, shape):
    flat = structured("scaled", np.dtype("f4"), 600, 1001, 5).reshape(-1)
    array = np.resize(flat, shape)
    data = packed({"w": array}, {}, level=level)
    grid = tn.parse(_first(data), Archive(BytesAccess(data)).limits).grid
    assert grid.down * grid.across > 1
    assert len(data) < 0.96 * array.nbytes

    def indices(shape):
        yield from (
            (0,),
            (shape[0] - 1, Ellipsis),
            (slice(shape[0] // 3, shape[0] // 2),),
            (Ellipsis, slice(None, None, 7)),
        )
        yield (..., slice(shape[-1] // 8, shape[-1] // 4))
        yield (slice(1, None, 3), ..., -1) if len(shape) > 1 else (slice(None, None, 3),)
        yield ([0, shape[0] - 1, 0],)

    check(data, {"w": array}, {}, indices)


def _first(data):
    archive = Archive(BytesAccess(data))
    return archive.record(archive.index.entries[0])


def test_every_value_of_16_bits():
    for dtype in ("f2", ml_dtypes.bfloat16, "i2", "u2"):
        array = np.arange(65536, dtype=np.uint16).view(dtype).reshape(256, 256)
        for level in ("fast", "default", "max"):
            check(packed({"all": array}, {}, level=level), {"all": array}, {}, lambda shape: [(3, slice(5, 200, 11))])


def test_special_values():
    patterns = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFA5A5A5, 1, 0x807FFFFF, 0x00800000]
    array = np.tile(np.array(patterns, np.uint32), (97, 31)).view(np.float32)
    for level in ("fast", "default", "max"):
        check(packed({"s": array}, {}, level=level), {"s": array}, {}, lambda shape: [(slice(1, None, 2),)])


# --- torch ----------------------------------------------------------------------------------------

TORCH = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float4_e2m1fn_x2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
]


def _raw(t):
    """Elements as opaque bytes, so that numpy can index what torch cannot."""
    import torch

    size = t.element_size()
    flat = t.detach().contiguous().clone().reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(-1, size).copy().view(f"V{size}").reshape(tuple(t.shape))


def _torch_tensor(dtype, shape, seed):
    import torch

    kind = getattr(torch, dtype)
    size = torch.empty(0, dtype=kind).element_size()
    data = np.random.default_rng(seed).bytes(int(np.prod(shape, dtype=np.int64)) * size)
    if not data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind).reshape(shape)


@given(st.data())
@SETTINGS
def test_torch(data):
    torch = pytest.importorskip("torch")
    tensors = {}
    for name in data.draw(st.sets(TEXT, max_size=3)):
        dtype = data.draw(st.sampled_from(TORCH))
        least = 1 if dtype == "float4_e2m1fn_x2" else 0  # a lone pair of values has no dimension to split
        shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=least, max_size=4)))
        tensor = _torch_tensor(dtype, shape, data.draw(st.integers(0, 1 << 32)))
        if data.draw(st.booleans()) and tensor.ndim > 1:
            tensor = tensor.transpose(0, 1)
        tensors[name] = tensor
    archive = packed(tensors, {}, level=data.draw(LEVELS), lanes=data.draw(LANES))
    ways = (
        rac.load(archive, framework="pt"),
        dict(rac.iter_tensors(io.BytesIO(archive), framework="pt")),
    )
    for got in ways:
        assert got.keys() == tensors.keys()
        for name, expected in tensors.items():
            assert (got[name].dtype, got[name].shape) == (expected.dtype, expected.shape)
            assert _raw(got[name]).tobytes() == _raw(expected).tobytes()
    with rac.open(BytesAccess(archive), framework="pt") as f:
        for name, expected in tensors.items():
            assert torch.is_tensor(f.get_tensor(name))
            index = data.draw(indices(tuple(expected.shape)))
            part = f.get_slice(name)[index]
            where = torch.arange(expected.numel()).reshape(expected.shape)[index]  # which indexes as torch does
            wanted = np.asarray(_raw(expected).reshape(-1)[where.numpy()])
            assert part.dtype == expected.dtype
            assert tuple(part.shape) == wanted.shape
            assert _raw(part).tobytes() == wanted.tobytes()


def test_torch_strides_of_one_element():
    torch = pytest.importorskip("torch")
    tensors = {"every 4th": torch.arange(4.0)[::4], "column": torch.ones(1, 3)[:, 1], "imag": torch.tensor([1j]).imag}
    got = rac.load(packed(tensors), framework="pt")
    assert {n: t.tolist() for n, t in got.items()} == {"every 4th": [0.0], "column": [1.0], "imag": [1.0]}


def test_torch_ties():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.randn(33, 65, generator=torch.Generator().manual_seed(0)))
    tensors = {"embed": weight, "head": weight, "detached": weight.detach(), "copy": weight.detach().clone()}
    data = packed(tensors)
    assert len(data) < weight.nbytes + 2048
    for got in (rac.load(data, framework="pt"), dict(rac.iter_tensors(io.BytesIO(data), framework="pt"))):
        assert list(got) == list(tensors)
        assert got["embed"].data_ptr() == got["head"].data_ptr() == got["detached"].data_ptr() != got["copy"].data_ptr()
        assert all(torch.equal(t, weight) for t in got.values())


def test_f4_from_numpy_is_packed_bytes():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(48, dtype=torch.uint8).reshape(3, 16).view(torch.float4_e2m1fn_x2)
    got = rac.load(packed({"f4": tensor}))
    assert equal(got["f4"], np.arange(48, dtype=np.uint8).reshape(3, 16))


# --- C, numba and numpy, constriction --------------------------------------------------------------


def _decoded(data):
    archive = Archive(BytesAccess(data))
    return [words.tobytes() for _, words in ld.load(archive, list(archive.index.entries))]


@given(st.data())
@SETTINGS
def test_kernels_agree(data):
    """The C kernels, their twins and constriction: the same files, the same arrays."""
    array = data.draw(structured_array())
    level, lanes = data.draw(LEVELS), data.draw(LANES)
    assert native.available()
    with pytest.MonkeyPatch.context() as patch:
        most = data.draw(st.sampled_from([1 << 8, 1 << 14, 1 << 20]))
        tiles.cut(patch, ((1, most), (3, 2 * most), (8, 1 << 62)))
        archive = packed({"a": array}, level=level, lanes=lanes)
        fast = _decoded(archive)
        packing = data.draw(st.sampled_from(kernels.here()))
        for cpu in (*kernels.here(), None):
            with kernels.using(cpu):
                assert cpu not in (packing, None) or packed({"a": array}, level=level, lanes=lanes) == archive
                assert _decoded(archive) == fast
        with reference():
            exact = _decoded(archive)
    assert fast == exact == [array.tobytes()]


def _outcome(unit, t, front, box):
    shared = t.chain.coder.open(front, t.grid)
    out = np.zeros((box[1] - box[0], box[3] - box[2]), f"<u{t.grid.word}")
    try:
        if native.available():
            unit = shared.plain(unit, box)
            place = native.address(out), out.shape[1]
            job = shared.kernel()((native.address(unit), len(unit)), box, place, None)
            span = native.TileSpan(job, 0, 0, 1, *out.shape, t.grid.word)
            return "refused" if native.decode_spans([span]) else out.tobytes()
        shared.decode(unit, box, out)
    except rac.RacError:
        return "refused"
    return out.tobytes()


@given(st.data())
@SETTINGS
def test_kernels_agree_on_damage(data):
    """Without the checksum in front of them all decoders refuse the same tiles."""
    dtype = data.draw(st.sampled_from([np.dtype("f4"), np.dtype(ml_dtypes.bfloat16)]))
    # large enough for 40 lanes to be smaller than zstd at any level
    shape = data.draw(st.integers(80, 99)), data.draw(st.integers(80, 99))
    array = structured("plain", dtype, *shape, data.draw(st.integers(0, 1 << 32)))
    array.flat[:: data.draw(st.integers(80, 999))] = 0  # so that there are escapes
    array.flat[7] = np.inf
    archive = Archive(BytesAccess(packed({"a": array}, level=data.draw(LEVELS), lanes=data.draw(st.integers(1, 40)))))
    t = tn.parse(archive.record(archive.index.entries[0]), archive.limits)
    assert t.chain.method == "lanes/1"
    ((shared_unit, unit, *_),) = ld.read_units(archive, t, [(0, len(t.units))])
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    other = data.draw(st.sampled_from(kernels.here()))
    for _ in range(10):
        bad = unit.copy()
        end = len(unit) if rng.random() < 0.7 else 2 * t.chain.coder.directory
        bad[rng.integers(0, end, rng.integers(1, 3))] ^= np.uint8(1 << rng.integers(0, 8))
        bad = bad[: len(bad) - rng.choice([0, 0, 0, 0, 0, 1, 16, 64])].copy()
        args = bad, t, shared_unit.tobytes(), t.grid.box(0)
        fast = _outcome(*args)
        with reference():
            exact = _outcome(*args)
        assert fast == exact
        for cpu in {*native.cpus(), other}:
            with kernels.using(cpu):
                assert _outcome(*args) == exact
        with native.using(None):
            assert _outcome(*args) == exact
