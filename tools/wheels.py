"""Wheels for all platforms, made and checked on one machine; and a source distribution.

  python tools/wheels.py                       # all of them and the sdist, to dist/
  python tools/wheels.py win_arm64 -o wheels   # those whose platform has this in its name
  python tools/wheels.py --check dist/*.whl    # opens wheels that are there
  python tools/wheels.py --install             # that of this machine, in a fresh environment without a compiler; a demo

The C kernels are compiled by `zig cc` (ziglang, from PyPI), once for each instruction set of setup.py; they know
nothing of Python, so a wheel serves every Python of its platform. The same sources and the same version of zig give the
same bytes: names are sorted, times are SOURCE_DATE_EPOCH (else 1980), modes are fixed. What was compiled once from the
same sources is taken from build/wheels. A check opens the wheel, reads the libraries by lief (from PyPI), and says what
is wrong.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import hashlib
import io
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rac.native.prototypes import FUNCTIONS

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "wheels"
MOST = 2_000_000  # bytes of a wheel
BEGIN = 315_532_800  # 1980, before which zip knows nothing
GLIBC, MACOS = (2, 17), (11, 0)
MACHINES = {"x86_64": {"X86_64", "AMD64"}, "aarch64": {"AARCH64", "ARM64"}}
FLAGS = ["-shared", "-fPIC", "-s", "-DNDEBUG", "-fno-sanitize=all"]  # zig's own choice is a build for debugging
EXPORTS = {*FUNCTIONS, "rac_layout"}
OF_LINKER = {"__mh_dylib_header", "___dso_handle"}  # what zig's linker exports of every library for macOS
NEEDED = {
    "manylinux": {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"},
    "musllinux": {"libc.so"},
    "macosx": {"/usr/lib/libSystem.B.dylib"},
    "win": {"KERNEL32.dll"},  # and those of the universal C runtime, which are part of Windows
}
"""Libraries that kernels may need, by the first part of the platform."""
CALLED = {
    *("malloc", "calloc", "realloc", "free", "memcpy", "memmove", "memset", "memcmp", "bzero", "bcmp"),
    *("sqrt", "sqrtf", "frexp", "ldexp", "ldexpf", "rint", "rintf", "nearbyint", "nearbyintf", "floor", "floorf"),
    *("sysctlbyname", "memset_pattern16", "__bzero", "_availability_version_check", "dyld_stub_binder"),  # of macOS
    *("__memset_chk", "__memcpy_chk", "__memmove_chk"),  # the same, as headers of macOS call them
}
"""What kernels may call of the C library; not held to this on Windows, where its start code comes with a library."""


@dataclass(frozen=True)
class Platform:
    """What a wheel is made for."""

    tag: str
    target: str  # as zig calls it
    machine: str  # as setup.py calls it
    suffix: str = ".so"

    @property
    def kind(self) -> str:
        """The first part of the tag, without numbers."""
        return self.tag.partition("_")[0]


PLATFORMS = (
    Platform("manylinux_2_17_x86_64.manylinux2014_x86_64", "x86_64-linux-gnu.2.17", "x86_64"),
    Platform("manylinux_2_17_aarch64.manylinux2014_aarch64", "aarch64-linux-gnu.2.17", "aarch64"),
    Platform("musllinux_1_2_x86_64", "x86_64-linux-musl", "x86_64"),
    Platform("musllinux_1_2_aarch64", "aarch64-linux-musl", "aarch64"),
    Platform("macosx_11_0_x86_64", "x86_64-macos.11.0", "x86_64", ".dylib"),
    Platform("macosx_11_0_arm64", "aarch64-macos.11.0", "aarch64", ".dylib"),
    Platform("win_amd64", "x86_64-windows-gnu", "x86_64", ".dll"),
    Platform("win_arm64", "aarch64-windows-gnu", "aarch64", ".dll"),
)


def setup() -> SimpleNamespace:
    """What setup.py names: the flags of each instruction set, for one."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of setuptools, which replaces distutils
        return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def libraries(wanted: Sequence[Platform]) -> dict[str, dict[str, bytes]]:
    """For each platform's tag the libraries of its wheel, by their path in it; compiled where build/wheels has none."""
    cpus, flags, sources = setup().CPUS, setup().FLAGS, ROOT / setup().SOURCES
    zig = subprocess.run([sys.executable, "-m", "ziglang", "version"], capture_output=True, text=True, check=True)
    state = hashlib.sha256(zig.stdout.encode())
    for path in sorted(sources.iterdir()):
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    BUILT.mkdir(parents=True, exist_ok=True)
    names = "EXPORTS\n" + "".join(f" {name}{' DATA' * (name == 'rac_layout')}\n" for name in sorted(EXPORTS))

    def build(one: tuple[Platform, str]) -> bytes:
        at, cpu = one
        command = [*flags, *FLAGS, *cpus[at.machine][cpu], "-target", at.target]
        digest = hashlib.sha256("\0".join([state.hexdigest(), names, *command]).encode()).hexdigest()[:24]
        out = BUILT / f"{digest}{at.suffix}"
        if not out.exists():
            compile_to(out, f"_{cpu}{at.suffix}", command, sorted(map(str, sources.glob("*.c"))), names)
        return out.read_bytes()

    pairs = [(at, cpu) for at in wanted for cpu in cpus[at.machine]]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = dict(zip(pairs, pool.map(build, pairs), strict=True))
    return {
        at.tag: {f"rac/native/_{cpu}{at.suffix}": data for (of, cpu), data in found.items() if of == at}
        for at in wanted
    }


