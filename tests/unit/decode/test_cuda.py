"""The GPU decoder as far as it goes without a GPU: interpreted kernels, compiled kernels, what it says it cannot do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rac.errors import UnsupportedError
from rac.gpu import decoder as cuda

ROOT = Path(__file__).parents[3]
RATCHET = Path(__file__).with_name("sass.json")
torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import gpu_sass


@pytest.fixture(scope="module")
def compiled():
    """Each kernel, in the forms that files ask for, for three architectures."""
    return {cap: {name: gpu_sass.measure(name, cap) for name in gpu_sass.FORMS} for cap in gpu_sass.ARCHITECTURES}


@pytest.mark.parametrize("cap", gpu_sass.ARCHITECTURES)
def test_kernels_compile_small(compiled, cap):
    for name, m in compiled[cap].items():
        assert m["spilled"] == 0, name
        assert m["registers"] <= 40, name
        assert m["shared"] <= 48 << 10, name


@pytest.mark.parametrize("cap", gpu_sass.ARCHITECTURES)
def test_instructions_per_weight_do_not_rise(compiled, cap):
    """`python tools/gpu_sass.py --write` after a change for the better."""
    ratchet = json.loads(RATCHET.read_text())
    if ratchet["triton"] != gpu_sass.version():
        pytest.skip(f"was counted with triton {ratchet['triton']}")
    for key, suffix in gpu_sass.KEYS.items():
        stated = ratchet[f"sm_{cap}{suffix}"]
        found = {name: m[key] for name, m in compiled[cap].items()}
        assert found.keys() == stated.keys()
        assert not {name: (n, stated[name]) for name, n in found.items() if n > stated[name] + 0.005}


@pytest.mark.parametrize("cap", gpu_sass.ARCHITECTURES)
def test_shared_memory_is_reserved_once(compiled, cap):
    """One table per tile of a warp; the driver takes 1 KB per program from sm_90 on."""
    driver = 1024 if cap >= 90 else 0
    for name, tables, of in (("lanes, single, 32", 1, 64), ("lanes, single, 16", 2, 64), ("lanes, pairs, 32", 1, 256)):
        assert compiled[cap][name]["shared"] == tables * (4096 + 8 * of) + driver
    assert compiled[cap]["lanes, single, 8"]["shared"] == 0
    assert compiled[cap]["trellis"]["shared"] == 2048 + driver


def test_products_are_not_fused(compiled):
    for cap in gpu_sass.ARCHITECTURES:
        for name in ("product", "trellis"):
            assert "FFMA" not in compiled[cap][name]["text"]
            assert not re.search(r"F(MUL|ADD)\.FTZ", compiled[cap][name]["text"])


def test_bfloat16_is_rounded_by_the_hardware(compiled):
    for cap in gpu_sass.ARCHITECTURES:
        assert "F2FP.BF16" in compiled[cap]["trellis"]["text"]


def test_why_not():
    assert "meta" in cuda.why_not("meta")
    assert "cpu" in cuda.why_not("cpu")
    if not torch.cuda.is_available():
        assert "CUDA" in cuda.why_not("cuda")
        with pytest.raises(UnsupportedError, match="cannot decode on cuda"):
            cuda.DeviceDecoder("cuda")


def test_nothing_loads_triton_before_it_is_asked_for():
    code = "import sys, rac.gpu.decoder, rac.decode.archive; sys.exit(bool({'triton', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
