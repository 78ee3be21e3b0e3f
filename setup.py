"""Build the C kernels beside the package: one shared library of all C files for each instruction set.

They are plain C without the Python headers, loaded through ctypes (rac/native/library.py chooses). They are optional on
purpose: where no compiler is found the install succeeds, `rac` falls back to its numba kernel, and says so once.
"""

import platform
from glob import glob

from setuptools import Extension, setup

SOURCES = "codec/rac/native/src"
FLAGS = ["-O3", "-g0", "-fno-strict-aliasing", "-ffp-contract=off", "-funroll-loops"]
CPUS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):  # what src/layout.c asks the processor for
    CPUS["avx2"] = ["-mavx2", "-mbmi2", "-mpopcnt"]
    CPUS["avx512"] = [*CPUS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

setup(
    ext_modules=[
        Extension(
            f"rac.native._{cpu}",
            sorted(glob(f"{SOURCES}/*.c")),
            depends=sorted(glob(f"{SOURCES}/*.h")),
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for cpu, flags in CPUS.items()
    ]
)
