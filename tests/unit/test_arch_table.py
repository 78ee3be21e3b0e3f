"""docs/compatibility.md says of architectures what docs/architectures.csv says; `arch_matrix.py --summary --write`."""

from __future__ import annotations

import arch_table


def row(**cells):
    return dict.fromkeys(arch_table.CELLS, "ok") | cells


def test_the_page_is_the_table():
    assert arch_table.on_page(arch_table.PAGE.read_text()) == arch_table.summary(arch_table.stated())


def test_every_cell_is_counted_and_explained():
    line = "- AModel cannot be calibrated on a text (no x); `--calibrate none` works [/model]"
    found = arch_table.summary(
        {
            "a": row(calibrated=line),
            "b": row(calibrated=line.replace("AModel", "BModel")),
            "c": row(hf="ERROR KeyError: x", compressed="- c cannot be held [/m.rac]"),
            "d": row(),
            "e": row(calibrated="text does not reach: cross attention"),
        }
    )
    assert "5 architectures, 1 of them ok in all six cells." in found
    assert "| ok | 5 | 5 | 4 | 5 | 2 | 4 |" in found
    assert "| refused in one line | 0 | 0 | 1 | 0 | 2 | 0 |" in found
    assert "| but for a part | 0 | 0 | 0 | 0 | 1 | 0 |" in found
    assert "| to be mended | 0 | 0 | 0 | 0 | 0 | 1 |" in found
    assert "and the pack says so: cross attention | e |" in found
    assert "| calibrated: refused in one line, which names `--calibrate none` | a, b |" in found
    assert "| compressed: refused: c cannot be held | c |" in found
    assert "| `--format hf`: to be mended: KeyError: x | c |" in found
