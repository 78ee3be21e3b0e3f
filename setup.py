"""Build the C kernels beside the package: one shared library of all C files for each instruction set.

They are plain C without the Python headers, loaded through ctypes (rac/native/library.py chooses), and know nothing of
Python's ABI: a wheel serves every Python of its platform. They are optional on purpose: where no compiler is found the
install succeeds, `rac` falls back to numba or numpy, and says so once. Wheels for other machines: tools/wheels.py.
"""

import os
import platform
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "codec/rac/native/src"
FLAGS = ["-O3", "-g0", "-fno-strict-aliasing", "-ffp-contract=off", "-funroll-loops"]
AVX2 = ["-mavx2", "-mbmi2", "-mpopcnt"]
# What src/layout.c asks the processor for. NEON is in every aarch64: -DRAC_GENERIC leaves out what is written for it.
CPUS = {
    "x86_64": {
        "generic": [],
        "avx2": AVX2,
        "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    },
    "aarch64": {"generic": ["-DRAC_GENERIC"], "neon": []},
}
SUFFIXES = {"win32": ".dll", "darwin": ".dylib"}  # of libraries, as rac/native/library.py looks for them; others: .so
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}


class Build(build_ext):
    """Libraries whose names do not change with Python's ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of a library below the folder of packages."""
        return os.path.join(*fullname.split(".")) + SUFFIXES.get(sys.platform, ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Nothing beside what the compiler exports: no module is in it."""
        return list(ext.export_symbols)


class Wheel(bdist_wheel):
    """A wheel for each platform, and for every Python on it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    """A library for each instruction set of this machine's architecture."""
    machine = platform.machine().lower()
    return [
        Extension(
            f"rac.native._{cpu}",
            sorted(glob(f"{SOURCES}/*.c")),
            depends=sorted(glob(f"{SOURCES}/*.h")),
            extra_compile_args=[*FLAGS, *flags],
            libraries=[] if sys.platform == "win32" else ["m"],
            optional=True,
        )
        for cpu, flags in CPUS.get(MACHINE.get(machine, machine), {"generic": []}).items()
    ]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
