"""What reads and writes the weight of a compressed layer, fused experts, and layers of derived classes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn
from torch.nn import functional

import arch_matrix
import rac
from rac.encode.pack import pack
from rac.errors import ChecksumError, RacError
from rac.runtime import device, replace, weight
from rac.runtime import record as stored_record
from rac.runtime.held import Head, Holding
from rac.runtime.layers import Compressed, RacLinear
from rac.runtime.reads import read_by_others
from rac.runtime.weight import Weight
from support import models

KINDS = ["falcon", "gpt_oss", "mixtral", "jamba"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(dense model, archive)."""
    root = tmp_path_factory.mktemp("model")
    models.write("llama", root / "hf")
    pack(root / "hf", root / "m.rac")
    return rac.load_model(root / "m.rac"), root / "m.rac"


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Dense models and archives of tiny models, by kind."""
    found = {}
    for kind in KINDS:
        root = tmp_path_factory.mktemp(kind)
        arch_matrix.model_of(kind).save_pretrained(root / "hf")
        pack(root / "hf", root / "m.rac")
        found[kind] = rac.load_model(root / "m.rac"), root / "m.rac"
    return found


def compressed(path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rac: .* reads the weight")
        return rac.load_model(path, resident="compressed")


def logits(model):
    return arch_matrix.output(model)


@pytest.fixture
def counted(monkeypatch):
    """Shapes of the words that records were decoded to."""
    seen = []
    decode = stored_record.decode

    def watched(s, data, out, *args, **kwargs):
        seen.append(out.shape)
        decode(s, data, out, *args, **kwargs)

    monkeypatch.setattr(stored_record, "decode", watched)
    return seen


def test_what_is_known_without_decoding(small, counted):
    dense, path = small
    layer = compressed(path).model.layers[0].mlp.up_proj
    w, want = layer.weight, dense.model.layers[0].mlp.up_proj.weight
    assert isinstance(w, Weight) and isinstance(w, nn.Parameter) and not w.requires_grad
    assert (w.shape, w.dtype, w.device, w.dim(), len(w)) == (want.shape, want.dtype, want.device, 2, len(want))
    assert w.numel() == want.numel() and w.nbytes == want.nbytes and w.is_floating_point() and w.grad is None
    assert w.data is w and w.detach() is w and w.requires_grad_(False) is w and not counted
    assert layer.to(torch.float32).weight.dtype == torch.float32 and not counted


def test_whoever_reads_it_gets_the_numbers(small, counted):
    dense, path = small
    model = compressed(path)
    layer, want = model.model.layers[0].mlp.up_proj, dense.model.layers[0].mlp.up_proj.weight
    x = torch.randn(3, want.shape[1], dtype=want.dtype)
    assert torch.equal(functional.linear(x, layer.weight), functional.linear(x, want))
    assert torch.equal(x @ layer.weight.T, x @ want.T)
    assert torch.equal(layer.weight + 1, want + 1) and torch.equal(1 + layer.weight, want + 1)
    assert torch.equal(layer.weight.clone(), want) and type(layer.weight.clone()) is torch.Tensor
    assert torch.equal(torch.cat([layer.weight, layer.weight]), torch.cat([want, want]))
    assert (layer.weight.float().numpy() == want.float().detach().numpy()).all()
    assert torch.equal(copy.deepcopy(layer.weight), want) and str(layer.weight) == str(want.data)
    assert isinstance(model.model.layers[0].mlp.up_proj, RacLinear)
    a, b = model.lm_head.weight, model.model.embed_tokens.weight
    assert a is b
    counted.clear()
    rows = torch.tensor([[5, 250], [-1, 5]])
    table = dense.model.embed_tokens.weight
    assert torch.equal(b[rows], table[rows]) and torch.equal(b[7], table[7])
    assert torch.equal(functional.embedding(rows.abs(), b), functional.embedding(rows.abs(), table))
    with pytest.raises(IndexError):
        functional.embedding(rows, b)
    with pytest.raises(IndexError):
        b[[256]]


def test_a_weight_that_is_read_is_kept_by_those_who_have_it(small, counted):
    layer = compressed(small[1]).model.layers[0].mlp.up_proj
    w = layer.weight
    assert torch.equal(w * 2, w + w) and len(counted) == 1 and layer.weight is w
    del w
    layer.weight.sum()
    assert len(counted) == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: setattr(layer.weight, "data", layer.weight * 2),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
        lambda layer: layer.weight.__setitem__(slice(None), layer.weight * 2),
        lambda layer: layer.weight.data.__imul__(2),
        lambda layer: torch.mul(layer.weight.clone(), 2, out=layer.weight),
        lambda layer: nn.init.constant_(layer.weight, 0).add_(0),
    ],
)
def test_who_writes_to_it_makes_the_layer_dense(small, write):
    dense, path = small
    layer, want = compressed(path).model.layers[1].mlp.gate_proj, dense.model.layers[1].mlp.gate_proj.weight
    before = layer.weight
    with torch.no_grad():
        write(layer)
    assert type(layer) is nn.Linear and isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, want * 2) or not layer.weight.any()
    if type(before) is Weight and before._now is layer.weight:  # not where another parameter took the place
        assert torch.equal(before, layer.weight)


def test_damage_is_named_by_who_reads(small):
    layer = compressed(small[1]).model.layers[0].mlp.up_proj
    layer.record[len(layer.record) // 2] ^= 1
    with pytest.raises(ChecksumError, match=r"layers\.0\.mlp\.up_proj"):
        layer.weight.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_models_that_do_not_use_plain_layers(others, kind, tmp_path):
    """The bits of dense; copied, pickled, saved and loaded, and dense again."""
    dense, path = others[kind]
    want, model = logits(dense), compressed(path)
    assert model.dtype == torch.bfloat16 and next(model.parameters()).is_floating_point()
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    arch_matrix.same(want, logits(model))
    arch_matrix.same(want, logits(copy.deepcopy(model)))
    arch_matrix.same(want, logits(pickle.loads(pickle.dumps(model))))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    other = compressed(path)
    for t in other.state_dict().values():
        t.zero_()
    other.load_state_dict(state)
    arch_matrix.same(want, logits(other))
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert replace.residency(again).held == replace.residency(model).held
    arch_matrix.same(want, logits(again))
    back = model.dequantize()
    assert not [m for m in back.modules() if isinstance(m, Holding)]
    assert [type(m) for m in back.modules()] == [type(m) for m in dense.modules()]
    arch_matrix.same(want, logits(back))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_decoded_when_the_router_asks_for_them(others, kind, implementation, counted):
    dense, path = others[kind]
    model = compressed(path)
    layer = model.model.layers[0].mlp.experts
    assert type(layer).__name__.startswith("Rac") and layer.gate_up_proj.shape == (4, *layer.gate_up_proj.shape[1:])
    for m in (model, dense):
        m.set_experts_implementation(implementation)
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    asked, weights = torch.tensor([[2, 0], [2, 0]]), torch.full((2, 2), 0.5, dtype=torch.bfloat16)
    counted.clear()
    assert torch.equal(layer(x, asked, weights), dense.model.layers[0].mlp.experts(x, asked, weights))
    if kind == "mixtral":  # a record for each expert; that of gpt_oss is one tile here
        assert len(counted) == 2 * 3  # two experts, three matrices of each
    dense.set_experts_implementation("grouped_mm")


def test_experts_in_one_launch(others, monkeypatch):
    """As on a device."""
    dense, path = others["mixtral"]
    model = compressed(path)
    monkeypatch.setattr(weight, "_one_by_one", lambda x: False)
    arch_matrix.same(logits(dense), logits(model))
    turned = model.model.layers[0].mlp.experts.down_proj.transpose(1, 2)
    x, nobody = torch.randn(2, 192, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32)
    assert functional.grouped_mm(x, turned, offs=nobody).shape == (2, 128)


def test_experts_that_the_file_has_the_other_way_round(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    text = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 32}
    text |= {"num_key_value_heads": 2, "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}
    text |= {"rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default"}}
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    transformers.Qwen3VLMoeForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in st.load_file(file).items()}
    st.save_file(tensors, file, {"format": "pt"})
    pack(tmp_path / "hf", tmp_path / "m.rac")
    want = rac.load_model(tmp_path / "m.rac")(input_ids=torch.arange(9)[None]).logits
    model = compressed(tmp_path / "m.rac")
    experts = model.model.language_model.layers[0].mlp.experts
    assert type(experts).__name__.startswith("Rac") and experts.down_proj.shape == (4, 128, 96)
    model.save_pretrained(tmp_path / "saved")
    for one in (model, type(model).from_pretrained(tmp_path / "saved")):
        assert torch.equal(one(input_ids=torch.arange(9)[None]).logits, want)
        assert replace.residency(one).held == replace.residency(model).held


def test_experts_learn_nothing_and_pass_gradients_on(others):
    dense, path = others["mixtral"]
    found = []
    for model in (dense, compressed(path)):
        x = torch.linspace(-1, 1, 256, dtype=torch.bfloat16).reshape(1, 2, 128).requires_grad_()
        model(inputs_embeds=x).logits.sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)
    dense.zero_grad()


@pytest.mark.filterwarnings("ignore")
def test_derived_layers_are_adapted(others):
    peft = pytest.importorskip("peft")
    dense, path = others["falcon"]
    config = peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
    found = []
    for model in (copy.deepcopy(dense), compressed(path)):
        torch.manual_seed(3)
        tuned = peft.get_peft_model(model, config)
        found.append((logits(tuned), logits(tuned.merge_and_unload())))
    for a, b in zip(*found, strict=True):
        arch_matrix.same(a, b)


@pytest.mark.filterwarnings("ignore")
def test_experts_are_offloaded(others):
    accelerate = pytest.importorskip("accelerate")
    dense, path = others["mixtral"]
    model = compressed(path)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert model.model.layers[0].mlp.experts.record_of("down_proj").device.type == "meta"
    for _ in range(2):
        arch_matrix.same(logits(dense), logits(model))


@pytest.mark.filterwarnings("ignore")
def test_experts_are_offloaded_to_disk(others, tmp_path):
    pytest.importorskip("accelerate")
    dense, path = others["mixtral"]
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    where = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = rac.load_model(path, resident="compressed", device_map=where, offload_folder=str(tmp_path))
    arch_matrix.same(logits(dense), logits(model))


@pytest.mark.filterwarnings("ignore")
def test_compiled(others):
    dense, path = others["mixtral"]
    model = torch.compile(compressed(path), backend="eager")  # the breaks are there whatever the backend
    arch_matrix.same(logits(dense), logits(model))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_decoded_where_their_records_are(others, kind, monkeypatch):
    """Without TRITON_INTERPRET the operator decodes in C."""
    monkeypatch.setattr(device, "_why_not", lambda name: None)
    dense, path = others[kind]
    want = dense.model.layers[0].mlp.experts
    layer = compressed(path).model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        source = layer.source(name)
        for _ in range(2):
            found = source._on_device(source.record, torch.tensor([1, 3]))
            assert torch.equal(found, getattr(want, name)[[1, 3]])
            kept = source.workspace.fused
            assert (kept is None) is (kind == "mixtral")
            assert kept is None or torch.equal(kept[1], getattr(want, name))
        source.record[len(source.record) // 4] ^= 1
        with pytest.raises(RacError):
            source._on_device(source.record, torch.arange(4))


def test_what_is_read_at_each_step_is_dense_and_said(tmp_path):
    arch_matrix.model_of("reformer").save_pretrained(tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "m.rac")
    with pytest.warns(
        UserWarning, match=r"query_key \(and 1 more\) stay dense \(65.5 kB\): LSHSelfAttention\.\w+, LSH"
    ) as said:
        model = rac.load_model(tmp_path / "m.rac", resident="compressed")
    assert len(said) == 1
    attention = model.reformer.encoder.layers[1].attention
    assert type(attention.self_attention.query_key) is nn.Linear
    assert isinstance(attention.output.dense, RacLinear)


class Reader(nn.Module):
    """Reads weights in all ways that there are."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.many = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.table = nn.Embedding(4, 4)
        self.start = self.d.weight.sum()

    def forward(self, x, slow=False):
        """Of b only the data type, of c on a condition, of d when it is made."""
        x = x.to(self.b.weight.dtype) @ self.a.weight
        if slow and self.c.weight.sum() > 0:
            x = x + self.c.weight
        return self.last(x + self.many[1].weight.t(), self.table)

    def last(self, x, table):
        """By the name of an argument."""
        return x @ table.weight


