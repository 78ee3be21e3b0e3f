"""Compressed layers that become dense: more tokens, merged adapters, offloaded ones."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rac
from rac.encode.pack import pack
from rac.errors import SourceError
from rac.runtime import RacEmbedding, RacLinear
from rac.runtime.layers import Compressed
from support import models

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:fan_in_fan_out")


@pytest.fixture(scope="module", params=["llama", "llama-untied", "gpt2"])
def archive(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    models.write(request.param, root / "hf")
    pack(root / "hf", root / "m.rac")
    return root / "m.rac"


def both(archive, **how):
    return rac.load_model(archive, **how), rac.load_model(archive, resident="compressed", **how)


def compressed(model):
    return {n for n, m in model.named_modules() if isinstance(m, Compressed)}


@pytest.mark.parametrize("size", [models.VOCABULARY + 7, models.VOCABULARY - 56])
@pytest.mark.parametrize("through", ["itself", "a copy"])
def test_more_and_fewer_tokens(archive, size, through, tmp_path):
    dense, model = both(archive)
    if through == "a copy":
        model, original = copy.deepcopy(model), model
    before = compressed(model)
    for m in (dense, model):
        torch.manual_seed(5)  # of the new rows
        m.resize_token_embeddings(size)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    assert [type(e) for e in ends] == [torch.nn.Embedding, torch.nn.Linear]
    assert [e.weight.shape[0] for e in ends] == [size, size] and model.config.vocab_size == size
    tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert (ends[0].weight is ends[1].weight) is tied
    assert torch.equal(ends[0].weight, dense.get_input_embeddings().weight)
    assert torch.equal(ends[1].weight, dense.get_output_embeddings().weight)
    assert len(before) - len(compressed(model)) == 2 and compressed(model)
    ids = torch.arange(9)[None] + size - 12
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)
    if through == "a copy":
        assert compressed(original) == before and original.config.vocab_size == models.VOCABULARY
    model.save_pretrained(tmp_path)  # part of it compressed, part not
    again = type(model).from_pretrained(tmp_path)
    assert compressed(again) == compressed(model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, dense(ids).logits)


def test_padded_tokens_and_no_change(archive):
    _, model = both(archive)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert type(model.get_input_embeddings()) is RacEmbedding  # nothing was asked for
    model.resize_token_embeddings(pad_to_multiple_of=100)
    assert model.get_input_embeddings().weight.shape == (300, models.WIDTH)


def adapted(model, seed=3, **how):
    peft = pytest.importorskip("peft")
    targets = ["c_attn", "c_proj"] if model.config.model_type == "gpt2" else ["q_proj", "down_proj", "up_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **how)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config)


def near(a, b):
    """As near as a sum in another order is in float32."""
    return torch.allclose(a, b, atol=1e-4 * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload(archive, safe, tmp_path):
    dense, model = both(archive, dtype=torch.float32)
    before = compressed(model)
    plain = models.logits(dense)
    tuned = adapted(model)
    with_adapter = models.logits(tuned)
    assert not near(with_adapter, plain)
    merged = tuned.merge_and_unload(safe_merge=safe)
    same = adapted(dense).merge_and_unload(safe_merge=safe)
    assert merged is model and near(models.logits(merged), with_adapter)
    assert torch.equal(models.logits(merged), models.logits(same))  # it is what merging into dense weights gives
    changed = before - compressed(merged)
    assert len(changed) == 6  # three in each block
    for name in changed:
        mine, theirs = merged.get_submodule(name), same.get_submodule(name)
        assert type(mine) is type(theirs) and torch.equal(mine.weight, theirs.weight)
    merged.save_pretrained(tmp_path)
    assert torch.equal(models.logits(type(merged).from_pretrained(tmp_path)), models.logits(same))


def test_merge_and_unmerge(archive):
    dense, model = both(archive)
    tuned, other = adapted(model), adapted(dense)
    count = len(compressed(tuned))
    for m in (tuned, other):
        m.merge_adapter()
    assert torch.equal(models.logits(tuned), models.logits(other)) and len(compressed(tuned)) < count
    for m in (tuned, other):
        m.unmerge_adapter()
    assert torch.equal(models.logits(tuned), models.logits(other))


def test_copies_of_adapters_merge_by_themselves(archive):
    _, model = both(archive, dtype=torch.float32)
    tuned = adapted(model)
    count = len(compressed(tuned))
    want = models.logits(tuned)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):  # noqa: S301 - our own
        assert near(models.logits(other.merge_and_unload()), want)
        assert len(compressed(tuned)) == count and torch.equal(models.logits(tuned), want)


def test_merging_the_output_layer_leaves_the_embedding(tmp_path):
    peft = pytest.importorskip("peft")
    models.write("llama", tmp_path / "hf")
    pack(tmp_path / "hf", tmp_path / "m.rac")
    model = rac.load_model(tmp_path / "m.rac", resident="compressed", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(3)
    tuned = peft.get_peft_model(model, config)  # peft finds tied layers by parameters, which records are not
    want = models.logits(tuned)
    with pytest.warns(UserWarning, match="no longer tied"), pytest.warns(UserWarning, match="tied_target_modules"):
        merged = tuned.merge_and_unload()
    assert near(models.logits(merged), want)
    assert type(merged.lm_head) is torch.nn.Linear and type(merged.model.embed_tokens) is RacEmbedding


def test_an_offloaded_layer_says_so(archive):
    accelerate = pytest.importorskip("accelerate")
    _, model = both(archive)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    with pytest.raises(SourceError, match="offloaded"):
        model.resize_token_embeddings(models.VOCABULARY + 1)


def test_one_layer(archive):
    dense, model = both(archive)
    name = min(compressed(model) - {"lm_head"})
    layer = model.get_submodule(name)
    assert isinstance(layer, RacLinear | RacEmbedding)
    from rac.runtime.replace import densify

    densify(layer, torch.nn.Linear(1, 1))
    assert model.get_submodule(name) is layer and type(layer) is type(dense.get_submodule(name))
    want = dense.get_submodule(name)
    assert repr(layer) == repr(want) and layer.state_dict().keys() == want.state_dict().keys()
    assert set(vars(layer)) - {"_is_hf_initialized"} == set(vars(want)) - {"_is_hf_initialized"}
    assert torch.equal(models.logits(model), models.logits(dense))
