"""All implementations of the kernels that a test can run: those of this machine, of aarch64, and the twins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rac import native
from rac.native import library
from support import arm

ARM = tuple(cpu for cpu in arm.CPUS if cpu not in native.cpus())
"""What runs in the emulator here: `arm.CPUS`, but for what the machine itself has."""
NAMES = (*native.cpus(), *ARM)
"""Every set of C kernels, `generic` first."""
CPUS = [
    pytest.param(cpu, marks=pytest.mark.skipif(cpu in ARM and bool(arm.missing()), reason=str(arm.missing())))
    for cpu in NAMES
]
"""NAMES as parameters of tests, those that cannot run here marked so."""
ALL = [*CPUS, pytest.param(None, id="numpy")]
"""The same, and the twins in numpy and numba."""


def here() -> tuple[str, ...]:
    """Those of NAMES that can run here: for tests that compare all of them with each other."""
    return native.cpus() if arm.missing() else NAMES


@contextmanager
def using(cpu: str | None) -> Iterator[None]:
    """One of NAMES, or the twins (None), in all threads until the end of the block."""
    if cpu not in ARM:
        with native.using(cpu):
            yield
        return
    library._instead.append(arm.library(cpu))
    try:
        yield
    finally:
        library._instead.pop()
