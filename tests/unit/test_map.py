"""docs/map.md and docs/add-a-stage.md name files and functions that are there, and every room has its line."""

from __future__ import annotations

import ast
import re

import pytest

from support import ROOT

CODEC = ROOT / "codec" / "rac"
PLACE = re.compile(r"`([\w/]+(?:\.py|\.c|\.h|/))(?::([\w.]+))?`")


def defined(path: str) -> set[str]:
    """Qualified names of the functions, classes and assigned names of a module."""
    out = set()
    for node in ast.parse((CODEC / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            out.add(node.name)
        if isinstance(node, ast.ClassDef):
            out |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out |= {t.id for t in targets if isinstance(t, ast.Name)}
    return out


@pytest.mark.parametrize("page", ["map.md", "add-a-stage.md"])
def test_what_a_page_names_is_there(page):
    places = PLACE.findall((ROOT / "docs" / page).read_text())
    assert len(places) > 20
    wrong = []
    for path, name in places:
        at = ROOT if path.startswith(("tests/", "tools/", "docs/", "format_spec/")) else CODEC
        if not (at / path).exists() or (name and name not in defined(path)):
            wrong.append(f"{path}:{name}")
    assert not wrong


def test_every_room_has_its_line():
    text = (ROOT / "docs" / "map.md").read_text()
    rooms = [p for p in CODEC.iterdir() if (p.is_dir() and p.name != "__pycache__") or p.suffix == ".py"]
    rooms += [p for p in (CODEC / "encode").iterdir() if p.is_dir() and p.name != "__pycache__"]
    names = {str(p.relative_to(CODEC)) + "/" * p.is_dir() for p in rooms} - {"__init__.py", "__main__.py"}
    assert not {n for n in names if f"`{n}`" not in text}
