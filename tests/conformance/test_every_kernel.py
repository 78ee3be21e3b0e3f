"""The golden files under every set of kernels, those of aarch64 in an emulator; test_golden.py has them without any."""

from __future__ import annotations

import pytest

from support import kernels, readers

MANIFEST = readers.manifest()


@pytest.mark.parametrize("cpu", kernels.CPUS)
def test_good(cpu):
    wrong = []
    with kernels.using(cpu):
        for name, entry in MANIFEST["good"].items():
            data = (readers.GOLDEN / "good" / name).read_bytes()
            for reader in ("rac_random", "rac_slices"):
                wrong += [f"{name}: {reader}: {d}" for d in readers.differences(readers.READERS[reader](data), entry)]
    assert wrong == []


@pytest.mark.parametrize("cpu", kernels.CPUS)
def test_refused(cpu):
    wrong = []
    with kernels.using(cpu):
        for kind in ("bad", "unsupported"):
            for name, entry in MANIFEST[kind].items():
                data = (readers.GOLDEN / kind / name).read_bytes()
                wrong += [f"{name}: {w}" for w in readers.wrong_refusals(entry, data, ("rac_random", "rac_forward"))]
    assert wrong == []
