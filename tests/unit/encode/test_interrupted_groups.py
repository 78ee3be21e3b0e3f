"""Ctrl-C in the middle of `pack_grouped`: nothing is left, since nobody can go on with it."""

from __future__ import annotations

import numpy as np
import pytest

from rac.encode.sources import from_arrays
from rac.methods.gptq import rtn
from rac.methods.grouped import pack_grouped


@pytest.mark.parametrize("shard", [None, 1000])
def test_nothing_is_left(tmp_path, shard):
    w = {f"w{i}": np.random.default_rng(i).standard_normal((32, 64)).astype(np.float32) for i in range(3)}

    def stop(name, n):
        raise KeyboardInterrupt

    out = tmp_path / "m.rac"
    with pytest.raises(KeyboardInterrupt):
        pack_grouped(
            from_arrays(w), {n: rtn(x, 4, 16) for n, x in w.items()}, out, True, progress=stop, shard_size=shard
        )
    assert not [p.name for p in tmp_path.iterdir() if p.suffix == ".part" or p == out]
