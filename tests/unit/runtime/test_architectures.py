"""A cut of tools/arch_matrix.py: each cell is what docs/architectures.csv says."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import arch_matrix
import arch_table

CUT = ["llama", "gpt2", "mixtral", "bert", "opt", "gemma2"]
CUT += ["qwen3_moe", "bloom", "phi3", "roberta", "gpt_neox", "falcon", "llava", "qwen2_vl"]


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.filterwarnings("ignore")
def test_architecture(kind):
    assert arch_matrix.row(kind, True) == arch_table.stated()[kind]