def compile_to(out: Path, name: str, command: Sequence[str], sources: Sequence[str], names: str) -> None:
    """Compile a library, which has `name` inside, to a file that appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        made, more = Path(folder, name), list[str]()
        if out.suffix == ".dll":  # without a list, everything that is not static is exported
            more = [str(Path(folder, "exports.def"))]
            Path(more[0]).write_text(names)
        if out.suffix == ".dylib":
            more = [f"-Wl,-install_name,@rpath/{name}"]
        zig = [sys.executable, "-m", "ziglang", "cc", *command, *sources, *more, "-lm", "-o", str(made)]
        done = subprocess.run(zig, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{done.stderr}")
        made.replace(out)


def plain() -> dict[str, bytes]:
    """Files of a wheel without libraries: packages with their data, and metadata."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "info").mkdir()
        run = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder / "lib")]
        subprocess.run([*run, "dist_info", "--output-dir", str(folder / "info")], cwd=ROOT, check=True)
        found = {}
        for part in ("lib", "info"):
            for path in (folder / part).rglob("*"):
                inside = path.relative_to(folder / part)
                if path.is_file() and not inside.parts[0].endswith(".egg-info"):
                    found[inside.as_posix()] = path.read_bytes()
        return found


def wheel(files: Mapping[str, bytes], at: Platform, out: Path) -> Path:
    """Write a wheel of these files; its path."""
    info = next(name.split("/")[0] for name in files if name.endswith(".dist-info/METADATA"))
    tags = "".join(f"Tag: py3-none-{one}\n" for one in at.tag.split("."))
    text = f"Wheel-Version: 1.0\nGenerator: rac tools/wheels.py\nRoot-Is-Purelib: false\n{tags}"
    files = {**files, f"{info}/WHEEL": text.encode()}
    record = f"{info}/RECORD"
    order = sorted(files, key=lambda name: (name.startswith(info), name))
    rows = [f"{name},sha256={sha256(files[name])},{len(files[name])}\n" for name in order]
    path = out / f"{info.removesuffix('.dist-info')}-py3-none-{at.tag}.whl"
    when = time.gmtime(max(int(os.environ.get("SOURCE_DATE_EPOCH", 0)), BEGIN))[:6]
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        files[record] = "".join([*rows, f"{record},,\n"]).encode()
        for name in [*order, record]:
            entry = zipfile.ZipInfo(name, when)
            entry.external_attr, entry.create_system, entry.compress_type = 0o100644 << 16, 3, zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name], compresslevel=9)
    return path


def sha256(data: bytes) -> str:
    """The digest as RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def make(wanted: Sequence[Platform], out: Path) -> list[Path]:
    """Write wheels for platforms; their paths."""
    files, built = plain(), libraries(wanted)
    return [wheel({**files, **built[at.tag]}, at, out) for at in wanted]


def sdist(out: Path) -> Path:
    """Write the source distribution; its path."""
    before = set(out.glob("*.tar.gz"))
    run = [sys.executable, "setup.py", "-q", "sdist", "--formats", "gztar", "--dist-dir", str(out)]
    subprocess.run(run, cwd=ROOT, check=True)
    path = max(set(out.glob("*.tar.gz")) - before or before, key=lambda path: path.stat().st_mtime)
    _leave_only_content(path)
    return path


def _leave_only_content(path: Path) -> None:
    """Write a .tar.gz anew, without owners, and with the time and the order that a wheel has."""
    when, out = max(int(os.environ.get("SOURCE_DATE_EPOCH", 0)), BEGIN), io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.mode, plain.mtime = member.type, 0o755 if member.isdir() else 0o644, when
            data = old.extractfile(member)
            content = b"" if data is None else data.read()
            plain.size = len(content)
            new.addfile(plain, io.BytesIO(content))
    path.write_bytes(gzip.compress(out.getvalue(), 9, mtime=when))


def wrong(path: Path) -> Iterator[str]:
    """What is wrong with a wheel, a line each."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
        if [e.filename for e in archive.infolist() if e.external_attr >> 16 != 0o100644]:
            yield "has files of other modes than 644"
    at = next((p for p in PLATFORMS if path.name.endswith(f"-py3-none-{p.tag}.whl")), None)
    if at is None:
        yield f"has a platform in its name that is not one of {', '.join(p.tag for p in PLATFORMS)}"
        return
    if path.stat().st_size > MOST:
        yield f"has {path.stat().st_size} bytes, more than {MOST}"
    yield from _contents(files, at)
    for name, data in files.items():
        if name.endswith((".so", ".dll", ".dylib")):
            yield from (f"{name}: {what}" for what in wrong_library(data, at))


