"""Reading forward: sources, memory, threads, damage."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

import rac
from rac.container.access import BytesAccess
from rac.container.reader import Archive
from rac.cpu.work import Place, Work
from rac.decode import engine
from rac.decode import gpu as device
from rac.decoder import Decoder
from rac.encode.pack import pack_source
from rac.encode.sources import Attachment, Source, from_arrays
from rac.tensor import empty

rng = np.random.default_rng(3)
TENSORS = {f"layer {i}": (rng.standard_normal((200 + 90 * i, 700)) * 0.02).astype(np.float32) for i in range(12)}
TENSORS |= {f"norm {i}": np.ones(64, np.float32) * i for i in range(40)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "m.rac"
    attachment = (Attachment("config.json", bytes(range(200))),)
    pack_source(Source("hf", from_arrays(TENSORS).tensors, attachment, {}), path)
    return path.read_bytes()


def equal(got):
    return list(got) == list(TENSORS) and all((got[n] == t).all() for n, t in TENSORS.items())


def ours():
    return [t for t in threading.enumerate() if t.name.startswith(("rac-read", "rac-decode"))]


@pytest.fixture(autouse=True)
def _no_thread_stays():
    """Every test of this file: what was started is ended."""
    assert ours() == []
    yield
    gc.collect()
    assert ours() == []


class Trickle:
    """Has `read` and nothing else; gives a few bytes at a time."""

    def __init__(self, data):
        self._file, self._next = io.BytesIO(data), 1

    def read(self, size):
        self._next = self._next * 7 % 65537
        return self._file.read(min(size, self._next))


def fed(write, data):
    """A thread that writes everything."""
    thread = threading.Thread(target=write, args=(data,), daemon=True)
    thread.start()
    return thread


def test_every_kind_of_source(data, tmp_path):
    path = tmp_path / "m.rac"
    path.write_bytes(data)
    for source in (data, bytearray(data), io.BytesIO(data), BytesAccess(data), Trickle(data), path, str(path)):
        assert equal(dict(rac.stream(source)))
    with open(path, "rb") as f:
        assert equal(dict(rac.stream(f)))
        assert not f.closed
    with open(path, "rb", buffering=0) as f:
        assert equal(dict(rac.stream(f)))

    read, write = os.pipe()
    with open(read, "rb") as f, open(write, "wb") as g:
        fed(lambda d: (g.write(d), g.close()), data)
        assert equal(dict(rac.stream(f)))

    one, two = socket.socketpair()
    with one, two:
        fed(lambda d: (two.sendall(d), two.shutdown(socket.SHUT_WR)), data)
        assert equal(dict(rac.stream(one)))

    os.mkfifo(tmp_path / "fifo")
    fed((tmp_path / "fifo").write_bytes, data)
    assert equal(dict(rac.stream(tmp_path / "fifo")))


def test_random_access_of_bytes_and_file_objects(data):
    assert equal(rac.load_file(data))
    assert equal(rac.load_file(io.BytesIO(data)))
    with tempfile.TemporaryFile() as f:
        f.write(data)
        assert equal(rac.load_file(f))
        with rac.open(f) as g:
            assert (g.get_slice("layer 2")[3:9] == TENSORS["layer 2"][3:9]).all()
    with pytest.raises(rac.SourceError, match=r"cannot seek; read it with rac\.stream"):
        rac.open(Trickle(data))
    with pytest.raises(rac.SourceError, match="neither read nor recv"):
        list(rac.stream(object()))


@pytest.mark.parametrize("ring", [1 << 16, 1 << 20, 1 << 28])
@pytest.mark.parametrize("threads", [1, 3])
def test_rings_of_all_sizes(data, ring, threads):
    assert equal(dict(rac.stream(Trickle(data), ring=ring, threads=threads)))
    with rac.open(data, ring=ring, threads=threads) as f:
        assert equal(f.load())
    with pytest.raises(ValueError, match="at least 65536"):
        rac.stream(data, ring=1 << 15)


def test_jobs_of_all_sizes(data, monkeypatch):
    for size in (0, 1 << 12):
        monkeypatch.setattr(engine, "GROUP", size)
        assert equal(dict(rac.stream(Trickle(data), ring=1 << 18)))


def test_what_was_read_of_a_buffered_reader_before_is_not_lost(data):
    """The rest of its buffer is taken before anything waits for the pipe, which stays open and silent."""
    read, write = os.pipe()
    with open(read, "rb") as f:
        os.write(write, b"HELLO" + data[:3000])
        assert f.read(5) == b"HELLO"
        s = rac.stream(f)
        fed(lambda d: (os.write(write, d[3000:60000]), time.sleep(0.2), os.close(write)), data)
        with pytest.raises(rac.TruncatedError):
            list(s)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("more", [0, 100, 300_000])
def test_tensors_come_while_the_stream_is_still_open(gpu, data, more, device):
    """A pipe that waits for an answer before it goes on must not wait for ever, in the middle of a record neither."""
    end = next(e.at + e.size for e in Archive(BytesAccess(data)).index.entries if e.type == 1) + more
    read, write = os.pipe()
    late = threading.Timer(20, os.close, (write,))  # a stream that is cut then, and not a test that hangs
    late.start()
    with open(read, "rb", buffering=0) as f:
        s = rac.stream(f, device=device)
        done = fed(lambda d: os.write(write, d[:end]), data)
        assert next(s)[0] == "layer 0"
        late.cancel()
        done.join()

        def go_on(d):
            with contextlib.suppress(BrokenPipeError):  # nobody need read it
                os.write(write, d[end:])
            os.close(write)

        rest = fed(go_on, data)
        s.close()
    rest.join(5)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_pipe_is_widened_where_the_system_allows(data, monkeypatch, allowed):
    fcntl = pytest.importorskip("fcntl")
    real, size = fcntl.fcntl, getattr(fcntl, "F_SETPIPE_SZ", 0)
    if not size:
        pytest.skip("Linux only")

    def control(file, command, *more):
        if command == size and not allowed:
            raise PermissionError("no larger pipe")
        return real(file, command, *more)

    monkeypatch.setattr(fcntl, "fcntl", control)
    read, write = os.pipe()
    before = real(read, fcntl.F_GETPIPE_SZ)
    with open(read, "rb") as f, open(write, "wb") as g:
        fed(lambda d: (g.write(d), g.close()), data)
        assert equal(dict(rac.stream(f)))
        assert real(read, fcntl.F_GETPIPE_SZ) == (1 << 20 if allowed else before)


@pytest.fixture
def swept():
    """Garbage is that of this test: what others have left takes a busy machine seconds to look through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("when", ["early close", "with", "garbage"])
