"""Build the C kernels beside the package: every C file of codec/rac/native, one shared library.

It is plain C without the Python headers, loaded through ctypes. It is optional on purpose: where no compiler
is found the install succeeds, `rac` falls back to its numba kernel, and says so once.
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "rac.native._kernels",
            sorted(glob("codec/rac/native/*.c")),
            depends=sorted(glob("codec/rac/native/*.h")),
            extra_compile_args=["-O3", "-fno-strict-aliasing", "-ffp-contract=off", "-funroll-loops"],
            optional=True,
        )
    ]
)