def _contents(files: Mapping[str, bytes], at: Platform) -> Iterator[str]:
    info = next((name.split("/")[0] for name in files if name.endswith(".dist-info/METADATA")), "")
    libraries = {f"rac/native/_{cpu}{at.suffix}" for cpu in setup().CPUS[at.machine]}
    modules = {p.relative_to(ROOT / "codec").as_posix() for p in (ROOT / "codec" / "rac").rglob("*.py")}
    others = {"rac/py.typed", "rac/calibrate/texts/mix.txt.zst"}
    others |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    for name in sorted((libraries | modules | others) - files.keys()):
        yield f"lacks {name}"
    for name in sorted(files.keys() - libraries - modules - others):
        if not name.startswith(("rac/calibrate/texts/", f"{info}/")):
            yield f"holds {name}, which is no part of the package"
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(files.get(f"{info}/RECORD", b"").decode()))}
    stated = {name: [f"sha256={sha256(data)}", str(len(data))] for name, data in files.items()}
    stated[f"{info}/RECORD"] = ["", ""]
    if rows != stated:
        other = sorted(name for name in {*rows, *stated} if rows.get(name) != stated.get(name))
        yield f"has a RECORD that is not of its files: {other}"
    lines = files.get(f"{info}/WHEEL", b"").decode().splitlines()
    if [line for line in lines if line.startswith("Tag: ")] != [f"Tag: py3-none-{one}" for one in at.tag.split(".")]:
        yield "states other tags in WHEEL than in its name"
    for line in files.get(f"{info}/METADATA", b"").decode().splitlines():
        if line.startswith(("Requires-Dist: numba", "Requires-Dist: torch")) and "extra ==" not in line:
            yield f"has more than it needs in METADATA: {line}"


@dataclass(frozen=True)
class Seen:
    """What a library says of itself, whatever its format."""

    machine: str
    exports: set[str]
    needs: set[str]
    calls: set[str]
    asks: list[str]  # for versions of the system that its tag does not promise


def seen(data: bytes, at: Platform) -> Seen | None:
    """What is in a library; None where it is of another format than those of the platform."""
    import lief

    lief.logging.disable()
    found: Any = lief.parse(list(data))
    if at.suffix == ".so" and isinstance(found, lief.ELF.Binary):
        asked = [a.name for v in found.symbols_version_requirement for a in v.get_auxiliary_symbols()]
        newer = [str(a) for a in asked if at.kind == "musllinux" or glibc(str(a)) > GLIBC]
        exports = {str(one.name) for one in found.dynamic_symbols if one.exported}
        machine, needs = found.header.machine_type.name, set(map(str, found.libraries))
        return Seen(machine, exports, needs, {str(one.name) for one in found.imported_symbols}, newer)
    if at.suffix == ".dll" and isinstance(found, lief.PE.Binary):
        table = found.get_export()
        exports = {str(one.name) for one in table.entries} if table else set()
        return Seen(found.header.machine.name, exports, set(map(str, found.libraries)), set(), [])
    if at.suffix == ".dylib" and isinstance(found, lief.MachO.Binary):
        exports = {str(one.name) for one in found.exported_symbols} - OF_LINKER
        loads = lief.MachO.LoadCommand.TYPE.LOAD_DYLIB
        needs = {str(one.name) for one in found.libraries if one.command == loads}
        calls = {str(one.name).removeprefix("_") for one in found.imported_symbols}
        version: Any = found.build_version
        newer = [f"macOS {version.minos}"] if tuple(version.minos)[:2] > MACOS else []
        if at.machine == "aarch64" and not found.has_code_signature:
            newer.append("a Mac that runs what is not signed")
        return Seen(found.header.cpu_type.name, {e.removeprefix("_") for e in exports}, needs, calls, newer)
    return None


