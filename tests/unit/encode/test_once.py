"""What the search for a scale has made is what is written: nothing is planned, quantised or coded a second time."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rac.calibrate.layers import Layer
from rac.encode import ties
from rac.encode.align.choose import choose
from rac.encode.align.recipe import calibrated
from rac.encode.encoded import SPOOL, Encoded, Kept, decoded
from rac.encode.options import Budget, Hooks, Lossy, PackOptions
from rac.encode.pack import ByTrellis, Packer, pack_source
from rac.encode.quantise.tensor import encode_with_words
from rac.encode.sources import Extent, from_arrays, open_source
from rac.errors import OutputError

st = pytest.importorskip("safetensors.numpy")
READ: Counter[tuple[str, int]] = Counter()
"""Bytes that were read, by the place of a tensor in its file."""


class Counting(Extent):
    """A range of a file that counts what is read of it."""

    __slots__ = ()

    def read(self, start, stop):
        READ[self.path, self.offset] += stop - start
        return super().read(start, stop)


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((200, 128)).astype(np.float32),
        "b.weight": (0.02 * rng.standard_normal((128, 260))).astype(np.float32),
        "embed.weight": rng.standard_normal((3000, 64)).astype(np.float32),  # several rows of tiles
        "norm.weight": np.ones(128, np.float32),
        "steps": np.arange(70000),
    }
    (tmp_path / "in").mkdir()
    st.save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}" * 999)
    found = open_source(tmp_path / "in")

    def counted(x):
        return replace(x, data=Counting(x.data.path, x.data.offset, x.data.size))

    READ.clear()
    return replace(
        found, tensors=tuple(map(counted, found.tensors)), attachments=tuple(map(counted, found.attachments))
    )


@pytest.mark.parametrize(
    ("asked", "processes"),
    [({"size": 668_000}, False), ({"file_bits": 16.6}, False), ({"bits": 3.0}, True), ({"snr": 14.0}, False)],
)
def test_nothing_is_done_twice(source, tmp_path, asked, processes):
    passes = set()
    hooks = Hooks(note=lambda what, *_: passes.add(what))
    options = PackOptions(jobs=2, processes=processes)
    with Packer(source, tmp_path / "m.rac", options, hooks) as packer:
        recipe = packer.allocate(tmp_path / "in", Lossy(Budget(**asked), effort="fast"))
        before = Counter(READ)
        done = packer.write(ByTrellis(recipe, packer.kept))
    assert len(passes) > 1 and {f.name for f in done.fidelity} == recipe.aligned.keys()
    again = {t.name: READ[t.data.path, t.data.offset] > before[t.data.path, t.data.offset] for t in source.tensors}
    whole_file = bool(asked.keys() & {"size", "file_bits"})
    for t in source.tensors if not processes else ():  # others count in their own memory
        if t.name in recipe.aligned:  # the error of what was kept is measured against the source, if it was not before
            at = t.data.path, t.data.offset
            assert READ[at] - before[at] == ("snr" not in asked) * t.nbytes
    assert all(again[name] != whole_file for name in again if name not in recipe.aligned)
    assert all((READ[a.data.path, a.data.offset] == a.data.size) for a in source.attachments)
    total = Counter(READ)
    pack_source(source, tmp_path / "n.rac", recipe=recipe)
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "n.rac").read_bytes()
    for t in source.tensors:  # a search reads what stays lossless no more often than a pack that has no search
        if t.name not in recipe.aligned:
            at = t.data.path, t.data.offset
            assert total[at] <= READ[at] - total[at] + t.nbytes * (not whole_file)


def test_no_file_is_left(source, tmp_path):
    """Neither by an error nor by Ctrl-C, which may come at any time: what is kept has no name."""

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Packer(source, tmp_path / "m.rac", PackOptions(), Hooks(note=stop)) as p:
        p.allocate(tmp_path / "in", Lossy(Budget(size=668_000)))
    assert os.listdir(tmp_path) == ["in"]


def test_kept(tmp_path):
    """Units come back as they were, out of memory or out of a file; each once."""
    kept = Kept(str(tmp_path / "m.rac"))
    assert kept.take("a") is None
    unit = np.random.default_rng(0).bytes(SPOOL // 2 + 1)
    o = Encoded({"name": "o"}, [b"x", b""], {"method": "raw/1"})
    for name in "abc":
        kept.put(name, Encoded({"name": name}, [name.encode(), memoryview(unit)], {}, (o,)))
    assert os.listdir(tmp_path) == []
    for name in "cab":
        found = kept.take(name)
        assert found == Encoded({"name": name}, [name.encode(), unit], {}, (o,))
        assert kept.take(name) is None
    kept.put("a", o)
    kept.clear()
    kept.put("b", o)
    assert kept.take("a") is None and kept.take("b") == o
    kept.close()


@pytest.mark.parametrize(("rank", "align"), [(0, "auto"), (4, "auto"), (0, "pca")])
def test_decoded(rank, align):
    """What stands in the units is what the quantiser says that a decoder has."""
    w = np.random.default_rng(0).standard_normal((160, 128)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((400, 128)).astype(np.float32)
    groups = ties.find(from_arrays({"w": w}).tensors)
    recipe = choose(calibrated(groups, {"w": Layer(x.T @ x / 400, None)}, (), "fast"), groups, rank, align, 3.0)
    encoded, words = encode_with_words(groups[0], recipe)
    assert encoded.head.get("uses", []) == {0: [], 4: ["w.A", "w.B"]}[rank] if align == "auto" else ["w.U"]
    assert decoded(encoded).tobytes() == words.tobytes()


def test_nowhere_to_keep_it(tmp_path):
    kept = Kept(str(tmp_path / "none" / "m.rac"))
    with pytest.raises(OutputError):
        kept.put("a", Encoded({"name": "a"}, [bytes(SPOOL + 1)], {}))
    kept.close()
