"""Decoding ahead on a device: the order of launches on streams that are simulated, in any order that they allow."""

from __future__ import annotations

import contextlib
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from rac.runtime import Workspace, device
from rac.runtime import workspace as ws
from rac.runtime.device import Ahead
from rac.runtime.layers import Compressed
from support.layers import archive_of, linear

HOST = torch.device("cpu")


class Event:
    def __init__(self):
        self.asked = self.done = 0

    def record(self, stream):
        self.asked += 1
        number = self.asked
        stream.launched.append((lambda: True, lambda: setattr(self, "done", max(self.done, number))))


class Stream:
    """Launches in order: (whether it can start, what it does)."""

    def __init__(self):
        self.launched = []

    def wait_event(self, event):
        number = event.asked  # what was recorded up to now
        self.launched.append((lambda: event.done >= number, lambda: None))


class Device:
    """As `torch.cuda`; `run` does what was launched."""

    def __init__(self, seed):
        self.random, self.streams, self.now, self.kept = random.Random(seed), [], None, set()
        self.graph = False
        self.now = self.Stream()

    Event = Event

    def current_stream(self, device):
        return self.now

    def Stream(self, device=None):
        self.streams.append(Stream())
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def keep(self, tensor, stream):
        self.kept.add((id(tensor), id(stream)))

    def is_current_stream_capturing(self):
        return self.graph

    def launch(self, what):
        self.now.launched.append((lambda: True, what))

    def run(self, most=10**9):
        for _ in range(most):
            ready = [s for s in self.streams if s.launched and s.launched[0][0]()]
            if not ready:
                assert not any(s.launched for s in self.streams), "streams wait for each other"
                return
            self.random.choice(ready).launched.pop(0)[1]()


class Layer:
    """Its weight is its name; decoding, and the product, are two steps each."""

    def __init__(self, api, name, size=64, device=HOST):
        self.api, self.name, self.dense_bytes, self.known, self.number = api, name, size, True, 0
        self.record = torch.empty(1, device=device)
        self.asked = []

    def resident(self):
        return (0, self.number) if self.known else None

    def dense(self):
        self.asked.append("alone")
        self.known = True

    def decode_into(self, buffer):
        self.asked.append("ahead" if self.api.now is not self.api.streams[0] else "now")
        value = self.name, self.number
        self.api.launch(lambda: CONTENT.update({id(buffer): "half"}))
        self.api.launch(lambda: CONTENT.update({id(buffer): value}))
        return buffer

    def product(self, weight, wrong):
        if weight is None:
            return
        value = self.name, self.number
        for _ in range(2):
            self.api.launch(lambda: CONTENT[id(weight)] == value or wrong.append((value, CONTENT[id(weight)])))


CONTENT: dict[int, object] = {}


@pytest.mark.parametrize("seed", range(100))
def test_any_order_that_streams_allow(seed):
    CONTENT.clear()
    api = Device(seed)
    rng, wrong = random.Random(seed), []
    ours = Ahead(HOST, api, api.keep)
    layers = [Layer(api, f"w{i}") for i in range(5)]
    main, second = api.now, api.Stream()
    for step in range(120):
        i = step % 5 if rng.random() < 0.8 else rng.randrange(5)  # some guesses are wrong
        layer, then = layers[i], layers[(i + 1) % 5]
        if rng.random() < 0.1:
            layer.number += 1  # another record
        api.now = main if rng.random() < 0.9 else second  # callers with a stream of their own
        with ours.weight(layer, then if rng.random() < 0.9 else None, 64) as w:
            layer.product(w, wrong)
        if rng.random() < 0.5:  # else the host is far ahead of the device
            api.run(rng.randrange(30))
    api.run()
    assert not wrong
    right = sum(layer.asked.count("ahead") for layer in layers)
    assert right > 50 and len({id(p.buffer) for p in ours._places}) == len(CONTENT) == 2


def test_in_a_row_every_layer_but_the_first_is_decoded_ahead():
    api = Device(0)
    ours, layers = Ahead(HOST, api, api.keep), [Layer(api, f"w{i}") for i in range(6)]
    for layer, then in zip(layers, [*layers[1:], None], strict=True):
        with ours.weight(layer, then, 64):
            pass
    assert [layer.asked for layer in layers] == [["now"], *[["ahead"]] * 5]
    side = next(s for s in api.streams if s is not api.now)
    assert {(id(p.buffer), id(side)) for p in ours._places} <= api.kept  # not given to others while it is written to
    assert (id(layers[3].record), id(side)) in api.kept


def test_what_is_not_decoded_ahead():
    api = Device(0)
    ours = Ahead(HOST, api, api.keep)
    first, large, strange = Layer(api, "first"), Layer(api, "large", 65), Layer(api, "strange")
    far = Layer(api, "far", 64, torch.device("meta"))
    strange.known = False
    for then in (large, strange, far, first):
        with ours.weight(first, then, 64):
            pass
    assert not large.asked and not strange.asked and not far.asked and first.asked == ["now"]
    for layer in (large, strange):
        with ours.weight(layer, first, 64) as w:
            assert w is None
        assert layer.asked == ["alone"]
    api.graph = True  # events from outside a graph cannot be waited for inside it
    with ours.weight(first, strange, 64):
        pass
    assert first.asked == ["now", "alone"] and len(strange.asked) == 1


def test_an_error_in_the_product_leaves_the_buffers_in_order():
    CONTENT.clear()
    api, wrong = Device(1), []
    ours, layers = Ahead(HOST, api, api.keep), [Layer(api, f"w{i}") for i in range(3)]
    for step in range(30):
        layer = layers[step % 3]
        with contextlib.suppress(KeyError), ours.weight(layer, layers[(step + 1) % 3], 64) as w:
            layer.product(w, wrong)
            if step % 4 == 0:
                raise KeyError
    api.run()
    assert not wrong


def test_larger_layers_later():
    CONTENT.clear()
    api, wrong = Device(2), []
    ours, small, big = Ahead(HOST, api, api.keep), Layer(api, "small"), Layer(api, "big", 128)
    for size, layer, then in ((64, small, big), (128, big, small), (128, small, big), (128, big, small)):
        with ours.weight(layer, then, size) as w:
            assert len(w) == size
            layer.product(w, wrong)
    api.run()
    assert not wrong


def test_real_layers_through_their_workspace(tmp_path, monkeypatch):
    torch.manual_seed(1)
    weights = {f"w{i}": torch.randn(96 + 32 * i, 64) for i in range(4)}
    archive = archive_of(tmp_path, weights)
    monkeypatch.setattr(device, "_why_not", lambda name: None)
    api = Device(0)
    monkeypatch.setattr(ws, "Ahead", lambda at: Ahead(at, api, api.keep))
    monkeypatch.setattr(Compressed, "dense", lambda self: self._resident.dense(self.record.detach(), self.stored))
    workspace = Workspace()
    layers = [linear(archive, n, workspace) for n in weights]
    for turn in range(3):
        if turn == 2:  # the bytes of one are others now: what was decoded ahead of them is not taken
            with torch.no_grad():
                layers[2].weight.copy_(layers[2].weight.clone())
        for layer, w in zip(layers, weights.values(), strict=True):
            with workspace.on_device(layer) as found:
                assert torch.equal(found, w)
    places = workspace._ahead[HOST]._places
    assert [len(p.buffer) for p in places] == [weights["w3"].nbytes] * 2
    assert {id(p.layer()) for p in places} == {id(layers[3]), id(layers[0])}
    workspace.close()
    assert not workspace._ahead
