"""Matrices quantised by processes: the same bytes, bounded memory, one error for a process that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from rac.calibrate.folder import Folder
from rac.calibrate.layers import Layer, _Stored, joined
from rac.encode import ties, workers
from rac.encode.align import recipe as rcp
from rac.encode.allocate import budget
from rac.encode.options import Budget
from rac.encode.pack import pack, pack_source
from rac.encode.quantise.tensor import encode
from rac.encode.sources import from_arrays
from rac.errors import OutputError, SourceError
from rac.machine import room
from solve import solve


def arrays():
    rng = np.random.default_rng(0)
    return {f"{k}.weight": rng.standard_normal((160, 128)).astype(np.float32) for k in "abc"} | {
        "norm": np.ones(128, np.float32)
    }


def layers(folder):
    """As a calibration leaves them: in files, and means of two texts."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 128)).astype(np.float32) * np.geomspace(1, 9, 128, dtype=np.float32)
    folder.put("s.npy", x.T @ x / 500)
    one = {k: Layer(_Stored(folder, "s.npy"), None) for k in ("a.weight", "b.weight")}
    return joined([one, one])


def test_the_same_bytes(tmp_path):
    folder = Folder(None, "")
    source = from_arrays(arrays())
    groups = ties.find(source.tensors)
    recipe = rcp.calibrated(groups, layers(folder), (), "fast")
    with workers.start(2, processes=True) as pool:
        ours = budget.Search(groups, recipe, pool).meet(Budget(bits=3))
    done = pack_source(source, tmp_path / "p.rac", recipe=ours, jobs=2, processes=True)
    theirs = solve(groups, recipe, Budget(bits=3), 2)
    again = pack_source(source, tmp_path / "t.rac", recipe=theirs, jobs=3)
    assert ours.scale == theirs.scale
    assert (tmp_path / "p.rac").read_bytes() == (tmp_path / "t.rac").read_bytes()
    assert [(f.name, f.snr, f.size) for f in done.fidelity] == [(f.name, f.snr, f.size) for f in again.fidelity]


def test_from_a_file_and_to_a_quality(tmp_path):
    src = tmp_path / "m.safetensors"
    save_file(arrays(), src)
    for processes in (True, False):
        pack(src, tmp_path / f"{processes}.rac", snr=15.0, effort="fast", jobs=2, processes=processes)
    assert (tmp_path / "True.rac").read_bytes() == (tmp_path / "False.rac").read_bytes()


def test_what_a_worker_says_is_said(tmp_path):
    source = from_arrays({"a.weight": np.full((160, 128), np.nan, np.float32)})
    group = ties.find(source.tensors)[0]
    scales = rcp.lossy.Scales(np.zeros(160, np.int8), np.zeros(128, np.int8))
    recipe = rcp.Recipe({"a.weight": rcp.Aligned(0.0, scales)}, 32, 1)
    with workers.start(1, processes=True) as pool, pytest.raises(SourceError, match=r"'a\.weight' holds NaN"):
        list(workers.run(pool, encode, [(1, (group, recipe))], 1))


def test_a_killed_worker_is_named():
    with workers.start(1, processes=True) as pool, pytest.raises(OutputError, match="fewer --jobs"):
        list(workers.run(pool, os.kill, [(1, (pool.submit(os.getpid).result(), signal.SIGKILL))], 1))


def test_a_worker_begins_before_numpy_is_there():
    """numpy reads how many threads its BLAS has when it is imported."""
    code = "import sys, rac.encode.worker_begin; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with workers.start(1, processes=True) as pool:
        assert pool.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == os.environ.get("OPENBLAS_NUM_THREADS", "1")


def test_work_stays_within_its_room():
    busy, most, lock = 0, 0, threading.Lock()

    def work(size):
        nonlocal busy, most
        with lock:
            busy += size
            most = max(most, busy)
        time.sleep(0.01)
        with lock:
            busy -= size
        return size

    sizes = [3, 5, 12, 1, 1, 1, 4, 9, 2, 2, 2]
    with ThreadPoolExecutor(8) as pool:
        assert sorted(workers.run(pool, work, ((n, (n,)) for n in sizes), 10)) == sorted(sizes)
    assert most == 12  # the one that is too large alone


def test_room_is_known():
    source = from_arrays(arrays())
    t = ties.find(source.tensors)[0].tensor
    scales = rcp.lossy.Scales(np.zeros(160, np.int8), np.zeros(128, np.int8))
    plain = rcp.Recipe({t.name: rcp.Aligned(0.0, scales)}, 32, 1)
    known = rcp.Recipe({t.name: rcp.Aligned(0.0, scales, Layer(np.eye(128, dtype=np.float32), None))}, 32, 1)
    assert workers.need(t, plain) == workers.PER_WEIGHT * 160 * 128
    assert workers.need(t, known) - workers.need(t, plain) >= workers.PER_MOMENT * 128**2
    assert room() > 1 << 28
