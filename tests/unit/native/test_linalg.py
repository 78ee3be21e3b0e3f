"""The Cholesky kernel: its twin's bits, and a factor."""

from __future__ import annotations

import numpy as np
import pytest

from rac import native
from rac.native.product import cholesky
from support import kernels


def definite(n, seed=0):
    x = np.random.default_rng(seed).standard_normal((n + 3, n)) * np.geomspace(1, 1e3, n)
    return x.T @ x


@pytest.mark.parametrize("n", [1, 2, 5, 63, 64, 65, 97, 161, 200, 330])
def test_the_kernel_has_the_bits_of_its_twin(n):
    a = definite(n, n)
    found = cholesky(a)
    with native.using(None):
        assert np.array_equal(found, cholesky(a))
    assert np.allclose(found, np.linalg.cholesky(a), rtol=1e-9, atol=1e-9)
    assert not np.triu(found, 1).any()


def test_only_the_lower_triangle_is_read_and_nothing_is_changed():
    a = definite(70)
    half = np.asfortranarray(np.tril(a) + np.triu(np.full((70, 70), np.nan), 1))
    before = half.copy()
    assert np.array_equal(cholesky(half), cholesky(a))
    assert np.array_equal(half, before, equal_nan=True)


@pytest.mark.parametrize("cpu", kernels.ALL)
@pytest.mark.parametrize("at", [0, 3, 64, 99])
def test_a_matrix_that_has_no_factor_is_refused(at, cpu):
    for value in (-1.0, 0.0, np.nan):
        a = np.eye(100)
        a[at, at] = value
        with kernels.using(cpu), pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
            cholesky(a)
