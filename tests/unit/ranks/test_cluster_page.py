"""The examples of docs/cluster.md, one after the other, as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from support import ROOT

BLOCKS = re.findall(
    r"^```(python|sh)\n(.*?)^```$", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE | re.DOTALL
)


def test_the_page_has_its_ways():
    assert [kind for kind, _ in BLOCKS] == ["python", "sh", "sh", "sh", "sh", "sh", "sh", "python"]
    assert sum("cmp " in code for _, code in BLOCKS) == 4


@pytest.mark.slow  # some twenty processes and a cluster of Ray: pytest -m slow tests/unit/ranks
def test_examples_of_the_page(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, run in (("rac", f"{sys.executable} -m rac.cli"), ("python", sys.executable)):
        (commands / name).write_text(f'#!/bin/bash\nexec {run} "$@"\n')
        (commands / name).chmod(0o755)
    env = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "codec")}
    env |= {"RAY_AUTH_MODE": "disabled"}  # or it would write a token into the home folder
    for kind, code in BLOCKS:
        if "launch ray" in code and not find_spec("ray"):
            continue
        argv = ["bash", "-euc", code] if kind == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
