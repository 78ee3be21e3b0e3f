"""docs/loading.md: every block runs, in order, on a small random model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from rac.cli import main
from rac.encode.pack import pack
from support import models

PAGE = Path(__file__).parents[3] / "docs" / "loading.md"


@pytest.mark.filterwarnings("ignore")
def test_every_block(tmp_path, monkeypatch, capsys):
    models.write("llama", tmp_path / "smollm2")
    pack(tmp_path / "smollm2", tmp_path / "smollm2.rac")
    pack(tmp_path / "smollm2", tmp_path / "smollm2-3bit.rac", bits=4, effort="fast", calibrate="none")
    (tmp_path / "test.txt").write_text(models.TEXT * 4)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(python|console)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["python"] * 5 + ["console", "python", "console"]
    names: dict[str, object] = {}
    printed = []
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        else:
            for line in re.findall(r"^\$ rac (.*)$", text, re.MULTILINE):
                assert main(shlex.split(line)) == 0, line
        printed.append(capsys.readouterr().out)
    assert [word in printed[i] for i, word in ((1, "True"), (2, "True"), (4, "True"), (6, "True"))] == [True] * 4
    assert printed[7].count("perplexity") == 2
