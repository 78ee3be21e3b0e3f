"""The GPU decoder on a device, where there is one: bit for bit, streams, several devices, graphs, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rac.container.access import BytesAccess
from rac.decode import archive as ar
from rac.decode import random as ld
from rac.gpu import decoder as cuda
from rac.registry import RECORD_ATTACHMENT, RECORD_TENSOR

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GOLDEN = Path(__file__).parents[2] / "format_spec" / "golden" / "good"
DEVICES = [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def records(path):
    """(archive, entry) of all tensors and objects that have elements."""
    a = ar.RacFile(BytesAccess(path.read_bytes(), path.name), threads=1).archives[0]
    return [(a, e) for e in a.index.entries if e.type != RECORD_ATTACHMENT and e.dtype and 0 not in e.shape]


def onto(a, e, decoder):
    """The tensor of an entry, given to the device."""
    t = ld.parse(a, a.record(e))
    (units,) = ld.read_units(a, t, [(0, len(t.units))])
    return decoder.add(t, [u.data for u in units[: t.first]], units[t.first :], ld.objects(a, t))


def dense(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.rac")), ids=lambda p: p.stem)
def test_golden_files(path, device):
    assert cuda.why_not(device) is None
    decoder = cuda.DeviceDecoder(device)
    found = [(a, e, onto(a, e, decoder)) for a, e in records(path)]
    decoder.flush()
    for a, e, tensor in found:
        assert str(tensor.device) == device
        assert dense(tensor) == next(ld.load(a, [e], 1))[1].tobytes(), e.name


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Large enough for several batches in a small ring."""
    import rac

    rng = np.random.default_rng(1)
    arrays = {f"w{i}": (rng.standard_normal((1024, 1024)) * 0.02).astype("f4") for i in range(6)}
    path = tmp_path_factory.mktemp("gpu") / "m.rac"
    rac.save_file(arrays, path)
    return path, arrays


@pytest.mark.parametrize("ring", [1, 8 << 20, cuda.RING])
def test_any_ring_and_stream(model, ring):
    path, arrays = model
    stream = torch.cuda.Stream()
    with ar.RacFile(path) as f, torch.cuda.stream(stream):
        decoder = cuda.DeviceDecoder("cuda", ring)
        a = f.archives[0]
        got = {e.name: onto(a, e, decoder) for e in a.index.entries if e.type == RECORD_TENSOR}
        decoder.flush()
    for name, array in arrays.items():
        assert dense(got[name]) == array.tobytes()


def test_load_file(model):
    import rac

    path, arrays = model
    got = rac.load_file(path, device="cuda")
    assert got.keys() == arrays.keys()
    assert all(dense(got[n]) == a.tobytes() for n, a in arrays.items())


def test_no_memory_is_left(model):
    import rac

    path, arrays = model
    rac.load_file(path, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    got = rac.load_file(path, device="cuda")
    assert torch.cuda.memory_allocated() - before <= sum(a.nbytes for a in arrays.values()) + (1 << 20)
    del got


def test_operator_in_a_graph(model):
    from rac.gpu import op

    path, arrays = model
    with ar.RacFile(path) as f:
        a = f.archives[0]
        t = ld.parse(a, a.record(next(e for e in a.index.entries if e.name == "w0")))
        units = [bytes(u) for u in ld.read_units(a, t, [(0, len(t.units))])[0]]
    p = op.Packed(t, units[: t.first], units[t.first :])
    packed = p.data.cuda()
    torch.ops.rac.decode(packed, p.handle)  # compiles, and lays out the tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.rac.decode(packed, p.handle)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    p.check()
    assert dense(out) == arrays["w0"].tobytes()


@pytest.fixture(scope="module")
def linears(model):
    """Two sets of compressed layers on the device, each with its workspace, and their dense weights."""
    pytest.importorskip("transformers")
    from rac.container.reader import Archive
    from rac.runtime import RacLinear, Workspace
    from rac.runtime import record as rc
    from rac.runtime.layers import Head

    path, arrays = model
    archive = Archive(BytesAccess(path.read_bytes()))
    found = []
    for _ in range(2):
        workspace, layers = Workspace(), {}
        for e in archive.index.entries:
            data = rc.collect(archive, e)
            layer = RacLinear(Head(len(data), e.dtype, e.shape), workspace, dtype=torch.float32)
            layer.weight.data.copy_(torch.from_numpy(data))
            layers[e.name] = layer.cuda()
        found.append((workspace, layers))
    return found, {n: torch.from_numpy(a).cuda() for n, a in arrays.items()}


def test_the_next_layer_is_decoded_beside_the_running_one(linears):
    ((workspace, layers), _), weights = linears
    x = torch.randn(4, 1024, device="cuda")
    with torch.no_grad():
        for _ in range(2):  # tables are laid out, then layers are decoded ahead
            for name, layer in layers.items():
                assert torch.equal(layer(x), torch.nn.functional.linear(x, weights[name]))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = []
        torch.cuda.set_sync_debug_mode("error")  # the host waits for nothing
        try:
            for _ in range(20):
                out += [(name, layer(x)) for name, layer in layers.items()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    for name, y in out:
        assert torch.equal(y, torch.nn.functional.linear(x, weights[name]))
    kept = sum(y.nbytes for _, y in out)
    assert torch.cuda.max_memory_allocated() - before < kept + 2 * 1024 * 1024 * 4  # no weight for every launch
    places = next(iter(workspace._ahead.values()))._places
    assert len(places) == 2 and all(p.layer() in layers.values() for p in places)


def test_layers_on_several_streams(linears):
    (_, (_, layers)), weights = linears
    x = torch.randn(4, 1024, device="cuda")
    torch.cuda.synchronize()
    streams, out = [torch.cuda.Stream() for _ in range(3)], []
    with torch.no_grad():
        for turn in range(30):
            with torch.cuda.stream(streams[turn % 3]):
                out += [(name, layer(x)) for name, layer in layers.items()]
    torch.cuda.synchronize()
    for name, y in out:
        assert torch.equal(y, torch.nn.functional.linear(x, weights[name]))
