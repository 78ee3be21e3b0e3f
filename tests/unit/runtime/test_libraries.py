"""Functions of other libraries that are given an archive, or a model that was made of one."""

from __future__ import annotations

import os
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rac
from rac.encode.pack import pack
from rac.errors import MismatchError, MissingFileError, UnsupportedError
from rac.runtime import RacLinear
from rac.runtime.libraries import is_archive
from support import models


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(dense model, archive)."""
    root = tmp_path_factory.mktemp("model")
    models.write("llama-untied", root / "hf")
    models.tokenizer().save_pretrained(root / "hf")
    pack(root / "hf", root / "m.rac")
    return rac.load_model(root / "m.rac"), root / "m.rac"


def test_from_pretrained(small):
    dense, path = small
    for name in (path, str(path)):
        for cls in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
            model = cls.from_pretrained(name, token="none", cache_dir="/nowhere")
            assert type(model) is type(dense) and model.dtype == torch.bfloat16
            assert torch.equal(models.logits(model), models.logits(dense))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, resident="compressed", torch_dtype=torch.float32)
    assert isinstance(model.lm_head, RacLinear) and model.dtype == torch.float32
    assert transformers.AutoConfig.from_pretrained(path).to_dict()["hidden_size"] == models.WIDTH
    assert transformers.LlamaConfig.from_pretrained(path).vocab_size == models.VOCABULARY
    assert transformers.AutoTokenizer.from_pretrained(path)("abc") == rac.load_tokenizer(path)("abc")


def test_from_pretrained_of_other_classes(small):
    dense, path = small
    with pytest.warns(UserWarning, match="no use for tensor 'lm_head.weight'"):
        model = transformers.AutoModel.from_pretrained(path)
    assert type(model) is transformers.LlamaModel
    assert torch.equal(model.embed_tokens.weight, dense.model.embed_tokens.weight)
    with pytest.raises(UnsupportedError, match="AutoModelForMaskedLM has no class for a LlamaForCausalLM"):
        transformers.AutoModelForMaskedLM.from_pretrained(path)
    with pytest.raises(MismatchError, match="LlamaForSequenceClassification needs"):
        transformers.LlamaForSequenceClassification.from_pretrained(path)


def test_a_pipeline_and_fields_of_the_configuration(small):
    dense, path = small
    for name in (str(path), os.path.relpath(path)):
        made = transformers.pipeline("text-generation", model=name)
        assert torch.equal(models.logits(made.model), models.logits(dense)) and made.tokenizer("abc").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(path, use_cache=False, attn_implementation="eager")
    assert model.config.use_cache is False and model.config._attn_implementation == "eager"


def test_a_compressed_model_is_not_calibrated(small):
    model = rac.load_model(small[1], resident="compressed")
    with pytest.raises(rac.SourceError, match="compressed in memory: load it with resident='dense'"):
        rac.calibrate(model, [torch.arange(40)[None]])


def test_files_that_are_not_there(tmp_path):
    for of in (transformers.AutoModel, transformers.AutoConfig, transformers.AutoTokenizer):
        with pytest.raises(MissingFileError, match=r"none\.rac") as e:
            of.from_pretrained(tmp_path / "none.rac")
        assert isinstance(e.value, FileNotFoundError) and isinstance(e.value, rac.SourceError)
    assert is_archive("x/m.rac") and not is_archive("m.safetensors") and not is_archive(None)


def test_folders_that_look_like_archives(small, tmp_path):
    shutil.copytree(small[1].parent / "hf", tmp_path / "folder.rac")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder.rac", dtype=torch.bfloat16)
    assert torch.equal(models.logits(model), models.logits(small[0]))


def test_data_types(small):
    _, path = small
    assert rac.load_model(path, torch_dtype=torch.float16).dtype == torch.float16
    assert rac.load_model(path, dtype="float32").dtype == torch.float32
    assert rac.load_model(path, dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="give one of them"):
        rac.load_model(path, dtype="float32", torch_dtype="float16")


@pytest.mark.filterwarnings("ignore")
def test_auto_peft_model(small, tmp_path):
    peft = pytest.importorskip("peft")
    _, path = small
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(3)
    tuned = peft.get_peft_model(rac.load_model(path), config)
    tuned.save_pretrained(tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(path)
    for resident in ("dense", "compressed"):
        found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", resident=resident)
        assert torch.equal(models.logits(found), models.logits(tuned))


@pytest.mark.filterwarnings("ignore")
def test_load_checkpoint_and_dispatch(small):
    accelerate = pytest.importorskip("accelerate")
    dense, path = small
    with accelerate.init_empty_weights():
        model = type(dense)._from_config(dense.config, dtype=torch.bfloat16)
    model = accelerate.load_checkpoint_and_dispatch(model, str(path), device_map={"": "cpu"})
    assert torch.equal(models.logits(model.eval()), models.logits(dense))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint(small):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    dense, path = small
    for name in (path, str(path)):
        state = {n: torch.zeros_like(t) for n, t in dense.state_dict().items()}
        dcp.load(state, checkpoint_id=name)
        assert all(torch.equal(state[n], t) for n, t in dense.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("resident", ["dense", "compressed"])
def test_fully_sharded(small, resident, tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    dense, path = small
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = rac.load_model(path, resident=resident)
        for layer in (*model.model.layers, model):
            fsdp.fully_shard(layer, mesh=mesh)
        assert torch.equal(models.logits(model), models.logits(dense))
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_export(small):
    dense, path = small
    ids = torch.arange(8)[None]
    how = {"use_cache": False}
    program = torch.export.export(rac.load_model(path), (ids,), how)
    assert torch.equal(program.module()(ids, **how).logits, dense(ids).logits)
    with pytest.raises(UnsupportedError, match=r"load the model dense, or call model\.dequantize\(\) first"):
        torch.export.export(rac.load_model(path, resident="compressed"), (ids,), how)


def test_public_errors():
    for name in ("BudgetError", "MissingFileError", "SliceError", "TransformError", "DivergedError"):
        assert issubclass(getattr(rac, name), rac.RacError) and name in rac.__all__
    with pytest.raises(FileNotFoundError):
        rac.load_model(os.path.join("nowhere", "m.rac"))
