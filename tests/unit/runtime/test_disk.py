"""Models whose weights stay in the file: the same bits, bounded memory, what is read when, and one clear error."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import shutil
import threading
import time
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import arch_matrix
import rac
from rac.cli import main
from rac.container import remote
from rac.container.access import ChangedError
from rac.encode.pack import pack
from rac.errors import ChecksumError, FormatError, LimitError, MismatchError, RacError, SourceError, UnsupportedError
from rac.runtime import RacLinear, disk
from rac.runtime.held import Held, Holding
from rac.runtime.ranges import GAP, TICKET, Key
from rac.runtime.replace import residency
from support import models
from support.hub import serving
from support.servers import Server

EXPERTS = ["mixtral", "gpt_oss", "qwen3_moe"]
pytestmark = pytest.mark.filterwarnings("ignore:rac. .* reads the weight")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(dense model, archive) of plain models, by kind."""
    out = {}
    for kind in ("llama", "gpt2", "bert", "t5", "gemma"):
        root = tmp_path_factory.mktemp(kind)
        model = models.write(kind, root / "hf")
        pack(root / "hf", root / "m.rac")
        out[kind] = (model, root / "m.rac")
    return out


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """(dense model, archive) of models with experts, by kind."""
    out = {}
    for kind in EXPERTS:
        root = tmp_path_factory.mktemp(kind)
        arch_matrix.model_of(kind).save_pretrained(root / "hf")
        models.tokenizer().save_pretrained(root / "hf")
        pack(root / "hf", root / "m.rac")
        out[kind] = (rac.load_model(root / "m.rac"), root / "m.rac")
    return out


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """(dense model, archive) of a model whose output layer is ten times as large as all else."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    model = models.llama(tie_word_embeddings=False, vocab_size=12288).to(torch.bfloat16)
    model.save_pretrained(root / "hf")
    models.tokenizer().save_pretrained(root / "hf")
    pack(root / "hf", root / "m.rac", slices="fine")
    return type(model).from_pretrained(root / "hf"), root / "m.rac"


def store_of(model):
    return next(m.workspace.store for m in model.modules() if isinstance(m, Holding))


def least(path):
    """What a model needs at least."""
    with pytest.raises(LimitError) as found:
        rac.load_model(path, memory=1)
    said = str(found.value)
    assert "at least" in said and str(path) in said
    model = rac.load_model(path, resident="disk")
    budget = store_of(model).budget
    from rac.runtime import memory

    return memory.needed(model, store_of(model)).total, budget


def watched(model, monkeypatch):
    """Offsets and sizes of what is read from now on, in their order."""
    seen = []
    for archive in store_of(model).reader.file.archives:
        read = archive.access.read_parts

        def into(at, parts, read=read):
            seen.append((at, sum(map(len, parts))))
            read(at, parts)

        monkeypatch.setattr(archive.access, "read_parts", into)
    return seen


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "gemma"])
def test_logits_are_those_of_the_original(packed, kind):
    original, path = packed[kind]
    total, _ = least(path)
    for memory in (total, "1GB"):
        model = rac.load_model(path, memory=memory)
        assert type(model) is type(original)
        records = [m.record_of(n) for m in model.modules() if isinstance(m, Holding) for n in m._names]
        assert records and sum(r.nbytes for r in records) < path.stat().st_size // 20
        for _ in range(3):  # the second run reads and decodes ahead
            assert torch.equal(models.logits(model), models.logits(original))


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts(experts, kind, implementation):
    _, path = experts[kind]
    dense = rac.load_model(path, experts_implementation=implementation)
    ids = torch.arange(24)[None] * 7 % 100
    total, _ = least(path)
    model = rac.load_model(path, memory=total, experts_implementation=implementation)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, dense(ids).logits)
    said = [m.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist() for m in (model, dense)]
    assert said[0] == said[1]


def test_memory_is_bounded(packed):
    """Of twice what is needed at least, and of enough for all: what is kept and on its way stays below."""
    original, path = packed["llama"]
    total, _ = least(path)
    for memory in (total, total + 40_000, total + 80_000, 1 << 30):
        model = rac.load_model(path, memory=memory)
        store = store_of(model)
        assert store.budget.total == memory
        for _ in range(4):
            assert torch.equal(models.logits(model), models.logits(original))
        counts = store.reader.counts
        assert store._held == sum(found.nbytes for found in store._kept.values()) <= store.budget.kept
        assert counts.most <= store.budget.kept + store.budget.ahead
        assert store._flying <= store.budget.ahead
        if memory == 1 << 30:
            before = counts.requests
            models.logits(model)
            assert counts.requests == before  # all of it is in memory


def test_what_is_kept_of_a_model_that_is_larger(packed):
    """Layers run one after the other: those that are in memory stay there, and are found the next time."""
    _, path = packed["llama"]
    total, _ = least(path)
    model = rac.load_model(path, memory=total + 100_000, threads=1)
    store = store_of(model)
    for _ in range(3):
        models.logits(model)
    kept = set(store._kept)
    hits = store.reader.counts.hits
    for _ in range(3):
        models.logits(model)
    assert kept and set(store._kept) == kept
    assert store.reader.counts.hits - hits >= 3 * (len(kept) - 1)


def test_an_expert_is_one_range(experts, monkeypatch):
    """Gate, up and down of an expert lie side by side: one request, and no byte of another expert."""
    _, path = experts["qwen3_moe"]
    model = rac.load_model(path, resident="disk", threads=1)
    module = next(m for m in model.modules() if isinstance(m, Held))
    with rac.open(path) as f:
        rows = {e.name: e for e in f.archives[0].index.entries}
    path_of = next(n for n, m in model.named_modules() if m is module)
    own = sorted((e.at, e.size) for n, e in rows.items() if n.startswith(f"{path_of}.2."))
    assert len(own) == 3
    seen = watched(model, monkeypatch)
    module._expect(np.array([2]))
    module.gate_up_proj[2], module.down_proj[2]
    assert seen == [(own[0][0], own[-1][0] + own[-1][1] - own[0][0])]
    assert seen[0][1] <= sum(size for _, size in own) + 2 * GAP


def test_the_router_decides_what_is_read(experts, monkeypatch):
    """All experts that a token needs are asked for before the first is decoded, and no other is."""
    _, path = experts["qwen3_moe"]
    model = rac.load_model(path, resident="disk")
    module = next(m for m in model.modules() if isinstance(m, Held))
    store, asked = store_of(model), []
    want = store.want
    monkeypatch.setattr(store, "want", lambda groups: (asked.append([[*g] for g in groups]), want(asked[-1])))
    width = model.config.hidden_size
    index = torch.tensor([[3, 1]])
    module(torch.randn(1, width, dtype=torch.bfloat16).to(model.dtype), index, torch.ones(1, 2, dtype=model.dtype))
    assert [len(group) for group in asked[0]] == [3, 3]
    keys = [key.tickets for group in asked[0] for key in group]
    filed = {n: module.filed(n) for n in module._names}
    each = {n: f.head.parts // 4 for n, f in filed.items()}
    wanted = [f._of(e * each[n] + j) for e in (1, 3) for n, f in filed.items() for j in range(each[n])]
    assert keys == wanted
    counts = store.reader.counts
    assert (counts.ahead, counts.misses) == (6, 0)


def test_layers_are_read_before_they_run(packed):
    """After one run the order is known: no layer waits for a read that nobody has asked for."""
    _, path = packed["llama"]
    model = rac.load_model(path, memory=least(path)[0] + 60_000)
    models.logits(model)
    store = store_of(model)
    before = copy.copy(store.reader.counts)
    models.logits(model)
    after = store.reader.counts
    assert after.ahead > before.ahead
    assert after.misses - before.misses <= 3  # the first layers, and the embedding


def test_a_guess_that_was_wrong_is_forgotten(packed):
    _, path = packed["llama"]
    model = rac.load_model(path, memory=least(path)[0])
    store = store_of(model)
    layers = [m for m in model.modules() if isinstance(m, RacLinear)]
    for i in range(200):
        store.want([layers[i % len(layers)].filed("weight").keys()])
    want = models.logits(packed["llama"][0])
    for _ in range(30):
        assert torch.equal(models.logits(model), want)
    assert store._flying <= store.budget.ahead


@pytest.mark.parametrize("how", [{}, {"level": "fast"}, {"bits": 4, "effort": "fast"}], ids=["lossless", "fast", "4"])
def test_a_stacked_tensor_is_read_expert_by_expert(tmp_path, how):
    """Of one tensor with all experts: one request for one of them, of its own tiles and of no other's."""
    from safetensors.torch import save_file

    from rac.runtime import Workspace
    from rac.runtime.held import Head

    torch.manual_seed(0)
    experts, rows, cols = 5, 272, 384  # tiles of their own choice would not end where experts do
    save_file({"w": torch.randn(experts, rows, cols).to(torch.bfloat16)}, tmp_path / "x.safetensors")
    pack(tmp_path / "x.safetensors", tmp_path / "x.rac", **how)
    w = rac.load_file(tmp_path / "x.rac", framework="pt")["w"]
    with rac.open(tmp_path / "x.rac") as f:
        store, entry = disk.Store(f), f.archives[0].index.entries[0]
        ticket = store.reader.ticket(f.archives[0], entry).tobytes()
        filed = store.of(ticket, Head(TICKET, "BF16", tuple(w.shape)))
        assert store.reader.front(ticket).stored.tensor.grid.down % experts == 0
        assert torch.equal(filed.rows(np.array([3]), None), w[3:4])
        counts = store.reader.counts
        before, read = counts.requests, counts.read
        for e in (0, 4, 2):
            assert torch.equal(filed.rows(np.array([e]), Workspace(2).executor()), w[e : e + 1])
        assert counts.requests - before == 3
        assert counts.read - read <= 1.02 * 3 / experts * entry.size
        assert torch.equal(filed.rows(np.array([0, 1, 4]), None), w[[0, 1, 4]])
        assert torch.equal(filed.rows(np.arange(experts), None), w)


