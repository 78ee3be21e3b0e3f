"""Words to numpy arrays and torch tensors."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import rac
from rac import frameworks as fw
from rac.registry import DTYPES

NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F4": np.uint8,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    d = DTYPES[dtype]
    words = np.arange(24 * d.bits // 8 // d.word).astype(f"<u{d.word}")
    array = fw.to_framework(words, dtype, (3, 8), "np")
    assert array.dtype == NUMPY[dtype]
    assert array.shape == ((3, 4) if dtype == "F4" else (3, 8))
    assert array.tobytes() == words.tobytes()
    assert np.shares_memory(array, words)
    torch = pytest.importorskip("torch")
    tensor = fw.to_framework(words, dtype, (3, 8), "pt")
    names = {"F4": "float4_e2m1fn_x2", "BF16": "bfloat16", "BOOL": "bool"}
    assert str(tensor.dtype) == f"torch.{names.get(dtype, np.dtype(NUMPY[dtype]).name)}"
    assert tuple(tensor.shape) == array.shape
    assert tensor.view(torch.uint8).numpy().tobytes() == words.tobytes()
    assert tensor.data_ptr() == words.ctypes.data


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1)])
def test_shapes(shape):
    words = np.arange(int(np.prod(shape)), dtype="<u4")
    assert fw.to_framework(words, "F32", shape, "np").shape == shape
    pytest.importorskip("torch")
    assert tuple(fw.to_framework(words, "F32", shape, "pt").shape) == shape


def test_check():
    for framework in ("np", "pt"):
        fw.check(framework)
    with pytest.raises(ValueError, match="'np' or 'pt', not 'tf'"):
        fw.check("tf")
    with pytest.raises(ValueError, match="live on the CPU"):
        fw.check("np", "cuda")


def test_without_torch(tmp_path):
    rac.save_file({"a": np.arange(5)}, tmp_path / "m.rac")
    code = """if True:
        import sys
        sys.modules["torch"] = None  # to import it is an error
        import rac
        print(rac.load_file(sys.argv[1])["a"].tolist())
        try:
            rac.load_file(sys.argv[1], framework="pt")
        except rac.MissingDependencyError as e:
            print(e, isinstance(e, ImportError))
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.rac"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[0, 1, 2, 3, 4]",
        "framework='pt' needs `pip install rac-codec[torch]` True",
    ]
