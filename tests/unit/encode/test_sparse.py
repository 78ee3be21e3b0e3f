"""What is not Gaussian: zeros that stay zeros, heavy tails, and tensors that are smaller losslessly."""

from __future__ import annotations

import io
import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import rac
from rac.calibrate.layers import Layer
from rac.cli import main
from rac.container.access import FileAccess
from rac.container.reader import Archive
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.allocate.budget import Search
from rac.encode.options import Budget, Hooks, Lossy, PackOptions
from rac.encode.pack import ByTrellis, Packer, pack_source
from rac.encode.quantise.tensor import code, snr
from rac.encode.sources import from_arrays
from rac.registry import RECORD_TENSOR
from solve import solve

N = 192
R = np.random.default_rng


def gaussian(seed=0, shape=(N, N)):
    return R(seed).standard_normal(shape).astype(np.float32)


def two_of_four(seed=0, shape=(N, N)):
    w = gaussian(seed, shape).reshape(-1, 4)
    np.put_along_axis(w, np.argsort(R(seed + 1).random(w.shape), 1)[:, :2], 0, 1)
    return w.reshape(shape)


def thinned(share, seed=0, shape=(N, N)):
    return np.where(R(seed + 1).random(shape) < share, np.float32(0), gaussian(seed, shape))


def second(n, seed=2):
    """Of inputs whose spectrum falls, as activations' does."""
    turn = np.linalg.qr(R(seed).standard_normal((n, n)))[0]
    x = R(seed + 1).standard_normal((4 * n, n)) * np.arange(1, n + 1) ** -0.6 @ turn
    return (x.T @ x / len(x)).astype(np.float32)


def pack_arrays(arrays, path, effort="fast", **goal):
    with Packer(from_arrays(arrays), path, PackOptions(jobs=1, force=True), Hooks()) as packer:
        recipe = packer.allocate("", Lossy(Budget(**goal), effort=effort))
        return packer.write(ByTrellis(recipe, packer.kept))


def bits_of(path):
    archive = Archive(FileAccess(path))
    rows = [e for e in archive.index.entries if e.type == RECORD_TENSOR]
    archive.close()
    return {e.name: 8 * e.size / math.prod(e.shape) for e in rows}


def zeros_stay(found, w):
    return not np.asarray(found)[np.asarray(w) == 0].any()