def glibc(version: str) -> tuple[int, ...]:
    """The numbers of a version of glibc's symbols."""
    return tuple(int(n) if n.isdecimal() else 99 for n in version.removeprefix("GLIBC_").split("."))


def wrong_library(data: bytes, at: Platform) -> Iterator[str]:
    """What is wrong with one library of kernels."""
    found = seen(data, at)
    if found is None:
        yield f"is no library of {at.tag}"
        return
    if found.machine not in MACHINES[at.machine]:
        yield f"is for {found.machine}"
    if strange := sorted(name for name in found.exports if not name.startswith("rac_")):
        yield f"exports {', '.join(strange)}"
    if lacking := sorted(EXPORTS - found.exports):
        yield f"does not export {', '.join(lacking)}"
    runtime = {n for n in found.needs if at.kind == "win" and n.startswith("api-ms-win-crt-")}
    if more := sorted(found.needs - NEEDED[at.kind] - runtime):
        yield f"needs {', '.join(more)}"
    if more := sorted(found.calls - CALLED):
        yield f"calls {', '.join(more)}"
    if found.asks:
        yield f"asks for {', '.join(found.asks)}"


def of_this_machine() -> Platform:
    """The platform of this Linux machine."""
    return next(p for p in PLATFORMS if p.kind == "manylinux" and p.machine == platform.machine())


DEMO = """
import numpy, pathlib
from rac import native
from rac.cli import main
assert native.kernel().startswith("C"), native.kernel()
numpy.save("w.npy", numpy.random.default_rng(1).standard_normal((500, 700)).astype("f4"))
for line in (
    "pack w.npy -o w.rac", "verify w.rac --against w.npy", "unpack w.rac -o out.npy",
    "pack w.npy -o small.rac --bits 4 -q", "--version --verbose",
):
    assert main(line.split()) == 0, line
assert pathlib.Path("w.npy").read_bytes() == pathlib.Path("out.npy").read_bytes()
assert pathlib.Path("small.rac").stat().st_size < 0.14 * pathlib.Path("w.npy").stat().st_size
"""
TIMED = (
    "import time; t = time.perf_counter(); import rac; print(f'import rac: {1000 * (time.perf_counter() - t):.1f} ms')"
)


def install(path: Path) -> None:
    """Install a wheel in a fresh environment with no compiler on the PATH; say size and time, and run a demo."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "v")], check=True)
        python, env = str(folder / "v" / "bin" / "python"), {"PATH": "", "HOME": name}
        env |= _settings("PIP_", "SSL_", "HTTP", "http")
        site = next((folder / "v" / "lib").glob("*/site-packages"))
        before, there, start = _size(site), set(site.glob("*.dist-info")), time.monotonic()
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-cache-dir", str(path)], check=True, env=env)
        seconds = time.monotonic() - start
        print(f"installed in {seconds:.1f} s, {(_size(site) - before) / 1e6:.1f} MB with what it requires:")
        new = {*site.glob("*.dist-info")} - there
        for size, package in sorted((_listed(info), info.name) for info in new)[::-1]:
            print(f"  {size / 1e6:6.1f} MB  {package.removesuffix('.dist-info')}")
        subprocess.run([python, "-W", "error", "-c", DEMO], check=True, env=env, cwd=name)
        subprocess.run([python, "-c", TIMED], check=True, env=env)
        shutil.rmtree(folder / "v")


def _settings(*beginnings: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith(beginnings)}


def _listed(info: Path) -> int:
    """Bytes of the files of a package, as its RECORD lists them."""
    rows = csv.reader((info / "RECORD").read_text().splitlines())
    return sum(p.stat().st_size for p in (info.parent / row[0] for row in rows) if p.is_file())


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def main() -> None:
    """Make, check, install."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("platforms", nargs="*", help="parts of names of platforms; with --check: files")
    p.add_argument("-o", "--out", type=Path, default=ROOT / "dist")
    p.add_argument("--check", action="store_true")
    p.add_argument("--install", action="store_true")
    args = p.parse_args()
    if args.check:
        paths = [Path(name) for name in args.platforms]
    elif args.install:
        paths = make([of_this_machine()], args.out)
    else:
        wanted = [at for at in PLATFORMS if not args.platforms or any(name in at.tag for name in args.platforms)]
        paths = make(wanted, args.out)
        if not args.platforms:
            source = sdist(args.out)
            print(f"{source.name}: {source.stat().st_size:,} bytes")
    bad = 0
    for path in paths:
        faults = list(wrong(path))
        bad += len(faults)
        print(f"{path.name}: {path.stat().st_size:,} bytes, {'as it should be' if not faults else '; '.join(faults)}")
    if args.install:
        install(paths[0])
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
