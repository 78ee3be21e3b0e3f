"""tools/moe_memory.py: at 4 bits mixtures of experts, and Falcon, hold at most half of what the dense model holds."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import moe_memory


@pytest.mark.parametrize("kind", moe_memory.KINDS)
@pytest.mark.filterwarnings("ignore")
def test_half_of_the_memory_and_the_same_bits(kind, tmp_path):
    found = moe_memory.measure(kind, tmp_path, 4, 256, 1)
    assert found["same"] and 0.2 < found["ratio"] <= moe_memory.BAR
    assert found["dense"] > 1e6


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore")
def test_layers_and_experts_of_fp8(kind, tmp_path):
    found = moe_memory.measure(kind, tmp_path, "fp8", 256, 1)
    assert found["same"] and 0.4 < found["ratio"] <= moe_memory.BAR and found["stored"] < 0.9
