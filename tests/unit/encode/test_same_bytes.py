"""A calibrated pack has the same bytes under any BLAS, number of threads, instruction set and mathematical library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[2]


def machines():
    """Settings of the environment under which numpy, its BLAS, libm and our kernels take other paths."""
    features = np._core._multiarray_umath
    found = [name for name in features.__cpu_dispatch__ if features.__cpu_features__[name]]
    yield {"OPENBLAS_NUM_THREADS": "1"}
    yield {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1", "RAC_CPU": "generic"}
    yield {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "2"}
    yield {"NPY_DISABLE_CPU_FEATURES": " ".join(found), "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F"}


def test_the_same_bytes_on_any_machine(tmp_path):
    command = [sys.executable, "-m", "support.calibrated"]
    running = [
        subprocess.Popen(
            [*command, str(tmp_path / f"{i}.rac")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), **machine},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, machine in enumerate(machines())
    ]
    found = [(one.communicate()[0], one.returncode) for one in running]
    assert found == [found[0]] * len(found)
    assert found[0][1] == 0 and found[0][0].count("\n") == 9
