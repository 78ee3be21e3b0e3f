"""Models whose weights stay compressed: copies, state dictionaries, devices, adapters, compilation."""

from __future__ import annotations

import copy
import io

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rac
from rac.encode.pack import pack
from rac.errors import UnsupportedError
from rac.runtime import RacEmbedding, RacLinear
from rac.runtime.layers import Compressed
from rac.runtime.record import TAIL
from rac.runtime.replace import dequantize
from support import models


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(dense model, compressed model, archive)."""
    root = tmp_path_factory.mktemp("model")
    models.write("llama", root / "hf")
    pack(root / "hf", root / "m.rac")
    return rac.load_model(root / "m.rac"), rac.load_model(root / "m.rac", resident="compressed"), root / "m.rac"


def test_copies(small):
    dense, model, _ = small
    other = copy.deepcopy(model)
    assert other.lm_head.workspace is not model.lm_head.workspace
    assert len({id(m.workspace) for m in other.modules() if isinstance(m, RacLinear)}) == 1
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(models.logits(other), models.logits(dense))


def test_state_dict(small):
    dense, model, path = small
    state = model.state_dict()
    assert state["lm_head.weight"].dtype == torch.uint8 and not [k for k in state if "_as" in k]
    file = io.BytesIO()
    torch.save(state, file)
    other = rac.load_model(path, resident="compressed")
    for p in (*other.parameters(), *(b for b in other.buffers() if b.dtype == torch.uint8)):
        p.data.zero_()
    file.seek(0)
    other.load_state_dict(torch.load(file), strict=True)
    assert torch.equal(models.logits(other), models.logits(dense))


def test_to(small):
    _, _, path = small
    model = rac.load_model(path, resident="compressed").to(torch.float32)
    assert model.dtype == torch.float32 and model.lm_head.record.dtype == torch.uint8
    assert model.model.embed_tokens(torch.tensor([1])).dtype == torch.float32
    wide = rac.load_model(path, dtype=torch.float32)
    assert torch.equal(models.logits(model), models.logits(wide))
    assert torch.equal(models.logits(model.to("cpu")), models.logits(wide))


def test_dequantize(small):
    dense, _, path = small
    model = rac.load_model(path, resident="compressed")
    model.save_pretrained(path.parent / "saved")  # which makes a text of the data type of the configuration
    model = model.dequantize()
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(models.logits(model), models.logits(dense))
    assert not hasattr(model.config, "quantization_config")
    root = path.parent
    if not (root / "g" / "m.rac").exists():
        models.write("gpt2", root / "g" / "hf")
        pack(root / "g" / "hf", root / "g" / "m.rac")
    want = models.logits(rac.load_model(root / "g" / "m.rac"))
    assert torch.equal(models.logits(dequantize(rac.load_model(root / "g" / "m.rac", resident="compressed"))), want)


@pytest.mark.filterwarnings("ignore")
def test_compile(small):
    dense, model, _ = small
    compiled = torch.compile(copy.deepcopy(model), backend="eager")  # the breaks are there whatever the backend
    assert torch.equal(models.logits(compiled), models.logits(dense))


def test_generate(small):
    dense, model, _ = small
    ids = torch.arange(9)[None]
    a, b = (m.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1) for m in (dense, model))
    assert torch.equal(a, b) and a.shape == (1, 21)


def test_memory_is_the_records(small):
    _, model, path = small
    with rac.open(path) as f:
        sizes = {e.name: e.size for e in f.archives[0].index.entries}
    for name, module in model.named_modules():
        if isinstance(module, RacLinear | RacEmbedding) and name != "lm_head":
            assert module.record.numel() == sizes[f"{name}.weight"] + TAIL
            own = sum(t.numel() * t.element_size() for t in (*module.buffers(), *module.parameters()))
            assert own == module.record.numel()


@pytest.mark.filterwarnings("ignore")
def test_offloaded_to_the_host(small):
    accelerate = pytest.importorskip("accelerate")
    dense, _, path = small
    model = rac.load_model(path, resident="compressed")
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    for _ in range(2):
        assert torch.equal(models.logits(model), models.logits(dense))


@pytest.mark.filterwarnings("ignore")
def test_offloaded_to_disk(small, tmp_path):
    pytest.importorskip("accelerate")
    dense, _, path = small
    where = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = rac.load_model(path, resident="compressed", device_map=where, offload_folder=str(tmp_path))
    assert torch.equal(models.logits(model), models.logits(dense))


@pytest.mark.filterwarnings("ignore")
def test_adapters(small, tmp_path):
    peft = pytest.importorskip("peft")
    dense, _, path = small
    model = rac.load_model(path, resident="compressed")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(3)
    tuned = peft.get_peft_model(model, config)
    assert sum("lora_A" in n for n, _ in tuned.named_parameters()) == 14
    with_adapter = models.logits(tuned)
    torch.manual_seed(3)
    other = peft.get_peft_model(copy.deepcopy(dense), config)
    assert torch.allclose(with_adapter, models.logits(other), atol=0.1, rtol=0.05)
    with tuned.disable_adapter():
        assert torch.equal(models.logits(tuned), models.logits(dense))
    # one step of training changes the adapters and nothing else
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    batch = models.inputs(dense)["input_ids"]
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.1)
    first = tuned(input_ids=batch, labels=batch).loss
    first.backward()
    optimiser.step()
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in n for n in changed)
    assert tuned(input_ids=batch, labels=batch).loss < first
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(rac.load_model(path, resident="compressed"), tmp_path / "adapter")
    assert torch.equal(models.logits(again), models.logits(tuned))


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_conv1d_and_embeddings(tmp_path):
    peft = pytest.importorskip("peft")
    models.write("gpt2", tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "m.rac")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "wte"], init_lora_weights=False)
    found = []
    for resident in ("dense", "compressed"):
        torch.manual_seed(3)
        found.append(models.logits(peft.get_peft_model(rac.load_model(tmp_path / "m.rac", resident=resident), config)))
    assert found[0].shape == found[1].shape


def test_what_asks_the_first_parameter_is_told_the_data_type(small):
    """sentence-transformers does, and whoever casts the inputs of a model."""
    _, _, path = small
    model = rac.load_model(path, resident="compressed")
    layer = model.model.layers[0].mlp.up_proj
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16, name
    assert next(model.parameters()).dtype == model.dtype == layer.compute_dtype == torch.bfloat16
    model.to(torch.float16)
    assert next(model.parameters()).dtype == model.dtype == layer.compute_dtype == torch.float16
    assert layer.record.dtype == torch.uint8 and "model.layers.0.mlp.up_proj.weight" in model.state_dict()
    again = copy.deepcopy(model).to(torch.float32)
    assert next(again.parameters()).dtype == torch.float32
    assert torch.isfinite(models.logits(again)).all()


def test_tied_records_stay_one_where_they_are_moved(tmp_path):
    """As parameters do; the meta device stands for any other."""
    models.write("llama", tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "m.rac")
    model = rac.load_model(tmp_path / "m.rac", resident="compressed")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    moved = model._apply(lambda t: t.clone())
    assert moved.lm_head.weight.data_ptr() == moved.model.embed_tokens.weight.data_ptr()


ADAPTERS = {
    "dora": ("LoraConfig", {"use_dora": True, "init_lora_weights": False}),
    "pissa": ("LoraConfig", {"init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"init_lora_weights": "olora"}),
    "loha": ("LoHaConfig", {"init_weights": False}),
    "lokr": ("LoKrConfig", {"init_weights": False}),
    "modules to save": ("LoraConfig", {"modules_to_save": ["lm_head"], "init_lora_weights": False}),
    "tokens": ("LoraConfig", {"trainable_token_indices": [1, 2], "init_lora_weights": False}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"], "init_ia3_weights": False}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_read_the_weight(small, kind):
    """They find a dense layer: the same numbers, and the same parameters learn."""
    peft = pytest.importorskip("peft")
    _, _, path = small
    name, given = ADAPTERS[kind]
    found = []
    for resident in ("dense", "compressed"):
        given = given if "IA3" in name else {"r": 4, **given}
        torch.manual_seed(3)
        config = getattr(peft, name)(target_modules=["q_proj", "down_proj"], **given)
        tuned = peft.get_peft_model(rac.load_model(path, resident=resident, dtype="float32"), config)
        ids = models.inputs(tuned)["input_ids"]
        tuned(input_ids=ids, labels=ids).loss.backward()
        learn = sorted(n for n, p in tuned.named_parameters() if p.grad is not None)
        found.append((models.logits(tuned), learn, sum(isinstance(m, Compressed) for m in tuned.modules())))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert found[1][2] >= 10  # what is not adapted stays compressed


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_cannot_says_so(tmp_path):
    peft = pytest.importorskip("peft")
    models.write("gpt2", tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "m.rac")
    model = rac.load_model(tmp_path / "m.rac", resident="compressed")
    with pytest.raises(UnsupportedError, match="load the model dense"):
        peft.get_peft_model(model, peft.LoHaConfig(r=4, target_modules=["c_attn"]))


def test_sparse_layers_stay_sparse(tmp_path):
    """2:4 weights of a quantised model: the same zeros, the same bits dense and compressed."""
    models.write("llama", tmp_path / "hf")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    for name, w in tensors.items():
        if w.ndim == 2 and "embed" not in name and w.shape[1] % 4 == 0:
            four = w.reshape(-1, 4)
            w.copy_(four.scatter(1, four.abs().topk(2, 1, largest=False).indices, 0).reshape(w.shape))
    save_file(tensors, file, {"format": "pt"})
    done = pack(tmp_path / "hf", tmp_path / "m.rac", bits=4, calibrate="none", effort="fast")
    layers = [f for f in done.fidelity if "embed" not in f.name]
    assert layers and {(f.states, f.zeros) for f in layers} == {(1, 0)}
    dense, model = (rac.load_model(tmp_path / "m.rac", resident=how) for how in ("dense", "compressed"))
    assert torch.equal(models.logits(model), models.logits(dense))
    for f in layers:
        assert not dense.get_parameter(f.name)[tensors[f.name] == 0].any()
