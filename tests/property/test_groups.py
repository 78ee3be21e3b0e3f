"""Matrices on grids come out of an archive as they went in, by every way of reading, in both programs."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rac
from rac.container.access import BytesAccess
from rac.encode.sources import Source, SourceTensor
from rac.methods.grouped import pack_grouped
from rac.stages import groups as gr
from rac.stages.words import from_words, to_words
from support import grids, kernels, readers, tiles
from support.indices import indices

SETTINGS = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def matrices(draw):
    """A matrix: of numbers, or of anything."""
    rows, cols, bits = draw(st.integers(1, 40)), draw(st.integers(1, 160)), draw(st.integers(1, 8))
    group = draw(st.one_of(st.just(cols), st.integers(1, cols)))
    seed = draw(st.integers(0, 1 << 32))
    if draw(st.booleans()):
        return grids.nearest(grids.normal(seed, rows, cols), bits, group, draw(st.booleans()))
    return grids.random(np.random.default_rng(seed), rows, cols, bits, group, draw(st.booleans()))


@given(st.data())
@SETTINGS
def test_round_trip(data):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        most = data.draw(st.sampled_from([1 << 6, 1 << 10, 1 << 20]))
        tiles.cut(patch, ((1, most), (3, 2 * most), (5, 1 << 62)))
        tensors, given, dense = [], {}, {}
        for i in range(data.draw(st.integers(1, 4))):
            g, dtype = data.draw(matrices()), data.draw(st.sampled_from(["F32", "F16", "BF16"]))
            words = to_words(gr.values(g), dtype)
            original = np.random.default_rng(i).integers(0, 1 << 14, g.codes.shape).astype(words.dtype)
            name = f"{i}"
            tensors.append(SourceTensor(name, dtype, g.codes.shape, original.view(np.uint8).reshape(-1)))
            given[name], dense[name] = g, words
        path = Path(folder) / "m.rac"
        if not all(np.isfinite(from_words(w, t.dtype)).all() for t, w in zip(tensors, dense.values(), strict=True)):
            with pytest.raises(rac.SourceError, match="too large for F16"):
                pack_grouped(Source("memory", tuple(tensors), (), {}), given, path, True)
            return
        done = pack_grouped(Source("memory", tuple(tensors), (), {}), given, path, data.draw(st.booleans()))
        assert done.quantised == len(given)
        archive = path.read_bytes()
        for reader in sorted(readers.READERS.keys() - {"rac_verify"}):
            found = readers.READERS[reader](archive)["tensors"]
            assert {n: readers.plain(v)[2] for n, v in found.items()} == {n: w.tobytes() for n, w in dense.items()}
        for cpu in kernels.here():
            with kernels.using(cpu):
                assert {n: v.tobytes() for n, v in rac.load(archive).items()} == {
                    n: w.tobytes() for n, w in dense.items()
                }
        done = rac.verify(path)
        assert (done.tensors, done.lossy) == (len(dense), len(dense))
        name = data.draw(st.sampled_from(sorted(dense)))
        with rac.RacFile(BytesAccess(archive)) as f:
            key = data.draw(indices(dense[name].shape))
            part = f.get_slice(name)[key]
            whole = dict(rac.iter_tensors(io.BytesIO(archive)))[name]
            assert np.array_equal(part.view(f"u{part.itemsize}"), whole[key].view(f"u{part.itemsize}"))
