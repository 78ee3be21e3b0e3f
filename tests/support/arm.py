"""Kernels for aarch64 on a machine that is none: compiled across, and run in this process by an emulator.

The emulator is unicorn, qemu's translator as a library. It sees the memory of this process where it lies, so kernels
are called with the same pointers as those of the machine; what they call of a C library, the machine's own does. The
instructions that they execute can be counted.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import mmap
import runpy
import shutil
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_double, c_float, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from rac import native
from rac.native.library import Library
from rac.native.prototypes import FUNCTIONS, layout

SimpleData = c_int.__base__
SOURCES = Path(native.__file__).parent / "src"
ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "arm"
_SETUP = runpy.run_path(str(ROOT / "setup.py"))
FLAGS = [*_SETUP["FLAGS"], "-fPIC", "-shared"]
BUILDS = {
    "aarch64": ("aarch64-linux-musl", _SETUP["CPUS"]["aarch64"]["generic"]),
    "neon": ("aarch64-linux-musl", _SETUP["CPUS"]["aarch64"]["neon"]),
    "avx2": ("x86_64-linux-gnu", _SETUP["CPUS"]["x86_64"]["avx2"]),
    "avx512": ("x86_64-linux-gnu", _SETUP["CPUS"]["x86_64"]["avx512"]),
}
"""Target and flags; those of x86-64 are there to be compared with, compiled by the same compiler."""
CPUS = ("aarch64", "neon")
"""What is compiled for aarch64: what is written for no instruction set, and what is written for NEON."""


@functools.cache
def compiler(target: str = "aarch64-linux-musl") -> list[str] | None:
    """The command of a compiler: the one from PyPI, as of wheels, else that of the system for aarch64, else None."""
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", target]
    found = shutil.which("aarch64-linux-gnu-gcc")
    return [found] if found and target.startswith("aarch64") else None


def missing() -> str | None:
    """Why kernels for aarch64 cannot be run here; None where they can."""
    if not sys.platform.startswith("linux") or not importlib.util.find_spec("unicorn"):
        return "no emulator of aarch64 here: pip install unicorn"
    return None if compiler() else "no compiler for aarch64 here: pip install ziglang"


def command(cpu: str) -> list[str]:
    """How one of BUILDS is compiled."""
    target, flags = BUILDS[cpu]
    return [*(compiler(target) or []), *FLAGS, *flags, "-Wl,--hash-style=sysv"]


def place(cpu: str) -> Path:
    """Where the library of one of BUILDS belongs, by what is compiled and how."""
    digest = hashlib.sha256("\0".join(command(cpu)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return BUILT / f"{cpu}-{digest.hexdigest()[:16]}.so"


def built(cpu: str) -> Path:
    """The library of one of BUILDS, compiled where it was not yet from these sources."""
    out = place(cpu)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_suffix(".lock")):
        if not out.exists():
            half = out.with_suffix(".half")
            sources = sorted(str(path) for path in SOURCES.glob("*.c"))
            done = subprocess.run([*command(cpu), *sources, "-lm", "-o", str(half)], capture_output=True, text=True)
            assert not done.returncode, done.stderr
            half.rename(out)
    return out


HOST: dict[str, tuple[Any, ...]] = {
    "malloc": (c_void_p, c_size_t),
    "calloc": (c_void_p, c_size_t, c_size_t),
    "realloc": (c_void_p, c_void_p, c_size_t),
    "free": (None, c_void_p),
    "memcpy": (c_void_p, c_void_p, c_void_p, c_size_t),
    "memmove": (c_void_p, c_void_p, c_void_p, c_size_t),
    "memset": (c_void_p, c_void_p, c_int, c_size_t),
    "memcmp": (c_int, c_void_p, c_void_p, c_size_t),
    "bcmp": (c_int, c_void_p, c_void_p, c_size_t),
    "frexp": (c_double, c_double, c_void_p),
    "ldexp": (c_double, c_double, c_int),
    "ldexpf": (c_float, c_float, c_int),
    "floor": (c_double, c_double),
    "floorf": (c_float, c_float),
    "sqrt": (c_double, c_double),
    "sqrtf": (c_float, c_float),
}
"""What kernels may call of a C library, exact in each: result and arguments."""


class Image:
    """A shared library for aarch64 in memory: its segments, with addresses put in, and where its symbols are."""

    def __init__(self, path: Path) -> None:
        """Load and relocate; `calls` are the functions it wants, each a word of code that stops the emulator."""
        data = path.read_bytes()
        at, n = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
        heads = [struct.unpack_from("<IIQQQQQQ", data, at + 56 * i) for i in range(n)]
        size = max(virtual + inside for kind, _, _, virtual, _, _, inside, _ in heads if kind == 1)
        self.memory = mmap.mmap(-1, size + 4096)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.stubs = self.base + (size + 15) // 16 * 16
        for kind, _, offset, virtual, _, length, _, _ in heads:
            if kind == 1:
                self.memory[virtual : virtual + length] = data[offset : offset + length]
            elif kind == 2:
                self.dynamic = dict(struct.iter_unpack("<QQ", data[offset : offset + length]))
        self.calls: list[str] = []
        self.symbols = dict(self._symbol(i) for i in range(self._u32(self.dynamic[4] + 4)))
        self._relocate()

    def _u32(self, at: int) -> int:
        return int.from_bytes(self.memory[at : at + 4], "little")

    def _symbol(self, number: int) -> tuple[str, int]:
        """Name and address; of what is not there, that of a call out of the emulator."""
        name_at, _, section, value, _ = struct.unpack_from("<IHHQQ", self.memory, self.dynamic[6] + 24 * number)
        at = self.dynamic[5] + name_at
        name = self.memory[at : self.memory.find(b"\0", at)].decode()
        if section or not name:
            return name, self.base + value
        assert name in HOST, f"a kernel calls {name}, which tests/support/arm.py does not know"
        self.calls.append(name)
        stub = self.stubs + 8 * len(self.calls)  # svc; ret
        struct.pack_into("<II", self.memory, stub - self.base, 0xD4000001, 0xD65F03C0)
        return name, stub

    def _relocate(self) -> None:
        addresses = list(self.symbols.values())
        for table, size in ((7, 8), (23, 2)):
            start = self.dynamic.get(table, 0)
            entries = self.memory[start : start + self.dynamic.get(size, 0)]
            for where, info, addend in struct.iter_unpack("<QQq", entries):
                kind, symbol = info & 0xFFFFFFFF, info >> 32
                assert kind in (257, 1025, 1026, 1027), f"relocation {kind} is not known here"
                value = (self.base if kind == 1027 else addresses[symbol]) + addend
                struct.pack_into("<Q", self.memory, where, value)


class Indirect(Library):
    """The functions of a library, called by `_run`: arguments as whole numbers in, what they return out."""

    def __init__(self, cpu: str) -> None:
        self.cpu, self.counts = cpu, Counter[str]()
        for name, (result, *arguments) in FUNCTIONS.items():
            setattr(self, name, self._function(name, result, arguments))

    def _run(self, name: str, values: list[int]) -> int:
        raise NotImplementedError

    def _function(self, name: str, result: Any, kinds: list[Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            assert len(given) == len(kinds)
            kept = [as_argument(kind, a) for kind, a in zip(kinds, given, strict=True)]  # alive until the end
            out = self._run(name, [address(a) for a in kept])
            return None if result is None else result(out).value

        return call


class Emulated(Indirect):
    """The functions of a library for aarch64, as `Library` has those of one of this machine; one call at a time."""

    def __init__(self, path: Path) -> None:
        import unicorn
        from unicorn import arm64_const as arm

        self.path, self.image, self._lock = path, Image(path), threading.Lock()
        self._total = 0
        self._arm, self._stack = arm, mmap.mmap(-1, 1 << 23)
        self._top = ctypes.addressof(ctypes.c_char.from_buffer(self._stack)) + (1 << 23) - 4096
        libm = ctypes.CDLL("libm.so.6")  # with all of libc
        self._host = {name: ctypes.CFUNCTYPE(*HOST[name])((name, libm)) for name in self.image.calls}
        self._uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._uc.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        self._uc.mem_map_ptr(4096, (1 << 47) - 8192, unicorn.UC_PROT_ALL, 4096)  # all that a process has, where it is
        self._uc.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors may be used
        self._uc.hook_add(unicorn.UC_HOOK_INTR, self._outside)
        ours = layout()
        theirs = (ctypes.c_int64 * len(ours)).from_address(self.image.symbols["rac_layout"])
        assert [number for _, number in ours] == list(theirs)
        super().__init__(path.stem.partition("-")[0])

    def _run(self, name: str, values: list[int]) -> int:
        arm, uc = self._arm, self._uc
        with self._lock:
            for i, value in enumerate(values[:8]):
                uc.reg_write(arm.UC_ARM64_REG_X0 + i, value)
            more = values[8:]
            top = self._top - (8 * len(more) + 15) // 16 * 16
            for i, value in enumerate(more):
                ctypes.c_uint64.from_address(top + 8 * i).value = value
            uc.reg_write(arm.UC_ARM64_REG_SP, top)
            uc.reg_write(arm.UC_ARM64_REG_LR, self.image.stubs)
            self._total = 0
            uc.emu_start(self.image.symbols[name], self.image.stubs)
            self.counts[name] += self._total
            return int(uc.reg_read(arm.UC_ARM64_REG_X0))

    def _outside(self, uc: Any, kind: int, _: Any) -> None:
        """A call of the C library: the machine's own runs, as the emulator's memory is the machine's."""
        arm = self._arm
        assert kind == 2, f"exception {kind} at {uc.reg_read(arm.UC_ARM64_REG_PC) - self.image.base:#x} of {self.path}"
        name = self.image.calls[(uc.reg_read(arm.UC_ARM64_REG_PC) - 4 - self.image.stubs) // 8 - 1]
        result, *kinds = HOST[name]
        given: list[Any] = []
        for kind in kinds:
            if kind in (c_double, c_float):
                bits = uc.reg_read(arm.UC_ARM64_REG_D0 + sum(isinstance(a, float) for a in given))
                given.append(kind.from_buffer_copy(bits.to_bytes(8, "little")).value)
            else:
                x = arm.UC_ARM64_REG_X0 + sum(not isinstance(a, float) for a in given)
                given.append(kind(uc.reg_read(x)).value)
        out = self._host[name](*given)
        if result in (c_double, c_float):
            uc.reg_write(arm.UC_ARM64_REG_D0, int.from_bytes(bytes(result(out)), "little"))
        elif result is not None:
            uc.reg_write(arm.UC_ARM64_REG_X0, (out or 0) & (1 << 64) - 1)

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Instructions of each function that is called in the block; a call of the C library is a few."""
        import unicorn

        def block(_: Any, at: int, size: int, __: Any) -> None:
            self._total += size >> 2

        self.counts = Counter()
        hook = self._uc.hook_add(unicorn.UC_HOOK_BLOCK, block)
        self._uc.ctl_flush_tb()  # what is translated already has no hooks in it
        try:
            yield self.counts
        finally:
            self._uc.hook_del(hook)
            self._uc.ctl_flush_tb()


def as_argument(kind: Any, given: Any) -> Any:
    """A whole number, or what ctypes makes of a pointer."""
    return int(given) if issubclass(kind, SimpleData) and kind is not c_void_p else kind.from_param(given)


def address(argument: Any) -> int:
    """What a register holds of an argument."""
    if isinstance(argument, bytes):
        argument = ctypes.c_char_p(argument)
    if not isinstance(argument, int):
        argument = 0 if argument is None else ctypes.cast(argument, c_void_p).value or 0
    return argument & (1 << 64) - 1


@functools.cache
def library(cpu: str) -> Emulated:
    """The kernels of one of CPUS in the emulator; skips the test where `missing`."""
    if why := missing():
        pytest.skip(why)
    return Emulated(built(cpu))
