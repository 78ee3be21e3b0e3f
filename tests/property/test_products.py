"""Tensors of three stages come out of an archive as numpy computes them, by every way of reading, in both programs."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rac
from rac.container.access import BytesAccess
from support import kernels, products, readers, tiles
from support.indices import indices

SETTINGS = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def matrices(draw, rows, cols):
    """A matrix, quantised or not."""
    seed = draw(st.integers(0, 1 << 32))
    if draw(st.booleans()):
        return products.exact(products.normal(seed, rows, cols))
    return products.quantised(products.words(seed, rows, cols), seed, draw(st.integers(0, 3)))


@given(st.data())
@SETTINGS
def test_round_trip(data):
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        contextlib.ExitStack() as stack,
    ):
        most = data.draw(st.sampled_from([1 << 6, 1 << 10, 1 << 20]))
        tiles.cut(patch, ((1, most), (3, 2 * most), (5, 1 << 62)))
        maker = stack.enter_context(contextlib.closing(products.Maker(Path(folder) / "m.rac")))  # a draw may end it
        for i in range(data.draw(st.integers(1, 3))):
            rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 160))
            uses = [f"{i}"]
            if data.draw(st.booleans()):
                maker.object(f"{i}", data.draw(matrices(cols, cols)))
            else:
                rank = data.draw(st.integers(1, min(rows, cols)))
                uses.append(f"{i}b")
                maker.object(f"{i}b", data.draw(matrices(rank, cols)))
                maker.object(f"{i}", data.draw(matrices(rows, rank)))
            for dtype in data.draw(st.sets(st.sampled_from(["F32", "F16", "BF16"]), min_size=1)):
                seed = data.draw(st.integers(0, 1 << 32))
                states = data.draw(st.sampled_from([1, 4, 256, 1024]))
                m = products.quantised(products.words(seed, rows, cols), seed, data.draw(st.integers(0, 4)), states)
                maker.tensor(f"{i}/{dtype}", dtype, m, uses)
        maker.finish()
        path = Path(folder) / "m.rac"
        archive = path.read_bytes()
        assert rac.verify(path).tensors == len(maker.dense)
    expected = {name: words.tobytes() for name, words in maker.dense.items()}
    for got in (rac.load(archive), dict(rac.iter_tensors(io.BytesIO(archive)))):
        assert {name: t.tobytes() for name, t in got.items()} == expected
    assert {name: t[2] for name, t in readers.decoder.decode(archive).tensors.items()} == expected
    cpu = data.draw(st.sampled_from(kernels.here()))
    with rac.RacFile(BytesAccess(archive)) as f:
        for name, words in maker.dense.items():
            index = data.draw(indices(words.shape))
            assert f.get_slice(name)[index].tobytes() == words[index].tobytes()
            with kernels.using(cpu):
                assert f.get_slice(name)[index].tobytes() == words[index].tobytes()
    with kernels.using(cpu):
        assert {name: t.tobytes() for name, t in rac.load(archive).items()} == expected
