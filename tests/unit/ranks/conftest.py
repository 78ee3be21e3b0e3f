"""A model of matrices, what is asked of packs of it, and the pack of one process."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

import rac


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("ranks") / "m.safetensors"
    save_file({f"w{i}": (rng.standard_normal((130 + i, 128)) * 0.02).astype(np.float32) for i in range(6)}, path)
    return path


@pytest.fixture(scope="module")
def alone(model):
    rac.pack(model, model.with_name("alone.rac"), bits=3.0, calibrate="none", effort="fast")
    return model.with_name("alone.rac").read_bytes()
