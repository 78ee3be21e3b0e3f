"""torch.ops.rac.decode on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rac.decode import archive as ar
from rac.decode import random as ld
from rac.errors import ChecksumError
from rac.gpu import op
from rac.registry import RECORD_TENSOR
from support import products

GOLDEN = Path(__file__).parents[3] / "format_spec" / "golden" / "good"


def tensors(path):
    """(Packed, words) of each tensor of a file, as `Packed` and as the CPU decodes it."""
    with ar.RacFile(path, threads=1) as f:
        a = f.archives[0]
        for e in a.index.entries:
            if e.type == RECORD_TENSOR and 0 not in e.shape:
                t = ld.parse(a, a.record(e))
                units = [bytes(u) for u in ld.read_units(a, t, [(0, len(t.units))])[0]]
                yield op.Packed(t, units[: t.first], units[t.first :], ld.objects(a, t)), next(ld.load(a, [e], 1))[1]


@pytest.mark.parametrize(
    "name", ["lanes-dtypes", "lanes-planes", "raw-dtypes", "zstd-dtypes", "trellis-fronts", "lowrank", "basis"]
)
def test_golden_files(name):
    n = 0
    for p, words in tensors(GOLDEN / f"{name}.rac"):
        got = torch.ops.rac.decode(p.data, p.handle)
        assert (got.shape, got.dtype) == (torch.Size(p.shape), p.dtype)
        assert got.reshape(-1).view(torch.uint8).numpy().tobytes() == words.tobytes()
        n += 1
    assert n > 3


@pytest.fixture
def matrix(tmp_path):
    maker = products.Maker(tmp_path / "m.rac")
    maker.object("u", products.exact(products.normal(1, 24, 24)))
    maker.tensor("w", "BF16", products.quantised(products.words(2, 16, 24), 2, 1), ["u"])
    maker.finish()
    return next(iter(tensors(tmp_path / "m.rac")))


def test_compiled(matrix):
    p, words = matrix

    def layer(x, packed):
        return x @ torch.ops.rac.decode(packed, p.handle).T

    x = torch.ones(3, 24, dtype=torch.bfloat16)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, p.data)
    assert torch.equal(got, layer(x, p.data))
    assert np.isfinite(words.view(np.uint16)).all()


def test_fake(matrix):
    p, _ = matrix
    torch.library.opcheck(op.decode, (p.data, p.handle))


def test_checksums_and_handles(matrix):
    p, _ = matrix
    handle = p.handle
    units = [bytes(p.data[a:b].numpy()) for a, b in p.at]
    with pytest.raises(ChecksumError):
        op.Packed(p.tensor, [bytes(8)] * p.tensor.first, units)
    with pytest.raises(ValueError, match="no packed tensor"):
        torch.ops.rac.decode(p.data, handle + 1_000_000)
