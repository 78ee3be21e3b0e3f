"""The loader for vLLM: the real interface where vLLM is installed, else a double of it (vLLM 0.33)."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from abc import ABC, abstractmethod

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import rac
from rac.container.access import FileAccess
from rac.errors import SourceError
from rac.runtime import vllm_plugin
from rac.runtime.vllm_plugin import LazyTensor


class BaseModelLoader(ABC):
    """vllm.model_executor.model_loader.base_loader.BaseModelLoader, as far as a loader must know it."""

    def __init__(self, load_config):
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config): ...

    @abstractmethod
    def load_weights(self, model, model_config): ...


@pytest.fixture
def registry(monkeypatch):
    """Load formats by name."""
    try:
        from vllm.model_executor import model_loader

        return model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    except ImportError:
        known = {}
    package = types.ModuleType("vllm.model_executor.model_loader")
    package._LOAD_FORMAT_TO_MODEL_LOADER = known
    package.register_model_loader = lambda name: lambda cls: known.setdefault(name, cls)
    base = types.ModuleType("vllm.model_executor.model_loader.base_loader")
    base.BaseModelLoader = BaseModelLoader
    above = types.ModuleType("vllm.model_executor")
    above.model_loader = package
    for name, module in (
        ("vllm", types.ModuleType("vllm")),
        ("vllm.model_executor", above),
        (package.__name__, package),
        (base.__name__, base),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return known


class Rank(torch.nn.Module):
    """One of `world` ranks: `a` by rows, `b` by columns, as vLLM's parallel layers cut their weights."""

    def __init__(self, rank, world, shape):
        super().__init__()
        r, c = shape
        self.rank, self.world = rank, world
        self.a = torch.nn.Parameter(torch.zeros(r // world, c, dtype=torch.bfloat16), requires_grad=False)
        self.b = torch.nn.Parameter(torch.zeros(r, c // world, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights):
        done = set()
        for name, tensor in weights:
            if name in ("a", "b"):
                mine = getattr(self, name)
                dim = 0 if name == "a" else 1
                size = mine.shape[dim]
                tensor = tensor.narrow(dim, self.rank * size, size)
                assert tensor.shape == mine.shape
                mine.data.copy_(tensor)
                done.add(name)
        return done


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    weights = {n: torch.from_numpy(rng.standard_normal((2048, 2048), np.float32)).bfloat16() for n in ("a", "b", "c")}
    st = pytest.importorskip("safetensors.torch")
    st.save_file(weights, tmp_path / "x.safetensors")
    rac.pack(tmp_path / "x.safetensors", tmp_path / "m.rac")
    return tmp_path / "m.rac", weights


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of vLLM itself


def loader(registry, extra=None):
    vllm_plugin.register()
    vllm_plugin.register()  # once in every process, or more often
    return registry["rac"](types.SimpleNamespace(load_format="rac", model_loader_extra_config=extra or {}))


@pytest.mark.parametrize("where", ["file", "folder", "setting"])
def test_every_rank_gets_its_part(registry, file, where):
    path, weights = file
    model = {"file": path, "folder": path.parent, "setting": "/nowhere"}[where]
    mine = loader(registry, {"file": str(path)} if where == "setting" else None)
    config = types.SimpleNamespace(model=str(model))
    mine.download_model(config)
    for rank in range(4):
        module = Rank(rank, 4, (2048, 2048))
        mine.load_weights(module, config)
        assert torch.equal(module.a, weights["a"][rank * 512 : (rank + 1) * 512])
        assert torch.equal(module.b, weights["b"][:, rank * 512 : (rank + 1) * 512])


def test_a_rank_reads_its_part_only(registry, file, monkeypatch):
    path, _ = file
    count, read = [0], FileAccess.read_into

    def counted(self, at, out):
        count[0] += len(out)
        read(self, at, out)

    monkeypatch.setattr(FileAccess, "read_into", counted)
    mine = loader(registry)
    mine.load_weights(Rank(3, 8, (2048, 2048)), types.SimpleNamespace(model=str(path)))
    share = 2 / 3 / 8 * path.stat().st_size
    assert count[0] < 2.2 * share + 3 * 65536  # tiles are cut in both directions


def test_wrong_settings(registry, file):
    for extra, model in (({"file": "/nowhere.rac"}, file[0]), ({"fil": "x"}, file[0]), ({}, "org/name")):
        with pytest.raises(SourceError):
            loader(registry, extra).download_model(types.SimpleNamespace(model=str(model)))


def test_a_parameter_that_gets_nothing(registry, file):
    module = Rank(0, 1, (2048, 2048))
    module.register_parameter("z", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(SourceError, match="'z'"):
        loader(registry).load_weights(module, types.SimpleNamespace(model=str(file[0])))


def test_entry_point():
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(e.name == "rac" for e in found):
        pytest.skip("installed before there was one")
    assert next(e for e in found if e.name == "rac").load() is vllm_plugin.register


def test_lazy_tensor(file):
    path, weights = file
    with rac.open(path, framework="pt") as f:
        lazy, w = LazyTensor(f.get_slice("a")), weights["a"]
        assert lazy.shape == w.shape and lazy.dtype == w.dtype and lazy.dim() == 2 and len(lazy) == 2048
        assert "LazyTensor" in repr(lazy)
        assert torch.equal(lazy.narrow(1, 5, 20), w.narrow(1, 5, 20)) and torch.equal(lazy.narrow(-2, 3, 4), w[3:7])
        assert torch.equal(lazy[7], w[7]) and torch.equal(lazy[..., 3:9], w[..., 3:9])
        assert torch.equal(lazy[torch.tensor([1, 5])], w[[1, 5]]) and torch.equal(lazy[w[:, 0] > 0], w[w[:, 0] > 0])
        assert torch.equal(lazy.to(torch.float32), w.float()) and torch.equal(lazy.t(), w.t())
        assert torch.equal(torch.cat([lazy, lazy])[2048:], w) and torch.equal(w[:3] @ lazy, w[:3] @ w)
        assert type(lazy + 0) is torch.Tensor
        for bad in ((2, 0, 1), (0, 2000, 100), (0, 0, -1)):
            with pytest.raises((IndexError, RuntimeError)):
                lazy.narrow(*bad)
