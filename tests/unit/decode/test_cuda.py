"""The GPU decoder as far as it goes without a GPU: interpreted kernels, compiled kernels, what it says it cannot do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rac.errors import UnsupportedError
from rac.gpu import decoder as cuda

ROOT = Path(__file__).parents[3]
RATCHET = Path(__file__).with_name("sass.json")
torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import gpu_sass


@pytest.fixture(scope="module", params=gpu_sass.ARCHITECTURES)
def compiled(request):
    """An architecture, and each kernel in the forms that files ask for; all that is asked of them stands in one test.

    Two tests could be two workers', who would both compile for half a minute.
    """
    return request.param, {name: gpu_sass.measure(name, request.param) for name in gpu_sass.FORMS}


def test_compiled_kernels(compiled):
    cap, kernels = compiled
    for name, m in kernels.items():
        assert m["spilled"] == 0, name
        assert m["registers"] <= 40, name
        assert m["shared"] <= 48 << 10, name
    # one table per tile of a warp; the driver takes 1 KB per program from sm_90 on
    driver = 1024 if cap >= 90 else 0
    for name, tables, of in (("lanes, single, 32", 1, 64), ("lanes, single, 16", 2, 64), ("lanes, pairs, 32", 1, 256)):
        assert kernels[name]["shared"] == tables * (4096 + 8 * of) + driver
    assert kernels["lanes, single, 8"]["shared"] == 0
    assert kernels["trellis"]["shared"] == 2048 + driver
    # products are not fused with sums, and keep small numbers; bfloat16 is rounded by the hardware
    for name in ("product", "trellis"):
        assert "FFMA" not in kernels[name]["text"]
        assert not re.search(r"F(MUL|ADD)\.FTZ", kernels[name]["text"])
    assert "F2FP.BF16" in kernels["trellis"]["text"]
    # `python tools/gpu_sass.py --write` after a change for the better
    ratchet = json.loads(RATCHET.read_text())
    if ratchet["triton"] != gpu_sass.version():
        pytest.skip(f"was counted with triton {ratchet['triton']}")
    for key, suffix in gpu_sass.KEYS.items():
        stated = ratchet[f"sm_{cap}{suffix}"]
        found = {name: m[key] for name, m in kernels.items()}
        assert found.keys() == stated.keys()
        assert not {name: (n, stated[name]) for name, n in found.items() if n > stated[name] + 0.005}


def test_why_not():
    assert "meta" in cuda.why_not("meta")
    assert "cpu" in cuda.why_not("cpu")
    if not torch.cuda.is_available():
        assert "CUDA" in cuda.why_not("cuda")
        with pytest.raises(UnsupportedError, match="cannot decode on cuda"):
            cuda.DeviceDecoder("cuda")


def test_a_triton_that_lacks_what_kernels_need(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(cuda, "interpreted", lambda: True)
    assert cuda.why_not("cpu") is None
    monkeypatch.delattr(triton, "constexpr_function")
    assert "older than 3.5" in cuda.why_not("cpu")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of triton's own half-made object
def test_a_cache_of_triton_that_is_half_written(tmp_path, monkeypatch):
    """One line that says what to delete; launching compiles, or takes from the cache, as compiling for a test does."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gpu_sass.compiled.__wrapped__("outliers", 90)
    (path,) = tmp_path.rglob("outliers.json")
    os.truncate(path, path.stat().st_size // 2)

    def launched(*_, **__):
        gpu_sass.compiled.__wrapped__("outliers", 90)

    monkeypatch.setattr(cuda, "kernel", lambda _: {(1,): launched})
    call = SimpleNamespace(kernel="outliers", out="out", source="", options=(("WORD", 2), ("BLOCK", 128)))
    memories = {"out": None, "aux": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(UnsupportedError, match=f"kernel 'outliers' .JSONDecodeError.*delete {tmp_path}$"):
        cuda.launch([SimpleNamespace(call=call, jobs=0, size=16, grid=(1,))], memories)


def test_nothing_loads_triton_before_it_is_asked_for():
    code = "import sys, rac.gpu.decoder, rac.decode.archive; sys.exit(bool({'triton', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
