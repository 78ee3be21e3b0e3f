"""Build the C kernel beside the package.

It is plain C without the Python headers, loaded through ctypes. It is optional on purpose: where no compiler
is found the install succeeds, `rac` falls back to its numba kernel, and says so once.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "rac.native._kernels",
            ["codec/rac/native/kernels.c"],
            extra_compile_args=["-O3", "-fno-strict-aliasing", "-funroll-loops"],
            optional=True,
        )
    ]
)