def test_threads_end_with_the_stream(data, when, swept):
    read, write = os.pipe()  # stays open, so that a read would wait for ever
    with open(read, "rb") as f:
        feeder = fed(lambda d: os.write(write, d[: len(d) // 2]), data)
        s = rac.stream(f, ring=1 << 16)
        next(s)
        assert any(t.name == "rac-read" for t in ours())
        start = time.monotonic()
        if when == "early close":
            s.close()
            with pytest.raises(StopIteration):
                next(s)
        elif when == "with":
            with s:
                pass
        else:
            del s
            gc.collect()
        assert ours() == []
        assert time.monotonic() - start < 2
    feeder.join(5)
    os.close(write)


def test_threads_end_with_an_error(data):
    bad = bytearray(data)
    bad[len(bad) // 2] ^= 1
    with pytest.raises(rac.FormatError):
        list(rac.stream(Trickle(bytes(bad)), threads=3))
    assert ours() == []
    with pytest.raises(rac.FormatError):
        rac.load(bytes(bad))
    assert ours() == []

    class Fails(Trickle):
        def read(self, size):
            if self._file.tell() > 1 << 20:
                raise OSError(5, "the cable is out")
            return super().read(size)

    s = rac.stream(Fails(data))
    with pytest.raises(rac.SourceError, match="the cable is out"):
        list(s)
    assert ours() == []


SCRIPT = """
import os, signal, sys, threading, time
import rac
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run in the background
read, write = os.pipe()
data = open(sys.argv[1], "rb").read()
threading.Thread(target=lambda: os.write(write, data[: len(data) // 2]), daemon=True).start()
later = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    with rac.stream(open(read, "rb", buffering=0)) as s:
        for name, t in s:
            if later.ident is None:  # not before all is imported: importing may swallow it
                later.start()
except KeyboardInterrupt:
    time.sleep(0.1)
    left = [t.name for t in threading.enumerate() if t.name.startswith("rac-")]
    print("interrupted, threads left:", left)
"""


def test_ctrl_c(data, tmp_path):
    (tmp_path / "m.rac").write_bytes(data)
    run = [sys.executable, "-c", SCRIPT, str(tmp_path / "m.rac")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "interrupted, threads left: []\n", done.stderr
    assert done.returncode == 0


def test_ctrl_c_of_a_loop_that_nobody_catches(data, tmp_path):
    """The process ends, though a thread waits for the pipe."""
    (tmp_path / "m.rac").write_bytes(data)
    script = SCRIPT.replace(
        'with rac.stream(open(read, "rb", buffering=0)) as s:', "s = rac.stream(os.fdopen(read, 'rb'))\n    if s:"
    )
    script = script.replace("except KeyboardInterrupt:", "except ZeroDivisionError:")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.rac")], timeout=60, capture_output=True, check=False
    )
    assert done.returncode in (-signal.SIGINT, 130)


def damaged(data, names):
    """One bit of a tile of each of these tensors flipped."""
    out = bytearray(data)
    archive = Archive(BytesAccess(data))
    for e in archive.index.entries:
        if e.name in names:
            out[archive.record(e).payload + e.payload_size // 2] ^= 4
    return bytes(out)


@pytest.fixture
def on_disk(tmp_path):
    """Writes bytes to a file; its path."""

    def write(data):
        (tmp_path / "on-disk.rac").write_bytes(data)
        return tmp_path / "on-disk.rac"

    return write


def test_a_local_file_is_read_where_it_is_decoded(data, on_disk, monkeypatch):
    """No thread reads ahead of those that decode; what a pipe brings goes through a ring."""
    made = []
    monkeypatch.setattr("rac.container.feed._Ring._start", lambda ring, threads: made.append(ring))
    assert equal(dict(rac.stream(on_disk(data), threads=1)))
    assert not made


@pytest.mark.parametrize("cut", [-100, -5000, 100_000, 40])
def test_a_local_file_that_ends_early(data, on_disk, cut):
    with pytest.raises(rac.TruncatedError, match=r"ends (early|inside)"):
        list(rac.stream(on_disk(data[:cut])))
    with pytest.raises(rac.FormatError):
        list(rac.stream(on_disk(data + bytes(64))))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", [Trickle, bytes, "on_disk"])
def test_damage_is_named_and_never_handed_out(data, kind, threads, on_disk):
    kind = on_disk if kind == "on_disk" else kind
    bad = damaged(data, {"layer 3", "layer 7"})
    got = []
    with pytest.raises(rac.ChecksumError, match="'layer 3' unit") as e:
        for name, _ in rac.stream(kind(bad), threads=threads):
            got.append(name)
    assert got == list(TENSORS)[:3]
    assert not isinstance(e.value, rac.DamagedError)

    found = {}
    with pytest.raises(rac.DamagedError) as e:
        for name, t in rac.stream(kind(bad), on_error="report", threads=threads):
            found[name] = t
    assert list(e.value.damaged) == ["layer 3", "layer 7"]
    assert all(isinstance(v, rac.ChecksumError) for v in e.value.damaged.values())
    assert found.keys() == TENSORS.keys() - {"layer 3", "layer 7"}
    assert all((found[n] == TENSORS[n]).all() for n in found)
    assert "'layer 3' (checksum does not match), 'layer 7'" in str(e.value)

    with pytest.raises(rac.ChecksumError, match="'layer 3' unit"):
        rac.load(bad)
    with pytest.raises(rac.DamagedError) as e:
        rac.load_file(bad, on_error="report", threads=threads)
    assert list(e.value.damaged) == ["layer 3", "layer 7"]
    assert equal(dict(rac.stream(data, on_error="report")))
    with pytest.raises(ValueError, match="'ignore'"):
        rac.stream(data, on_error="ignore")


def test_damage_of_an_attachment_and_an_end_that_comes_too_early(data):
    bad = damaged(data, {"config.json", "layer 5"})
    with pytest.raises(rac.DamagedError) as e:
        list(rac.stream(bad, on_error="report"))
    assert e.value.damaged.keys() == {"config.json", "layer 5"}
    with pytest.raises(rac.ChecksumError):
        list(rac.stream(damaged(data, {"config.json"})))
    with pytest.raises(rac.DamagedError, match="and then: the stream ends early") as e:
        list(rac.stream(bad[:-100], on_error="report"))
    assert isinstance(e.value.__cause__, rac.TruncatedError)
    with pytest.raises(rac.TruncatedError):
        list(rac.stream(data[:-100], on_error="report"))


class FakeDecoder:
    """What the kernels offer, on the CPU: units are used as they come, tensors are there only after `flush`."""

    made = []

    def __init__(self, device, ring):
        self.device, self.ring, self.waiting, self.flushes, self.most = device, ring, [], 0, 0
        FakeDecoder.made.append(self)

    def add(self, t, first, units, objects):
        import torch

        dec, words, work = Decoder(t, first, objects), empty(t), Work()
        for i, unit in enumerate(units):
            work.add(dec, range(i, i + 1), unit.copy(), Place(words))
        work.run()
        out = torch.zeros(t.shape, dtype=torch.float32)
        self.waiting.append((words, out))
        self.most = max(self.most, sum(w.nbytes for w, _ in self.waiting))
        return out

    def flush(self):
        self.flushes += 1
        for words, out in self.waiting:
            out.view(-1).numpy().view(np.uint32)[:] = words.reshape(-1)
        self.waiting = []


@pytest.fixture
def gpu(monkeypatch):
    pytest.importorskip("torch")
    module = SimpleNamespace(DeviceDecoder=FakeDecoder, why_not=lambda device: None)
    monkeypatch.setitem(sys.modules, "rac.gpu.decoder", module)
    FakeDecoder.made.clear()
    return module


@pytest.mark.parametrize("ring", [1 << 16, 1 << 22, 1 << 28])
def test_the_host_side_of_a_device(gpu, data, ring):
    s = rac.stream(Trickle(data), device="cuda:1", ring=ring)
    assert s.decoder == "Triton on cuda:1"
    assert equal({n: t.numpy() for n, t in s})
    (decoder,) = FakeDecoder.made
    assert (decoder.device, decoder.ring) == ("cuda:1", ring // 2)
    with rac.open(data, device="cuda:1", ring=ring) as f:
        assert f.decoder == "Triton on cuda:1"
        assert equal({n: t.numpy() for n, t in f.load().items()})
        assert (f.get_tensor("layer 4").numpy() == TENSORS["layer 4"]).all()
    largest = max(t.nbytes for t in TENSORS.values())
    assert all(d.flushes and d.most <= ring // 2 + largest for d in FakeDecoder.made)
    assert FakeDecoder.made[1].flushes > 3 or ring > 1 << 22
    assert FakeDecoder.made[1].flushes == 1 or ring < 1 << 28  # the device is not waited for without need


def test_damage_on_the_way_to_a_device(gpu, data):
    bad = damaged(data, {"layer 3", "layer 7"})
    with pytest.raises(rac.ChecksumError, match="'layer 3' unit"):
        dict(rac.stream(bad, device="cuda"))
    found = []
    with pytest.raises(rac.DamagedError) as e:
        found.extend(n for n, _ in rac.stream(bad, device="cuda", on_error="report"))
    assert list(e.value.damaged) == ["layer 3", "layer 7"]


def test_a_device_without_memory(gpu, data):
    import torch

    class Full(FakeDecoder):
        def add(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.DeviceDecoder = Full
    with pytest.raises(rac.LimitError, match=r"cuda is out of memory: \d+ bytes are needed"):
        rac.load_file(data, device="cuda")


def test_kernels_that_cannot_be_used_are_named_once(gpu, data, monkeypatch):
    import torch

    monkeypatch.setattr(device, "_warned", set())
    monkeypatch.setattr(device.frameworks, "check_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, where: self)
    gpu.why_not = lambda device: "its compute capability is 6.1, the kernels need 8.0"
    with pytest.warns(UserWarning, match=r"decoding for cuda runs on the CPU: its compute capability is 6\.1"):
        f = rac.open(data, device="cuda")
    assert f.decoder.startswith("CPU (")
    assert f.decoder.endswith("copied to cuda")
    f.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal({n: t.numpy() for n, t in rac.load_file(data, device="cuda").items()})


def test_a_device_that_is_not_there(data):
    import torch

    for name in ("nothing", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f"device '{name}': "):
            rac.open(data, device=name)
        with pytest.raises(ValueError, match=f"device '{name}': "):
            rac.stream(data, device=name)


def test_the_decoder_says_its_name(data):
    with rac.open(data, threads=2) as f:
        assert f.decoder.startswith("CPU (")
        assert f.decoder.endswith(", 2 threads)")
    assert rac.stream(data, threads=1).decoder.endswith(", 1 thread)")
