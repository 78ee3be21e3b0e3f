"""Exact sizes are facts: sizes.csv states them, and whatever the pages say of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import picture
import sizes

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
ROWS = {(row.name, row.options): row for row in sizes.rows()}
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row.by == "test"], ids=" ".join)
def test_a_size_changes_only_with_its_row(key, tmp_path):
    row = ROWS[key]
    if row.name in sizes.MODELS and not (sizes.DEMO / sizes.MODELS[row.name]).exists():
        pytest.skip("python tools/demo.py --fetch-only brings the model")
    assert sizes.measure(row, tmp_path) == row, "python tools/sizes.py --write, and say why in CHANGELOG.md"


def test_every_row_is_checked_by_somebody():
    assert len(ROWS) == len(sizes.rows())
    assert {row.by for row in ROWS.values()} == {"test", "tool"}
    assert {row.name for row in ROWS.values() if row.by == "test"} == {
        "MiniLM BF16",
        "MiniLM F32",
        "MiniLM folder",
        "golden inputs",
        "made weights",
    }


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("MiniLM BF16", "--level max", 0.656),
        ("MiniLM BF16", "--level default --slices coarse", 0.662),
        ("MiniLM BF16", "--level default", 0.6635),
    ],
)
def test_targets(name, options, most):
    assert ROWS[name, options].bytes <= most * ROWS[name, options].raw


def tables(text):
    """(header, cells) of each row of each Markdown table."""
    header = None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if header is None:
            header = cells
        elif not set(line) <= set("|-: "):
            yield header, cells


def options_of(cells):
    """The options that a row is about: in a cell of its own, or in the name that tools/bench_lossless.py gives."""
    for cell in (c.strip("`") for c in cells):
        if cell.startswith("--"):
            return cell
        if found := re.fullmatch(r"rac-(fast|default|max)(?:-(fine|coarse))?", cell):
            return f"--level {found[1]}" + (f" --slices {found[2]}" if found[2] else "")
    return None


def stated(page):
    """(row of sizes.csv, header, cells) of what a page says about inputs of sizes.csv."""
    for header, cells in tables(page.read_text(encoding="utf-8")):
        name = next((n for n, _ in ROWS for cell in cells[:1] if n in cell), None)
        options = options_of(cells[1:])
        if name and options and "bytes" in header:
            yield ROWS[name, options], header, cells


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(True for _ in stated(p))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_tables_say_what_the_rows_say(page):
    for row, header, cells in stated(page):
        values = dict(zip(header, cells, strict=True))
        assert int(values["bytes"].replace(",", "")) == row.bytes, cells
        if "raw bytes" in header:
            assert int(values["raw bytes"].replace(",", "")) == row.raw, cells
        if "%" in header:
            assert values["%"].strip(" %") == f"{100 * row.bytes / row.raw:.2f}", cells


def test_the_pages_have_such_tables():
    assert len(list(stated(ROOT / "README.md"))) >= 4
    assert len(list(stated(ROOT / "docs" / "benchmarks.md"))) >= 18


def test_printed_totals_are_those_of_the_rows():
    """`rac info` of the folder, wherever a page shows it."""
    found = [t for p in PAGES for t in re.findall(r"total +([\d,]+) += the size", p.read_text(encoding="utf-8"))]
    assert found
    assert {int(t.replace(",", "")) for t in found} == {ROWS["MiniLM folder", "--level default"].bytes}


def test_the_picture_shows_what_the_table_says():
    points = picture.points()
    assert [name for name, _, _ in points].count("") >= 3
    assert {"IQ4_XS", "Q4_K_M", "Q8_0"} <= {name for name, _, _ in points}
    drawn = (ROOT / "docs" / "quality.svg").read_text(encoding="utf-8")
    assert drawn == picture.draw(points), "python tools/picture.py"
