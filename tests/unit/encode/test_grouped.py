"""Packing matrices that are on a grid: coders, provenance, ties, shards, online transforms, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import rac
from rac.cli.info import report
from rac.encode.sources import Source, from_arrays, open_source
from rac.methods.grouped import pack_grouped
from rac.records import Online
from rac.stages import groups as gr
from rac.stages.words import to_words
from support import grids

W = {f"layer.{i}.weight": grids.normal(i, 96 + 32 * i, 200) for i in range(3)}
BIAS = grids.normal(9, 1, 96)[0]
GIVEN = {name: grids.nearest(w, 4, 64) for name, w in W.items()}
SETTINGS = {"recipe": "rtn", "bits": 4, "group": 64}


def source(**more):
    return from_arrays(W | {"bias": BIAS} | more, {"format": "np"})


@pytest.mark.parametrize("entropy", [True, False])
def test_pack(tmp_path, entropy):
    seen, layers = [], []
    done = pack_grouped(
        source(),
        GIVEN,
        tmp_path / "m.rac",
        entropy,
        SETTINGS,
        progress=lambda n, _: seen.append(n),
        layer=layers.append,
    )
    assert seen == [*W, "bias"] and [f.name for f in layers] == [*W] and done.fidelity == tuple(layers)
    found = rac.load_file(tmp_path / "m.rac")
    assert (found["bias"] == BIAS).all()
    for name, w in W.items():
        assert (found[name] == gr.values(GIVEN[name])).all()
        snr = 10 * np.log10((w**2).sum() / ((found[name] - w) ** 2).sum())
        assert layers[[*W].index(name)].snr == pytest.approx(snr, abs=1e-3) and snr > 19
    told = report(str(tmp_path / "m.rac"))
    assert told["provenance"] | SETTINGS | {"lossless": False, "entropy": entropy} == told["provenance"]
    assert (told["quantised"], told["quantised_bits"]) == (3, done.quantised_bits)
    lossy = [t for t in told["tensors"] if "quantised" in t]
    assert 8 * sum(t["bytes"] for t in lossy) / sum(w.size for w in W.values()) == done.quantised_bits
    for t in lossy:
        q = t["quantised"]
        assert sum(q["streams"].values()) == t["bytes"]
        assert (q["bits"], q["group"], q["zero"], q["coder"]) == (4, 64, None, "lanes/1" if entropy else "bits/1")
    assert 4.1 < done.quantised_bits < 4.25 if entropy else 4.35 < done.quantised_bits < 4.45


def test_the_smaller_coder_is_taken(tmp_path):
    """Codes that are all alike, and codes that no coder makes smaller."""
    rng = np.random.default_rng(1)
    flat = replace(GIVEN["layer.0.weight"], codes=rng.integers(0, 16, (96, 200)).astype(np.uint8))
    same = replace(flat, codes=np.full((96, 200), 3, np.uint8))
    pack_grouped(source(), {"layer.0.weight": flat}, tmp_path / "m.rac", True)
    pack_grouped(source(), {"layer.0.weight": same}, tmp_path / "n.rac", True)
    coders = [
        next(t["quantised"]["coder"] for t in report(str(tmp_path / f"{n}.rac"))["tensors"] if "quantised" in t)
        for n in "mn"
    ]
    assert coders[0] == "bits/1" and coders[1] != "bits/1"


def test_the_bytes_do_not_depend_on_threads(tmp_path):
    for jobs in (1, 4):
        pack_grouped(source(), GIVEN, tmp_path / f"{jobs}.rac", True, SETTINGS, jobs=jobs)
    assert (tmp_path / "1.rac").read_bytes() == (tmp_path / "4.rac").read_bytes()


def test_one_byte_types_stay_lossless(tmp_path):
    pack_grouped(source(ids=np.arange(4000, dtype=np.uint8)), GIVEN, tmp_path / "m.rac", False)
    assert (rac.load_file(tmp_path / "m.rac")["ids"] == np.arange(4000).astype(np.uint8)).all()
    assert rac.verify(tmp_path / "m.rac", against=source_of(tmp_path)).lossy == 3


def source_of(folder):
    """The same tensors as a file."""
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(
        W | {"bias": BIAS, "ids": np.arange(4000, dtype=np.uint8)}, folder / "m.safetensors", {"format": "np"}
    )
    return folder / "m.safetensors"


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_precision(tmp_path, dtype):
    words = to_words(W["layer.0.weight"], dtype)
    t = replace(source().tensors[0], dtype=dtype, data=words.reshape(-1).view(np.uint8))
    g = replace(GIVEN["layer.0.weight"], scales=GIVEN["layer.0.weight"].scales * np.float32(2.0**-9))
    pack_grouped(Source("memory", (t,), (), {}), {t.name: g}, tmp_path / "m.rac", False)
    with rac.open(tmp_path / "m.rac") as f:
        found = f.get_slice(t.name)[3:90, 60:131]
    expected = to_words(gr.values(g), dtype)[3:90, 60:131]
    assert np.array_equal(np.asarray(found).view("<u2"), expected)


def test_names_of_one_content(tmp_path):
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(W["layer.0.weight"].copy())
    tied = from_arrays({"embed": w, "head": w, "copy": w.clone()})
    pack_grouped(tied, {"head": GIVEN["layer.0.weight"]}, tmp_path / "m.rac", True)
    found = rac.load_file(tmp_path / "m.rac")
    assert found["head"] is found["embed"] and found["copy"] is not found["embed"]
    assert all((v == gr.values(GIVEN["layer.0.weight"])).all() for v in found.values())


def test_shards(tmp_path):
    done = pack_grouped(source(), GIVEN, tmp_path / "m.rac", True, shard_size=150_000)
    assert len(done.paths) == 3
    found = rac.load_file(done.paths[0])
    assert all((found[name] == gr.values(g)).all() for name, g in GIVEN.items())


def test_online_transforms_stay(tmp_path):
    tensors = [replace(t, online=Online("hadamard/1", 8, 1, 3)) if t.name in W else t for t in source().tensors]
    pack_grouped(replace(source(), tensors=tuple(tensors)), GIVEN, tmp_path / "m.rac", True)
    with rac.open(tmp_path / "m.rac") as f:
        assert {n: f.online(n) is not None for n in f.keys()} == {n: n in W for n in [*W, "bias"]}  # noqa: SIM118
        assert f.online("layer.1.weight").online == Online("hadamard/1", 8, 1, 3)
        assert (f.get_tensor("layer.1.weight") == gr.values(GIVEN["layer.1.weight"])).all()


def test_objects_of_transforms_stay(tmp_path):
    m = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 40)))[0].astype("f4")
    tensors = [
        replace(t, online=Online("matrix/1", 40, object="R"), matrix=m) if t.name in W else t for t in source().tensors
    ]
    pack_grouped(replace(source(), tensors=tuple(tensors)), GIVEN, tmp_path / "m.rac", False)
    with rac.open(tmp_path / "m.rac") as f:
        assert (f.online("layer.2.weight").matrix == m).all()
    assert rac.verify(tmp_path / "m.rac").lossy == 3


def test_three_dimensions(tmp_path):
    w = grids.normal(5, 6 * 32, 128).reshape(6, 32, 128)
    g = grids.nearest(w.reshape(-1, 128), 3, 128, symmetric=True)
    pack_grouped(from_arrays({"experts": w}), {"experts": g}, tmp_path / "m.rac", False)
    assert (rac.load_file(tmp_path / "m.rac")["experts"] == gr.values(g).reshape(w.shape)).all()


def test_mappings_are_asked_when_it_is_time(tmp_path):
    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return GIVEN[name]

    asked: list[str] = []
    pack_grouped(source(), Lazy(dict.fromkeys(GIVEN)), tmp_path / "m.rac", True, jobs=1)
    assert asked == [*GIVEN]


def test_what_does_not_fit(tmp_path):
    out = tmp_path / "m.rac"
    g = GIVEN["layer.0.weight"]
    for given, what in (
        ({"other": g}, "1 quantised tensors are not in the source, one is 'other'"),
        ({"layer.1.weight": g}, r"'layer.1.weight' is a matrix of \(128, 200\), its codes are of \(96, 200\)"),
        ({"ids": g}, "'ids' is U8"),
    ):
        with pytest.raises(rac.SourceError, match=what):
            pack_grouped(source(ids=np.zeros((96, 200), np.uint8)), given, out, True)
    with pytest.raises(ValueError, match="codes below"):
        pack_grouped(source(), {"layer.0.weight": replace(g, bits=3)}, out, True)
    assert not out.exists()
    out.write_bytes(b"there")
    with pytest.raises(rac.OutputError, match="exists already"):
        pack_grouped(source(), GIVEN, out, True)
    assert out.read_bytes() == b"there"


def test_interrupted(tmp_path):
    """Nothing under the final name; the next pack is not troubled by what is left."""

    def stop(name, _):
        if name == "layer.1.weight":
            raise KeyboardInterrupt

    out = tmp_path / "m.rac"
    with pytest.raises(KeyboardInterrupt):
        pack_grouped(source(), GIVEN, out, True, progress=stop)
    assert not out.exists()
    pack_grouped(source(), GIVEN, out, True)
    assert rac.verify(out).lossy == 3


def test_unpack(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(W | {"bias": BIAS}, tmp_path / "m.safetensors")
    pack_grouped(open_source(tmp_path / "m.safetensors"), GIVEN, tmp_path / "m.rac", True)
    rac.unpack(tmp_path / "m.rac", tmp_path / "back.safetensors")
    found = safetensors.load_file(tmp_path / "back.safetensors")
    assert all((found[name] == gr.values(g)).all() for name, g in GIVEN.items())
    assert (found["bias"] == BIAS).all()
