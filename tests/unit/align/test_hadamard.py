"""Signs, orders and matrices of format_spec/stages/online.md, and their fast transform."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from rac.linalg import hadamard as hd
from rac.linalg.transform import Transform
from rac.records import Online

PAGE = (Path(__file__).parents[3] / "format_spec" / "stages" / "online.md").read_text()
VALUES = re.findall(r"^\| (\d+|2\^62) \|(?: [a-zPW][^|]*\|)? `([0-9a-f]{32})`", PAGE, re.MULTILINE)
SIZES = (64, 384, 576, 768, 896, 960, 1536, 2048, 3072, 4096, 4864, 5120, 8192, 8960, 11008, 13824, 14336, 18944, 28672)


def test_values_of_the_page():
    assert len(VALUES) == 13
    for text, digest in VALUES:
        if text in ("0", "1", "2^62"):
            made = hd.signs(1 << 62 if "^" in text else int(text), 100)
        else:
            made = np.rint(hd.matrix(int(text)) * int(text) ** 0.5)
        assert xxhash.xxh3_128_hexdigest(np.ascontiguousarray(made, np.int8).tobytes()) == digest, text


@pytest.mark.parametrize("size", SIZES)
def test_known_models_have_hadamard_matrices(size):
    o = hd.order(size)
    assert o.hadamard and o.base << o.power == size and o.base <= 180
    b = hd._base(o).astype(np.int64)
    assert np.array_equal(np.abs(b), np.ones_like(b)) and np.array_equal(b @ b.T, o.base * np.eye(o.base, dtype=int))


@pytest.mark.parametrize("size", [1, 2, 3, 9, 12, 14, 28, 43, 60, 86, 172, 344, 504, 576, 1024])
def test_orthonormal_and_fast(size):
    m = hd.matrix(size)
    assert np.abs(m @ m.T - np.eye(size)).max() < 1e-12
    x = np.random.default_rng(size).standard_normal((3, 2, size))
    t = Transform(Online("hadamard/1", size, 1), size)
    assert np.abs(t.apply(x) - x @ m.T).max() < 1e-12
    assert np.abs(t.fold(x) - x @ m).max() < 1e-12


def test_only_even_magnitudes_where_it_says_so():
    for size in range(1, 300):
        flat = bool(np.ptp(np.abs(hd.matrix(size))) < 1e-12)
        assert flat == hd.order(size).hadamard, size
        assert ("no Hadamard" in hd.order(size).describe()) == (not flat)


def test_orders_without_a_matrix():
    for size in (0, -1, 4099, 2 * 4099):
        with pytest.raises(ValueError, match="order"):
            hd.order(size)


def test_signs():
    assert hd.signs(1, 4).tolist() == [-1, 1, 1, 1]
    assert np.array_equal(hd.signs(7, 1000)[:333], hd.signs(7, 333))
    assert np.array_equal(hd.signs(None, 5), np.ones(5)) and hd.signs(3, 0).shape == (0,)
    assert abs(int(hd.signs(5, 100_000).sum())) < 1500
    for wrong in (-1, (1 << 62) + 1):
        with pytest.raises(ValueError, match="seed"):
            hd.signs(wrong, 3)


@pytest.mark.parametrize(("width", "size", "inner"), [(24, 12, 1), (24, 4, 3), (24, 2, 12), (36, 9, 2), (48, 48, 1)])
@pytest.mark.parametrize("kind", ["hadamard/1", "matrix/1"])
def test_transforms_by_their_definition(width, size, inner, kind):
    rng = np.random.default_rng(1)
    m = rng.standard_normal((size, size)).astype(np.float32) if kind == "matrix/1" else None
    online = Online(kind, size, inner, None if m is not None else 11, "o" if m is not None else "")
    t = Transform(online, width, m)
    full = np.kron(np.kron(np.eye(width // (size * inner)), hd.matrix(size) if m is None else m), np.eye(inner))
    full = full * hd.signs(online.seed, width)
    x, w = rng.standard_normal((5, width)), rng.standard_normal((7, width))
    assert np.abs(t.apply(x) - x @ full.T).max() < 1e-12
    assert np.abs(t.fold(w) - w @ full).max() < 1e-12
    assert np.abs(t.absorb(w) - w @ np.linalg.inv(full)).max() < 1e-9
    assert np.abs(t.apply(x) @ t.absorb(w).T - x @ w.T).max() < 1e-9
    assert np.abs(t.fold(t.absorb(w)) - w).max() < 1e-9


def test_torch_and_half_precision():
    torch = pytest.importorskip("torch")
    t = Transform(Online("hadamard/1", 12, 2, 5), 48)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = t.apply(x)
    assert np.abs(y.detach().numpy() - t.apply(x.detach().numpy())).max() < 1e-6
    (y**2).sum().backward()
    assert torch.allclose(x.grad, 2 * x.detach(), atol=1e-5)  # orthogonal
    for kind in (torch.bfloat16, torch.float16):
        half = x.detach().to(kind)
        assert t.apply(half).dtype == kind
        assert (t.apply(half).float() - t.apply(half.float())).abs().max() < 0.02
    assert t.apply(x.detach().numpy().astype(np.float16)).dtype == np.float16


def test_what_does_not_fit():
    for kind, size, inner, m in (
        ("hadamard/1", 5, 1, None),
        ("hadamard/1", 4, 2, None),
        ("hadamard/1", 0, 1, None),
        ("matrix/1", 4, 1, None),
        ("matrix/1", 4, 1, np.eye(3)),
        ("hadamard/1", 4, 1, np.eye(4)),
    ):
        with pytest.raises(ValueError, match=r"divide|matrix"):
            Transform(Online(kind, size, inner), 12, m)
    with pytest.raises(ValueError, match="input of 13"):
        Transform(Online("hadamard/1", 4), 12).apply(np.zeros(13))


def test_import_without_torch():
    import subprocess

    code = "import sys, rac.linalg.hadamard, rac.linalg.transform; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
