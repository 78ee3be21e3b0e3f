"""The rows of GPU kernels against the kernels themselves; the tables of stages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rac.errors import LimitError
from rac.gpu import stages
from rac.gpu.layout import GRID, Batch, Call
from rac.gpu.specs import KERNELS, MEMORIES, constants, kernel
from rac.stages.table import CODERS, NUMBERS, PRODUCTS
from support import ROOT

FOLDER = ROOT / "codec" / "rac" / "gpu" / "kernels"


def source(name: str) -> str:
    """The kernel's file without what is written about it."""
    return re.sub(r'"""[\s\S]*?"""|#.*', "", (FOLDER / f"{name}.py").read_text())


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_reads_every_field_of_its_jobs_and_no_other(name: str) -> None:
    """But for the one by which the host sorts them."""
    fields = {*KERNELS[name].job.names, "size"} - {KERNELS[name].longest}
    assert set(re.findall(r"\bJOB\.(\w+)", source(name))) == fields


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_knows_the_options_of_its_row(name: str) -> None:
    assert set(re.findall(r"\bFORM\.(\w+)", source(name))) == set(KERNELS[name].options.split())


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_the_memories_of_its_row(name: str) -> None:
    pytest.importorskip("triton")
    assert (*KERNELS[name].memories, "jobs", "JOB", "FORM") == tuple(kernel(name).arg_names)
    assert set(KERNELS[name].memories) <= set(MEMORIES)


def test_every_kernel_has_a_row() -> None:
    assert {p.stem for p in FOLDER.glob("*.py")} - {"__init__", "common"} == KERNELS.keys()


def test_places_of_fields() -> None:
    form = dict.fromkeys(KERNELS["place"].options.split(), 1)
    job = constants("place", tuple(form.items()))["JOB"]
    assert (job.rows, job.w, job.planes, job.size) == (0, 7, 8, 14)
    with pytest.raises(TypeError):
        constants("tables", (("BLOCKS", 1),))


def test_jobs_have_all_fields_and_fill_programs() -> None:
    batch = Batch()
    call = Call("outliers", (("WORD", 2), ("BLOCK", 128)))
    with pytest.raises(TypeError, match="place, word"):
        batch.add(call, place=1)
    batch.add(call, place=np.arange(200), word=np.arange(200) + 7)
    (launch,) = batch.seal()
    jobs = batch.buffer[launch.jobs : launch.jobs + launch.size].view(KERNELS["outliers"].job)
    assert launch.grid == (2, 1)
    assert jobs["word"].tolist() == [*range(7, 207), *[206] * 56]


def test_a_grid_has_an_end() -> None:
    batch = Batch()
    fields = dict.fromkeys(KERNELS["product"].job.names, 0) | {"h": 16 * (GRID + 1), "w": 32}
    options = (("WORD", 2), ("HALF", False), ("ADDED", True), ("ROWS", 16), ("COLS", 32))
    batch.add(Call("product", options), **fields)
    with pytest.raises(LimitError, match="65536 parts"):
        batch.seal()


def test_every_stage_is_laid_out() -> None:
    assert stages.CODERS.keys() == CODERS.keys()
    assert stages.NUMBERS.keys() == NUMBERS.keys()
    assert stages.PRODUCTS.keys() == PRODUCTS.keys()


def test_rows_and_layouts_need_no_triton() -> None:
    code = "import sys, rac.gpu.specs, rac.gpu.stages; sys.exit(bool({'triton', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(ROOT)).returncode == 0