def test_reads_are_found_in_the_source():
    found = read_by_others(nn.ModuleDict({"x": Reader()}))
    assert set(found) == {"x.a", "x.many.0", "x.many.1", "x.table"}
    assert found["x.a"] == "Reader.forward" and found["x.table"] == "Reader.last"


@pytest.mark.filterwarnings("ignore:rac. .* reads the weight")
@pytest.mark.parametrize("kind", ["mamba", "rwkv", "olmo", "chinese_clip"])
def test_a_cut_of_the_matrix(kind):
    """Weights that are read, or written while the model runs, models of matrices alone, rows that loading zeroes."""
    found = arch_matrix.row(kind, True, ["compressed", "hf"])
    assert found == {"architecture": kind, "compressed": "ok", "hf": "ok"}


def test_heads_of_parts():
    one = Head(1, "BF16", (4, 6, 8))
    assert one.fits((4, 6, 8)) and not one.fits((4, 8, 6))
    parts = Head(1, "BF16", (6, 8), 8)
    assert (
        parts.fits((4, 12, 8)) and not parts.fits((4, 6, 8)) and not parts.fits((3, 16, 8)) and not parts.fits((4, 8))
    )
    assert isinstance(RacLinear, type) and issubclass(RacLinear, Compressed)


def test_one_line_says_what_is_held(others, caplog):
    dense, path = others["gpt_oss"]
    with caplog.at_level("INFO", "rac.runtime.model"):
        model = compressed(path)
    line = caplog.records[-1].getMessage()
    found = replace.residency(model)
    assert str(found) in line and "weights stay compressed" in line and "gate_up_proj_bias" in line
    assert found.weights == sum(p.numel() for p in dense.parameters())
    assert found.instead + sum(found.others.values()) == sum(p.nbytes for p in dense.parameters())
