"""How much the process grows that runs a model from its file: no more than `--memory`."""

from __future__ import annotations

import gc
import os
import re
import sys
import traceback
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import rac
from rac import system
from rac.cli import main
from rac.encode.pack import pack
from rac.runtime import memory
from rac.runtime.held import Holding
from support import models

MEMORY = 12_000_000
pytestmark = pytest.mark.skipif(
    not system.private_memory(), reason="this system does not say what memory a process has"
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A mixture of experts of 29 MB in BF16, 19 MB packed; 1.2 MB of them are used for a token."""
    root = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 192, "moe_intermediate_size": 192}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 3}
    experts = {"num_experts": 32, "num_experts_per_tok": 2, "max_position_embeddings": 512}
    own = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    config = transformers.AutoConfig.for_model("qwen3_moe", **sizes, **heads, **experts, **own)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(root / "hf")
    models.tokenizer().save_pretrained(root / "hf")
    pack(root / "hf", root / "m.rac")
    return root / "m.rac"


def apart(work):
    """Run in a process of its own, whose errors are those of the test."""
    out, into = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            os.write(into, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(into)
    with os.fdopen(out) as told:
        said = told.read()
    assert os.waitpid(pid, 0)[1] == 0, said


def of_process(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_the_process_grows_by_no_more_than_the_memory(archive):
    """Peak of everything: weights, keys and values, what malloc keeps, the index; libraries were imported before."""

    def run():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        command = ["generate", str(archive), models.TEXT[:40], "--memory", str(MEMORY), "--tokens"]
        assert main([*command, "2"]) == 0  # imports what it needs
        gc.collect()
        system.trim()
        before = of_process("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        assert main([*command, "12"]) == 0
        grown = of_process("VmHWM") - before
        assert 4_000_000 < grown <= MEMORY, f"{grown:,}"

    apart(run)


def test_what_else_the_process_takes_is_given_up_by_what_is_kept(archive):
    def run():
        ids = torch.arange(40)[None]
        with torch.no_grad():
            want = rac.load_model(archive, resident="disk")(ids).logits  # and torch has its kernels
        gc.collect()
        model = rac.load_model(archive, memory=MEMORY)
        memory.bound(model)
        store = next(m.workspace.store for m in model.modules() if isinstance(m, Holding))
        with torch.no_grad():
            assert torch.equal(model(ids).logits, want)
        before, hog = store._held, bytearray(os.urandom(1)) * 7_000_000
        with torch.no_grad():
            assert torch.equal(model(ids).logits, want)
        assert len(hog) == 7_000_000 and before - store._held > 2_000_000, f"{before:,} {store._held:,}"
        assert store._held == sum(found.nbytes for found in store._kept.values())

    apart(run)
