"""Runs tests of tests/interpreted that standard input names, a line each; answers with lines of [outcome, text]."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

import pytest
from _pytest.runner import runtestprotocol

from support import ROOT


def quicken() -> None:
    """Take out two thirds of the interpreter's time, in which it does nothing.

    It exchanges the functions of triton.language around every call of a kernel; here they stay exchanged, as
    nothing compiles in this process. And it computes whether integers overflow for an assertion that is never made.
    """
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch, stays, known = interpreter._patch_lang, interpreter._LangPatchScope(), set()

    def patch_once(fn: Any) -> Any:
        if fn.__module__ not in known:
            known.add(fn.__module__)
            patch(fn)
        return stays

    interpreter._patch_lang = patch_once
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


class Served:
    """A plugin of pytest: the tests that are asked for instead of all."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run until standard input ends."""
        items = {item.nodeid: item for item in session.items}
        for line in sys.__stdin__:
            reports = runtestprotocol(items[line.rstrip("\n")], log=False, nextitem=None)
            worst = next((r for r in reports if not r.passed), reports[-1])
            print(json.dumps([worst.outcome, worst.longreprtext]), file=self._answers, flush=True)
        return True


def main() -> int:
    """Serve with an own standard output: that of pytest goes nowhere."""
    quicken()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    options = ["-p", "no:cacheprovider", "-m", "", "-W", "ignore", "--capture=no"]
    return pytest.main([*options, str(ROOT / "tests" / "interpreted")], plugins=[Served(answers)])


if __name__ == "__main__":
    sys.exit(main())
