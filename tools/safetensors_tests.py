"""safetensors' own Python tests, run against `rac.torch`, `rac.numpy` and `rac.safe_open`.

    python tools/safetensors_tests.py [safetensors-0.8.0.tar.gz]

Takes their source distribution, or lets pip download it, and runs its tests with a package `safetensors` in front of
the path that hands every public name to rac. What fails is compared with EXPECTED, which says of each test why it
does; the exit code is 0 where the two are equal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.8.0"
FILES = ("handle", "multithreaded", "pread_backend", "pt_comparison", "pt_model", "simple", "threadable")
"""Their tests for torch and numpy; rac has no modules for paddle, tensorflow, flax and mlx."""

REASONS = {
    "asserts or reads the bytes of a safetensors file": """
        test_pread_backend::PreadBackendTests::test_truncated_header_is_rejected
        test_pt_comparison::TorchTestCase::test_complex
        test_pt_comparison::TorchTestCase::test_in_memory
        test_pt_comparison::TorchTestCase::test_serialization
        test_pt_model::TorchModelTestCase::test_save
        test_simple::TestCase::test_deserialization
        test_simple::TestCase::test_deserialization_metadata
        test_simple::TestCase::test_serialization
        test_simple::TestCase::test_serialization_forces_alignment
        test_simple::TestCase::test_serialization_metadata
        test_simple::TestCase::test_serialization_no_big_endian
    """,
    "calls a private helper": """
        test_handle::ReadmeTestCase::test_numpy_example
        test_pt_model::TorchModelTestCase::test_end_ptr
        test_pt_model::TorchModelTestCase::test_is_complete
        test_pt_model::TorchModelTestCase::test_remove_duplicate_names
        test_simple::TestCase::test_pt_sf_save_model_overlapping_storage
    """,
    "calls TensorSpec and serialize, which take addresses of memory": """
        test_simple::ReadmeTestCase::test_exception
        test_threadable::TestCase::test_serialize_file_releases_gil
    """,
    "asserts the wording of a message": """
        test_pt_comparison::TorchTestCase::test_bogus
        test_pt_comparison::TorchTestCase::test_sparse
    """,
    "wants lists and ends of slices behind the last element refused, which rac gathers and clamps as Python does": """
        test_simple::ReadmeTestCase::test_numpy_slice
    """,
}
EXPECTED = {name: why for why, names in REASONS.items() for name in names.split()}
"""Tests that fail, as "file::class::test", and why."""

SHIMS = {
    "__init__": """
class SafetensorError(Exception):
    pass

import rac
from rac import safe_open

__version__ = "0.8.0"
_safe_open_handle = safe_open

def _not_offered(*args, **kwargs):
    raise NotImplementedError("rac has no such function")

TensorSpec = serialize = serialize_file = deserialize = _not_offered
""",
    "numpy": "from rac.numpy import load, load_file, save, save_file\n",
    "torch": """
from rac import torch as _ours
from rac.torch import load, load_file, load_model, save, save_file, save_model
from safetensors import _not_offered

def _find_shared_tensors(state):
    return [set(names) for names in _ours.shared(state)]

def _remove_duplicate_names(state):
    return {name: others for name, others in _ours.kept(state).items() if others}

storage_ptr = storage_size = _end_ptr = _is_complete = _not_offered
""",
}

BACKEND = """
import os

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "safetensors-{version}.dist-info"
    os.mkdir(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as f:
        f.write("Metadata-Version: 2.1\\nName: safetensors\\nVersion: {version}\\n")
    return name
"""
"""In place of maturin: pip asks for metadata of what it downloads, and theirs needs a Rust toolchain."""


def write_package(folder: Path, modules: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


def download(folder: Path) -> Path:
    write_package(folder / "maturin", {"__init__": BACKEND.format(version=VERSION)})
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    pip += ["--no-binary", "safetensors", "-d", str(folder), f"safetensors=={VERSION}"]
    subprocess.run(pip, check=True, env={**os.environ, "PYTHONPATH": str(folder)})
    return folder / f"safetensors-{VERSION}.tar.gz"


def run(sdist: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """Outcome and first line of the message of each test, by "file::class::test"."""
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    where = folder / sdist.name.removesuffix(".tar.gz") / "bindings" / "python"
    write_package(folder / "shims" / "safetensors", SHIMS)
    report = folder / "report.xml"
    tests = [f"tests/test_{name}.py" for name in FILES]
    pytest = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(where), "-p", "no:cacheprovider"]
    path = os.pathsep.join((str(folder / "shims"), str(ROOT / "codec")))
    env = {**os.environ, "PYTHONPATH": path}
    subprocess.run(
        [*pytest, f"--junitxml={report}", *tests], cwd=where, env=env, stdout=subprocess.DEVNULL, check=False
    )
    out = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file, _, kind = case.get("classname", "").removeprefix("tests.").partition(".")
        name = "::".join(filter(None, (file, kind, case.get("name"))))
        child = next(iter(case), None)
        message = "" if child is None else (child.get("message") or "").split("\n")[0]
        out[name] = ("passed" if child is None else child.tag, message)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", nargs="?", type=Path, help="their source distribution; downloaded by pip if not given")
    parser.add_argument("--verbose", action="store_true", help="print the message of every failure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = run(args.sdist or download(folder), folder)
    failed = {n: message for n, (outcome, message) in found.items() if outcome not in ("passed", "skipped")}
    skipped = sum(outcome == "skipped" for outcome, _ in found.values())
    for name, message in failed.items():
        why = EXPECTED.get(name, "NOT EXPECTED")
        print(f"{name}: {why}" + (f" ({message})" if args.verbose or name not in EXPECTED else ""))
    better = [n for n in EXPECTED if n not in failed]
    for name in better:
        print(f"{name}: passes, or is not there, and is listed as failing")
    passed = len(found) - len(failed) - skipped
    print(f"{len(found)} tests: {passed} passed, {skipped} skipped, {len(failed)} failed, {len(EXPECTED)} expected to")
    return int(failed.keys() != EXPECTED.keys())


if __name__ == "__main__":
    sys.exit(main())
