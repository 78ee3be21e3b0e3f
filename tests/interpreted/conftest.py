"""Tests of this folder are chosen and reported like any other, and run by a process in which triton interprets.

TRITON_INTERPRET=1 has to be set before triton is imported. So a process of pytest has one child (support/interpreter),
to which it sends the name of a test, and which answers what became of it. With the variable set they run as they are.
"""

import json
import os
import subprocess
import sys

import pytest

from support import ROOT, environment

HERE = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    if HERE:
        yield None
        return
    command = [sys.executable, "-m", "support.interpreter"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(TRITON_INTERPRET="1"), **pipes) as process:
        yield process


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if HERE:
        return None
    process = pyfuncitem.funcargs["interpreter"]
    print(pyfuncitem.nodeid, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        pytest.fail(f"the interpreting process ended with {process.wait()}", pytrace=False)
    outcome, text = json.loads(answer)
    if outcome != "passed":
        (pytest.skip if outcome == "skipped" else pytest.fail)(text)
    return True
