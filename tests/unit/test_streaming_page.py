"""The examples of docs/streaming.md, one after the other."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("torch")

PAGE = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text(encoding="utf-8")


def test_examples_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) == 5
    with warnings.catch_warnings():
        for code in examples:
            exec(compile(code, "docs/streaming.md", "exec"), names)
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["w (1024, 512)", "b (512,)"]
    assert out[2].startswith("CPU (")
