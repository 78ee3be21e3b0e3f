"""Stages that a device has no kernels for: decoded on the host and copied, one warning, in the order of the file."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[2]))

import grids

import rac
from rac.container.access import BytesAccess
from rac.decode import archive as ar
from rac.decode import device
from rac.decode import load as ld
from rac.decode import tensor as tn
from rac.encode.grouped import pack_grouped
from rac.encode.sources import from_arrays
from rac.errors import UnsupportedError
from rac.quantize import groups as gr

W = {f"w{i}": grids.normal(i, 64, 200) for i in range(4)}
GIVEN = {name: grids.nearest(W[name], 4, 64) for name in ("w1", "w3")}
WANTED = {name: gr.values(GIVEN[name]) if name in GIVEN else w for name, w in W.items()}


class FakeDecoder:
    """What the kernels offer, on the CPU; it does not know the stages."""

    seen: list[str] = []

    def __init__(self, device, ring):
        self.waiting = []

    def add(self, t, first, units, objects):
        assert not t.groups and not t.bits
        FakeDecoder.seen.append(t.name)
        dec, words = tn.Decoder(t, first, False, objects), tn.empty(t)
        for i, unit in enumerate(units):
            dec.tile(i, unit, words)
        self.waiting.append((words, torch.zeros(t.shape)))
        return self.waiting[-1][1]

    def flush(self):
        for words, out in self.waiting:
            out.numpy().view(np.uint32)[:] = words
        self.waiting = []


@pytest.fixture(params=[True, False], ids=["entropy", "fixed"])
def path(request, tmp_path, monkeypatch):
    pack_grouped(from_arrays(W), GIVEN, tmp_path / "m.rac", request.param)
    module = SimpleNamespace(DeviceDecoder=FakeDecoder, why_not=lambda device: None)
    monkeypatch.setitem(sys.modules, "rac.decode.cuda", module)
    monkeypatch.setattr(device, "_warned", set())
    monkeypatch.setattr(device.fw, "check_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    FakeDecoder.seen.clear()
    return tmp_path / "m.rac"


def same(found):
    return [*found] == [*WANTED] and all((t.numpy() == WANTED[n]).all() for n, t in found.items())


def test_the_host_decodes_what_no_kernel_does(path):
    with pytest.warns(UserWarning, match="tensors of groups/1 are decoded on the CPU for cuda") as told:
        assert same(rac.load_file(path, device="cuda"))
    assert len(told) == 1
    assert FakeDecoder.seen == ["w0", "w2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(dict(rac.stream(path, device="cuda")))
        with rac.open(path, device="cuda") as f:
            assert (f.get_tensor("w3").numpy() == WANTED["w3"]).all()


def test_damage_is_that_of_one_tensor(path):
    data = bytearray(path.read_bytes())
    with rac.RacFile(BytesAccess(bytes(data))) as f:
        a = f.archives[0]
        t = ld.parse(a, a.record(next(e for e in a.index.entries if e.name == "w1")))
    data[t.record.payload + t.units[-1].offset] ^= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(rac.DamagedError) as e:
            list(rac.stream(BytesAccess(bytes(data)), device="cuda", on_error="report"))
        assert list(e.value.damaged) == ["w1"]
        with pytest.raises(rac.ChecksumError, match="'w1'"):
            list(rac.stream(BytesAccess(bytes(data)), device="cuda"))


def packed(path, name):
    from rac.decode import op

    a = ar.RacFile(path).archives[0]
    t = ld.parse(a, a.record(next(e for e in a.index.entries if e.name == name)))
    units = [bytes(u) for u in ld.read_units(a, t, [(0, len(t.units))])[0]]
    return op.Packed(t, units[: t.first], units[t.first :])


@pytest.mark.parametrize("entropy", [True, False])
def test_operator(tmp_path, entropy):
    """On the CPU it decodes; on a device it says what it lacks."""
    pytest.importorskip("triton")
    pack_grouped(from_arrays(W), GIVEN, tmp_path / "m.rac", entropy)
    p = packed(tmp_path / "m.rac", "w1")
    assert (torch.ops.rac.decode(p.data, p.handle).numpy() == WANTED["w1"]).all()
    p.data = p.data.to("meta")
    from rac.decode import cuda

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "why_not", lambda device: None)
        with pytest.raises(UnsupportedError, match="no kernel decodes groups/1 on meta"):
            p.on(p.data)
