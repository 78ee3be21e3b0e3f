"""Recursions in files: each found once, the same bits, and never a reason to fail."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from rac.calibrate.folder import Folder
from rac.calibrate.layers import Layer, _Stored, joined
from rac.encode.align.recipe import Aligned
from rac.encode.quantise.trellis import Scales
from rac.linalg.factors import Factors
from rac.linalg.triangular import Triangular, blocks, triangular


def second(n=300, seed=0):
    x = np.random.default_rng(seed).standard_normal((n // 2, n)).astype(np.float32)
    return x.T @ x


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("order", "weight", "feed"))


class Counted:
    def __init__(self, work):
        self.work, self.times = work, 0

    def __call__(self):
        self.times += 1
        return self.work()


def test_it_is_found_once_and_has_the_same_bits():
    s = second()
    for find in (Counted(lambda: triangular(s)), Counted(lambda: blocks([s, 2 * s]))):
        factors = Factors()
        first = factors.get("a", find)
        again, elsewhere = factors.get("a", find), pickle.loads(pickle.dumps(factors)).get("a", find)
        assert find.times == 1
        assert same(first, again)
        assert same(first, elsewhere)
        factors.get("b", find)
        assert find.times == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere holes depend on the file system")
@pytest.mark.parametrize("experts", [1, 2])
def test_the_zeros_take_no_disk(experts):
    """A lower triangle has half of a square, and pages of 4,096 bytes."""
    n, factors = 2048, Factors()
    feed = np.tril(np.ones((experts, n, n), np.float32), -1).swapaxes(1, 2)
    found = Triangular(np.arange(n), np.ones((experts, n)), feed if experts > 1 else feed[0])
    factors.get("a", lambda: found)
    assert same(factors.get("a", pytest.fail), found)
    taken = sum(512 * path.stat().st_blocks for path in Path(factors._folder).iterdir())
    assert taken < 0.8 * feed.nbytes  # 0.76; 0.63 at twice the width


def test_threads_wait_for_the_one_that_finds_it():
    s, factors = second(), Factors()
    find = Counted(lambda: triangular(s))
    threads = [threading.Thread(target=factors.get, args=("a", find)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert find.times == 1


def test_what_is_small_or_has_no_room_or_is_lost_is_found_again(monkeypatch):
    s, factors = second(), Factors()
    find, small = Counted(lambda: triangular(s)), Counted(lambda: triangular(second(100)))
    for _ in range(2):
        factors.get("small", small)
    assert small.times == 2
    full = Factors("cpu", factors._folder, shutil.disk_usage(factors._folder).total)
    for _ in range(2):
        assert same(full.get("a", find), triangular(s))
    assert find.times == 2
    factors.get("a", find)
    for path in Path(factors._folder).iterdir():
        os.truncate(path, 100)
    assert same(factors.get("a", find), triangular(s))
    assert find.times == 4
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    assert same(factors.get("c", find), triangular(s))
    assert not list(Path(factors._folder).glob("*.part"))


def test_the_folder_goes_away():
    factors = Factors()
    folder = factors._folder
    factors.get("a", lambda: triangular(second()))
    assert os.listdir(folder)
    del factors
    assert not os.path.exists(folder)


@pytest.mark.parametrize("mean", [False, True])
def test_layers_of_one_input_share_one(mean, monkeypatch):
    folder, factors = Folder(None, ""), Factors()
    folder.put("s.npy", second())
    folder.put("t.npy", second(seed=1))
    a, b, c = (Layer(_Stored(folder, name), None) for name in ("s.npy", "s.npy", "t.npy"))
    if mean:
        a, b, c = joined([dict(zip("abc", (a, b, c), strict=True))] * 2).values()
    import rac.encode.align.recipe as rcp

    counted = []
    monkeypatch.setattr(rcp, "triangular", lambda s, damp: counted.append(damp) or triangular(s, damp))
    scales = Scales(np.zeros(4, np.int8), np.zeros(300, np.int8))
    for layer, damp in ((a, 0.03), (b, 0.03), (c, 0.03), (a, 0.08), (b, 0.08)):
        layer = Layer(layer.moment, None, factors=factors)
        found = Aligned(0.0, scales, layer, damp)
        sent = pickle.loads(pickle.dumps(found))  # as to another process
        assert layer.key == sent.layer.key
        assert same(found.triangular(), triangular(layer.second, damp))
        assert same(sent.triangular(), found.triangular())
    assert counted == [0.03, 0.03, 0.08]
    assert Layer(second(), None).key == ""