@pytest.mark.parametrize("effort", ["fast", "max"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("make", [two_of_four, lambda: thinned(0.5), lambda: thinned(0.9)])
def test_zeros_stay_zeros(tmp_path, make, dtype, effort):
    w = make().astype(dtype)
    w[:3] = np.where(w[:3] == 0, dtype(-0.0), w[:3])  # which come back as +0
    path = tmp_path / "m.rac"
    done = pack_arrays({"w": w}, path, effort, bits=2.0)
    assert [(f.states, f.zeros) for f in done.fidelity] == [(1, 0)]
    back = rac.load_file(path)["w"]
    assert zeros_stay(back, w) and not np.signbit(back[np.asarray(w) == 0].astype(np.float32)).any()
    with rac.open(path) as f:
        assert f.get_slice("w")[5:99, 3:70].tobytes() == back[5:99, 3:70].tobytes()
    assert dict(rac.stream(io.BytesIO(path.read_bytes())))["w"].tobytes() == back.tobytes()


def test_two_of_four_beside_a_dense_one(tmp_path):
    shape = (384, 384)  # tools/sparse_bar.py does this at 2048
    done = pack_arrays({"dense": gaussian(4, shape), "sparse": two_of_four(5, shape)}, tmp_path / "m.rac", bits=4)
    assert max(bits_of(tmp_path / "m.rac").values()) <= 4.4
    assert {f.name: f.outliers for f in done.fidelity} == {"dense": 0, "sparse": 0}
    assert zeros_stay(rac.load_file(tmp_path / "m.rac")["sparse"], two_of_four(5, shape))


def layer_of(how):
    if how == "experts":
        return Layer(second(96), np.ones(192), False, True, [Layer(second(96, i), np.ones(96)) for i in (2, 5)])
    return Layer(second(N), np.geomspace(1, 4, N), how == "rows")


@pytest.mark.parametrize("how", ["columns", "rows", "experts"])
def test_zeros_stay_where_errors_are_fed_back(how):
    """And the feedback still gains what it gains elsewhere."""
    w = two_of_four(3, (2, 96, 96) if how == "experts" else (N, N))
    groups = ties.find(from_arrays({"w": w}).tensors)
    found = {}
    for name, recipe in {
        "fed": rcp.calibrated(groups, {"w": layer_of(how)}, (), "fast"),
        "plain": rcp.data_free(groups, (), "fast"),
    }.items():
        solved = solve(groups, recipe, Budget(bits=2.5), 1)
        assert solved.aligned["w"].zeros == pytest.approx(0.5)
        dense = code(groups[0].tensor, solved).dense
        assert zeros_stay(dense.view(np.float32).reshape(w.shape), w)
        found[name] = snr(groups[0].tensor, dense, rcp.calibrated(groups, {"w": layer_of(how)}, (), "fast"))
    assert found["fed"] > found["plain"] + 2.5


def test_columns_of_zeros_alone_say_nothing():
    """A quantiser leaves them out; the rest is as fine as without them."""
    w = gaussian(6)
    w[:, ::3] = 0
    groups = ties.find(from_arrays({"w": w}).tensors)
    for recipe in (rcp.data_free(groups, (), "fast"), rcp.calibrated(groups, {"w": layer_of("")}, (), "fast")):
        assert recipe.aligned["w"].zeros == 0
        found = code(groups[0].tensor, solve(groups, recipe, Budget(bits=3), 1)).quantised
        assert found.dead == 64 and found.trellis.states > 1 and zeros_stay(found.dense.view(np.float32), w)
        assert abs(recipe.aligned["w"].base) < 3


TAILS = {
    "laplace": lambda r: r.laplace(size=(N, N)),
    "student": lambda r: r.standard_t(2, (N, N)),
    "cauchy": lambda r: r.standard_cauchy((N, N)),
    "log-normal rows": lambda r: np.exp(2 * r.standard_normal((N, 1))) * r.standard_normal((N, N)),
    "log-normal columns": lambda r: np.exp(2 * r.standard_normal((1, N))) * r.standard_normal((N, N)),
    "decay": lambda r: r.standard_normal((N, N)) * 2.0 ** -np.abs(np.arange(N)[:, None] - np.arange(N)),
}


@pytest.mark.parametrize("name", TAILS)
def test_heavy_tails_take_no_more_than_others(tmp_path, name):
    w = TAILS[name](R(7)).astype(np.float32)
    pack_arrays({"dense": gaussian(8), "w": w}, tmp_path / "m.rac", bits=4)
    bits, back = bits_of(tmp_path / "m.rac"), rac.load_file(tmp_path / "m.rac")["w"]
    assert bits["w"] < 4.4
    assert ((back - w) ** 2).sum() < 0.006 * (w.astype(np.float64) ** 2).sum()  # of the Gaussian: 0.0045


@pytest.mark.parametrize("axis", [0, 1])
def test_lines_that_are_far_larger_are_coarser(axis):
    """Where inputs are known, the size of a line says nothing of its step; few of it may be outliers for all that."""
    size = np.where(np.arange(N) % 8, np.float32(1), np.float32(400))
    w = gaussian(14) * (size if axis else size[:, None])
    groups = ties.find(from_arrays({"w": w}).tensors)
    recipe = rcp.calibrated(groups, {"w": Layer(np.eye(N, dtype=np.float32), np.ones(N))}, (), "fast")
    q = code(groups[0].tensor, solve(groups, recipe, Budget(bits=4), 1)).quantised
    assert q.outliers < w.size // 64  # of an eighth that is so large
    error = (q.dense.view(np.float32) - w) ** 2
    small = error[:, size == 1] if axis else error[size == 1]
    assert 0 < small.mean() < 0.1


@pytest.mark.parametrize("goal", [{"bits": 40.0}, {"size": 10**11}, {"file_bits": 30.0}, {"snr": 300.0}])
def test_nothing_is_finer_than_lossless(tmp_path, goal):
    arrays = {"a": gaussian(9), "b": TAILS["cauchy"](R(9)).astype(ml_dtypes.bfloat16), "zero": np.zeros((N, N), "<f4")}
    done = pack_arrays(arrays, tmp_path / "m.rac", **goal)
    assert (done.quantised, done.fidelity) == (0, ())
    pack_source(from_arrays(arrays), tmp_path / "lossless.rac")
    back = rac.load_file(tmp_path / "m.rac")
    assert all(back[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert {**bits_of(tmp_path / "m.rac")} == {**bits_of(tmp_path / "lossless.rac")}


def test_few_values_are_lossless(tmp_path):
    arrays = {
        "w": gaussian(10),
        "constant": np.full((N, N), np.float32(0.3)),
        "signs": np.sign(gaussian(11)),
        "rows": np.repeat(gaussian(12, (1, N)), N, 0),
    }
    pack_arrays(arrays, tmp_path / "m.rac", bits=4)
    back = rac.load_file(tmp_path / "m.rac")
    assert [name for name in arrays if back[name].tobytes() != arrays[name].tobytes()] == ["w"]


def test_a_budget_that_jumps_ends_on_its_better_side(tmp_path):
    """Between what can be lossy and lossless there is nothing: a quality is met from above."""
    w = gaussian(13).astype(ml_dtypes.bfloat16)
    groups = ties.find(from_arrays({"w": w}).tensors)
    done = pack_arrays({"w": w}, tmp_path / "m.rac", snr=75.0)
    assert done.quantised == 0 and rac.load_file(tmp_path / "m.rac")["w"].tobytes() == w.tobytes()
    assert Search(groups, rcp.data_free(groups, (), "fast"), None).sizes == {}


def test_zeros_that_are_too_few_are_counted_and_named(tmp_path, capsys):
    save_file({"w": thinned(0.1), "dense": gaussian(15)}, tmp_path / "m.safetensors")
    report = tmp_path / "r.json"
    options = ["--bits", "3", "--effort", "fast", "--report", str(report)]
    assert main(["pack", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "m.rac"), *options]) == 0
    said = capsys.readouterr()
    assert "zeros come back as small numbers in 1 tensors (10." in said.err and said.err.rstrip().endswith("kept: w")
    assert f"weights: {2 * N * N:,} of {2 * N * N:,} quantised (100.00%); lossless: none" in said.out
    lost = {t["name"]: t["zeros"] for t in json.loads(report.read_text())["tensors"]}
    back = rac.load_file(tmp_path / "m.rac")["w"]
    assert lost == {"dense": 0, "w": np.count_nonzero(back[thinned(0.1) == 0])} and lost["w"] > N * N // 20