class TestErrors:
    def test_too_little_memory(self, experts, capsys):
        _, path = experts["mixtral"]
        total, _ = least(path)
        with pytest.raises(LimitError, match="too little"):
            rac.load_model(path, memory=total - 1)
        assert main(["generate", str(path), "a", "--tokens", "2", "--memory", "1kB"]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "at least" in told

    def test_arguments(self, packed):
        _, path = packed["llama"]
        for wrong in ({"memory": "many"}, {"memory": "1GB", "resident": "compressed"}, {"resident": "tape"}):
            with pytest.raises(ValueError, match=r"many|disk"):
                rac.load_model(path, **wrong)

    def test_a_file_that_is_cut_off(self, packed, tmp_path):
        shutil.copy(packed["llama"][1], tmp_path / "m.rac")
        model = rac.load_model(tmp_path / "m.rac", resident="disk")
        os.truncate(tmp_path / "m.rac", 20_000)
        with pytest.raises(ChangedError, match=r"had .* bytes, and has 20000 while a model runs.*m\.rac"):
            models.logits(model)

    def test_a_file_that_changes(self, packed, tmp_path):
        """Whatever byte of a weight is written to while the model runs: an error, or the same bits."""
        original, path = packed["llama"]
        shutil.copy(path, tmp_path / "m.rac")
        model = rac.load_model(tmp_path / "m.rac", memory=least(path)[0])
        want = models.logits(original)
        assert torch.equal(models.logits(model), want)
        with rac.open(path) as f:
            _, entry = f._tensors["model.layers.1.mlp.down_proj.weight"]
        data, wrong = path.read_bytes(), 0
        for at in range(entry.at, entry.at + entry.size, entry.size // 9):
            with open(tmp_path / "m.rac", "r+b") as out:
                out.seek(at)
                out.write(bytes([data[at] ^ 16]))
            found: list[object] = []
            with contextlib.suppress(ChangedError):
                found.append(models.logits(model))
            assert not found or torch.equal(found[0], want)
            wrong += not found
            with open(tmp_path / "m.rac", "r+b") as out:
                out.seek(at)
                out.write(data[at : at + 1])
        assert torch.equal(models.logits(model), want)  # as before: nothing wrong was kept
        assert wrong >= 7  # padding alone may change
        with open(tmp_path / "m.rac", "r+b") as out:
            out.seek(entry.at + entry.size // 2)
            out.write(bytes(16))
        with pytest.raises(ChangedError, match=r"was written to while a model runs.*m\.rac.*down_proj"):
            models.logits(model)

    def test_another_model_in_its_place(self, packed, tmp_path):
        """Whole and sound, but not what was opened."""
        shutil.copy(packed["llama"][1], tmp_path / "m.rac")
        torch.manual_seed(7)
        other = models.llama().to(torch.bfloat16)
        other.save_pretrained(tmp_path / "hf")
        models.tokenizer().save_pretrained(tmp_path / "hf")
        pack(tmp_path / "hf", tmp_path / "other.rac")
        model = rac.load_model(tmp_path / "m.rac", resident="disk")
        with open(tmp_path / "m.rac", "r+b") as out:
            out.write((tmp_path / "other.rac").read_bytes())
        with pytest.raises(ChangedError):
            models.logits(model)

    def test_damage_that_was_there(self, packed, tmp_path):
        data = bytearray(packed["llama"][1].read_bytes())
        with rac.open(packed["llama"][1]) as f:
            archive, entry = f._tensors["model.layers.1.mlp.down_proj.weight"]
            at = archive.record(entry).payload + 4000
        data[at] ^= 1
        (tmp_path / "m.rac").write_bytes(data)
        model = rac.load_model(tmp_path / "m.rac", resident="disk")
        for _ in range(2):
            with pytest.raises(ChecksumError, match=r"layers\.1\.mlp\.down_proj") as found:
                models.logits(model)
            assert str(tmp_path / "m.rac") in str(found.value) and entry.at < found.value.offset < entry.at + entry.size

    def test_the_state_of_another_model(self, packed):
        a = rac.load_model(packed["llama"][1], resident="disk")
        layer = a.model.layers[0].mlp.up_proj
        layer.record.zero_()
        with pytest.raises(MismatchError, match="no place of this file"):
            models.logits(a)
        b = rac.load_model(packed["llama"][1], resident="disk")
        up, down = b.model.layers[0].mlp.up_proj.record, b.model.layers[0].mlp.down_proj.record
        up[:TICKET] = down[:TICKET]
        with pytest.raises(MismatchError, match="the layer needs"):
            models.logits(b)

    def test_a_closed_store(self, packed):
        model = rac.load_model(packed["llama"][1], resident="disk")
        store_of(model).close()
        with pytest.raises(RacError, match="was closed"):
            models.logits(model)


class TestDecoded:
    """Experts stay decoded in memory that is left when all records have room."""

    def run(self, model, ids):
        with torch.no_grad():
            return model(ids).logits

    @pytest.mark.parametrize("kind", EXPERTS)
    def test_nothing_is_decoded_twice(self, experts, kind):
        dense, path = experts[kind]
        model, ids = rac.load_model(path, memory="1GB"), torch.arange(24)[None] * 7 % 100
        store = store_of(model)
        assert store._room == store.reader.most and store.decoded.room == store.budget.kept - store._room > 0
        for _ in range(2):
            assert torch.equal(self.run(model, ids), self.run(dense, ids))
        hits = store.decoded.hits
        assert torch.equal(self.run(model, ids), self.run(dense, ids))
        assert store.decoded.hits > hits and 0 < store.decoded.held <= store.decoded.room
        tickets = [m.filed(n).tickets for m in model.modules() if isinstance(m, Held) for n in m._names]
        of_experts = {k: n for k, n in store._used.items() if any(k.tickets in t for t in tickets)}
        assert of_experts
        self.run(model, ids)
        assert all(store._used[k] == n for k, n in of_experts.items())

    def test_what_is_written_to_is_decoded_again(self, experts):
        _, path = experts["qwen3_moe"]
        model = rac.load_model(path, memory="1GB")
        module = next(m for m in model.modules() if isinstance(m, Held))
        want = module.down_proj[2].clone()
        module.down_proj[2].zero_()
        assert want.any() and torch.equal(module.down_proj[2], want)

    def test_what_is_used_more_often_stays(self):
        kept = disk.Decoded()
        kept.room = 3 * 64
        for i in (*range(3), *range(3), 7, *range(3), 8, 8, 8, 8, 8, 8, 8):
            if kept.find(i) is None:
                kept.keep(i, torch.zeros(16))
        assert kept.held == 3 * 64 and kept.find(8) is not None and kept.find(7) is None
        assert kept.shrink(1) == 64 and kept.held == 2 * 64 <= kept.room < 3 * 64
        kept.keep(9, torch.zeros(1000))
        assert kept.find(9) is None

    def test_no_more_memory_than_was_given(self, experts):
        _, path = experts["qwen3_moe"]
        model = rac.load_model(path, memory=least(path)[0])
        self.run(model, torch.arange(24)[None])
        assert store_of(model).decoded.room == store_of(model).decoded.held == 0


class TestServers:
    """What can go wrong with a file behind a URL: one line each."""

    def test_a_server_that_goes_away(self, packed, monkeypatch):
        pytest.importorskip("aiohttp")
        original, path = packed["llama"]
        monkeypatch.setattr(remote, "RETRIES", 1)
        with Server({"m.rac": path.read_bytes()}) as server:
            url = server.url("m.rac")
            model = rac.load_model(url, memory=least(path)[0])
            assert torch.equal(models.logits(model), models.logits(original))
            server.drops = 9  # answers that end in the middle
            assert torch.equal(models.logits(model), models.logits(original))
            server.busy = 1 << 30
            with pytest.raises(SourceError, match="gave up after 2 attempts") as found:
                models.logits(model)
            assert url in str(found.value) and "\n" not in str(found.value)
            server.busy = 0  # it comes back: so does the model
            assert torch.equal(models.logits(model), models.logits(original))

    def test_no_ranges(self, packed, capsys):
        pytest.importorskip("aiohttp")
        with Server({"m.rac": packed["llama"][1].read_bytes()}, ranges=False) as server:
            assert main(["generate", server.url("m.rac"), "ab", "--tokens", "2", "--memory", "4MB"]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "no range requests" in told and "download the file" in told

    def test_what_is_late_is_read_ahead(self, experts):
        """An expert is one request; those that the router chose are asked for together, and wait side by side."""
        pytest.importorskip("aiohttp")
        original, path = experts["qwen3_moe"]
        with Server({"m.rac": path.read_bytes()}, delay=0.02) as server:
            model = rac.load_model(server.url("m.rac"), resident="disk", threads=1)
            module = next(m for m in model.modules() if isinstance(m, Held))
            store, before = store_of(model), server.requests
            start = time.perf_counter()
            module._expect(np.arange(4))
            for e in range(4):
                module.gate_up_proj[e], module.down_proj[e]
            assert server.requests - before == store.reader.counts.requests <= 4
            assert store.reader.counts.misses == 0 and store.reader.counts.guessed == store.reader.counts.ahead == 12
            assert time.perf_counter() - start >= 0.02  # the server was late, and somebody has waited
            ids = torch.arange(12)[None]
            with torch.no_grad():
                assert torch.equal(model(ids).logits, original(ids).logits)

    def test_a_file_of_the_hub(self, packed, capsys, monkeypatch, tmp_path):
        pytest.importorskip("huggingface_hub")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        said = []
        with serving(monkeypatch, tmp_path) as hub:
            hub.add("org/name", {"m.rac": packed["llama"][1].read_bytes()})
            for name in ("hf://org/name/m.rac", str(packed["llama"][1])):
                assert main(["generate", name, "ab", "--tokens", "4", "--memory", "4MB"]) == 0
                said.append(capsys.readouterr().out)
                assert ("HF_HUB_OFFLINE" in os.environ) == (not name.startswith("hf:"))
        assert said[0] == said[1]


def test_an_interrupt_ends_it(packed, capsys, monkeypatch):
    """One line, and neither threads nor an open file are left."""
    stores, count, others = [], [0], set(threading.enumerate())
    product, begin = RacLinear.product, disk.Store.count_anew

    def stopped(layer, x, bias):
        count[0] += 1
        if count[0] == 20:
            raise KeyboardInterrupt
        return product(layer, x, bias)

    monkeypatch.setattr(RacLinear, "product", stopped)
    monkeypatch.setattr(disk.Store, "count_anew", lambda store: (stores.append(store), begin(store)))
    assert main(["generate", str(packed["llama"][1]), "ab", "--tokens", "9", "--memory", "4MB"]) == 130
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == "rac: interrupted" and not any("Traceback" in line for line in told)
    assert not [t for t in threading.enumerate() if t.name.startswith("rac-disk") and t not in others]
    with pytest.raises(RacError, match="was closed"):
        stores[0].reader.file.archives[0].access.read_into(0, memoryview(bytearray(4)))


class TestModels:
    def test_copies(self, packed):
        original, path = packed["llama"]
        model = rac.load_model(path, resident="disk")
        want = models.logits(original)
        other = copy.deepcopy(model)
        assert store_of(other) is store_of(model) and torch.equal(models.logits(other), want)
        layer = model.model.layers[0].mlp.up_proj
        again = pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own
        assert again.workspace.store is not store_of(model)
        assert torch.equal(again.dense(), layer.dense())
        other.load_state_dict(model.state_dict())
        assert torch.equal(models.logits(other), want)

    def test_saved_and_dense(self, packed, tmp_path):
        original, path = packed["llama"]
        model = rac.load_model(path, resident="disk")
        with pytest.raises(UnsupportedError, match="stay in its file"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        model.dequantize()
        assert torch.equal(models.logits(model), models.logits(original))
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(models.logits(again), models.logits(original))

    def test_offloading_and_device_maps(self, packed, tmp_path):
        accelerate = pytest.importorskip("accelerate")
        original, path = packed["llama"]
        want = models.logits(original)
        assert torch.equal(models.logits(rac.load_model(path, resident="disk", device_map="auto")), want)
        model = rac.load_model(path, resident="disk")
        accelerate.cpu_offload(model, offload_buffers=True)
        assert torch.equal(models.logits(model), want)
        where = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        where |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
        model = rac.load_model(path, memory="2MB", device_map=where, offload_folder=str(tmp_path))
        for _ in range(2):
            assert torch.equal(models.logits(model), want)

    def test_threads(self, experts):
        dense, path = experts["qwen3_moe"]
        model = rac.load_model(path, memory=least(path)[0])
        ids = [torch.arange(i, i + 12)[None] * 7 % 100 for i in range(3)]
        with torch.no_grad():
            want = [dense(i).logits for i in ids]
        wrong = []

        def run(i):
            with torch.no_grad():
                wrong.extend(i for _ in range(3) if not torch.equal(model(ids[i]).logits, want[i]))

        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong

    def test_gradients(self, packed):
        original, path = packed["llama"]
        found = []
        for model in (original, rac.load_model(path, resident="disk")):
            x = model.get_input_embeddings()(torch.arange(6)[None]).detach().clone().requires_grad_()
            model(inputs_embeds=x).logits.float().sum().backward()
            found.append(x.grad)
        assert torch.allclose(found[0], found[1], rtol=1e-2)

    def test_bytes_in_memory_are_not_copied(self, packed):
        original, path = packed["llama"]
        data = bytearray(path.read_bytes())  # or numbers of a pinned tensor
        model = rac.load_model(memoryview(data), resident="disk")
        for _ in range(2):
            assert torch.equal(models.logits(model), models.logits(original))
        store = store_of(model)
        layer = model.model.layers[0].mlp.up_proj
        _, window = layer.stored()
        assert np.shares_memory(window[64:128], np.frombuffer(data, np.uint8))
        assert store._held < len(data) // 2

    def test_over_http(self, packed, experts):
        pytest.importorskip("aiohttp")
        for original, path in (packed["llama"], experts["qwen3_moe"]):
            with Server({"m.rac": path.read_bytes()}) as server:
                model = rac.load_model(server.url("m.rac"), resident="disk")
                ids = torch.arange(12)[None]
                with torch.no_grad():
                    assert torch.equal(model(ids).logits, original(ids).logits)
                before = server.requests
                with torch.no_grad():
                    assert torch.equal(model(ids).logits, original(ids).logits)
                assert server.requests == before

    def test_http_that_changes(self, packed):
        pytest.importorskip("aiohttp")
        original, path = packed["llama"]
        with Server({"m.rac": path.read_bytes()}) as server:
            model = rac.load_model(server.url("m.rac"), resident="disk")
            server.files["m.rac"] += bytes(64)
            with pytest.raises(RacError, match="changed while it was read"):
                models.logits(model)


def test_quantised_by_others(tmp_path):
    import quantised_models

    models.llama().to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    models.tokenizer().save_pretrained(tmp_path / "hf")
    folder = quantised_models.make("fp8", tmp_path / "hf", tmp_path / "fp8", "lm_head")
    pack(folder, tmp_path / "m.rac")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense, model = (rac.load_model(tmp_path / "m.rac", resident=r) for r in ("dense", "disk"))
    assert any(isinstance(m, RacLinear) and m.head.making for m in model.modules())
    for _ in range(2):
        assert torch.equal(models.logits(model), models.logits(dense))


def test_command_line(packed, capsys):
    _, path = packed["llama"]
    said = []
    for how in ([], ["--memory", "4MB"], ["--resident", "disk"]):
        assert main(["generate", str(path), "ab", "--tokens", "4", *how]) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out == said[2].out
    line = said[1].err.splitlines()[0]
    assert "stay in the file" in line and "4.0 MB" in line
    (path.parent / "t").write_text(models.TEXT)
    how = ["--tokens", "64", "--context", "32", "--memory", "4MB"]
    assert main(["perplexity", str(path), "--text", str(path.parent / "t"), *how]) == 0
    assert "(disk, " in capsys.readouterr().out


def test_residency_says_it(packed):
    model = rac.load_model(packed["llama"][1], memory="5MB")
    said = residency(model)
    assert said.budget is store_of(model).budget and "stay in the file" in str(said) and "5.0 MB" in str(said)
    assert said.held == sum(e.size for e in stored_entries(packed["llama"][1]))
    assert "in the file" in repr(model.model.layers[0].mlp.up_proj)


def stored_entries(path):
    with rac.open(path) as f:
        return [e for e in f.archives[0].index.entries if e.type == 1 and len(e.shape) == 2]


def test_a_forked_process(packed):
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    original, path = packed["llama"]
    model = rac.load_model(path, resident="disk", threads=2)
    want = models.logits(original)
    models.logits(model)
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        os._exit(0 if torch.equal(models.logits(model), want) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_keys_of_a_weight(packed):
    model = rac.load_model(packed["llama"][1], resident="disk")
    filed = model.model.layers[0].mlp.up_proj.filed("weight")
    assert filed.keys() == [Key(filed.tickets)]
    with pytest.raises(FormatError):
        filed.store.reader.front(filed.tickets).data[0 : filed.store.reader.stored_size(filed.tickets)]


class TestBands:
    """An output layer that is larger than the memory: its product is made of some rows after the other."""

    def test_an_output_layer_larger_than_the_memory(self, wide, monkeypatch):
        original, path = wide
        whole, model = least(path)[0], rac.load_model(path, memory="1200kB", threads=2)
        store, layer = store_of(model), model.lm_head
        assert layer.dense_bytes > 3_000_000 and whole > 2 * store.budget.total
        assert layer.banded and not model.model.layers[0].mlp.up_proj.banded
        down = store.reader.front(layer.filed("weight").tickets).stored.tensor.grid.down
        seen, bands = [], store.bands
        monkeypatch.setattr(store, "bands", lambda ticket, a, b: seen.append((a, b)) or bands(ticket, a, b))
        for _ in range(2):
            assert torch.equal(models.logits(model), models.logits(original))
        assert down > 3 and all(b - a == 1 for a, b in seen) and {a for a, _ in seen} == set(range(down))
        assert store.reader.counts.most <= store.budget.kept + store.budget.ahead + store.budget.used
        assert not rac.load_model(path, memory=whole).lm_head.banded

    def test_its_gradient_and_its_dense_form(self, wide):
        original, path = wide
        model = rac.load_model(path, memory="1200kB")
        found = []
        for head in (original.lm_head, model.lm_head):
            x = torch.linspace(-1, 1, 256).reshape(2, 128).to(torch.bfloat16).requires_grad_()
            head(x).float().sum().backward()
            found.append(x.grad)
        assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()
        model.dequantize()
        assert torch.equal(models.logits(model), models.logits(original))

    def test_less_than_a_band(self, wide):
        with pytest.raises(LimitError, match="at least"):
            rac.load_model(wide[1], memory="300kB")
