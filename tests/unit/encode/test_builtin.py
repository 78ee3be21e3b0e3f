"""The mix of texts of `--calibrate auto`: what is in it, in every part of it, and that its pieces make it."""

import re
import tomllib

import pytest

import calibration_mix
from rac.calibrate import builtin
from rac.container import zstd
from rac.errors import FormatError
from support import ROOT

TEXTS = ROOT / "codec" / "rac" / "calibrate" / "texts"


def test_the_file_is_what_the_pieces_make_and_is_small():
    assert builtin.whole() == calibration_mix.build()
    assert (TEXTS / builtin.FILE).stat().st_size < 1 << 20
    assert builtin.learned() + builtin.measured() == builtin.whole()
    assert 5 * len(builtin.measured()) == pytest.approx(len(builtin.whole()), rel=0.05)


def test_the_wheel_holds_it_with_its_licences():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["rac"]
    shipped = {path for pattern in patterns for path in (ROOT / "codec" / "rac").glob(pattern)}
    assert {TEXTS / builtin.FILE, TEXTS / "README.md"} <= shipped


def test_any_part_is_a_mix():
    every = (
        r"[a-z], which [a-z]",
        r"\n\n(?:User|[A-Z]+): |[.,?!]\"",
        r"^ +return ",
        "[äöüéèêçñãíó]",
        "[\u0400-\u9fff]{2}",
    )
    text = builtin.learned()
    for part in (text[: len(text) // 2], text[len(text) // 2 :]):
        assert [found for found in every if not re.search(found, part, re.M)] == []


def test_every_piece_has_its_source_and_licence():
    pieces = {str(path.relative_to(calibration_mix.PIECES)) for path in calibration_mix.PIECES.glob("*/*")}
    stated = {
        name
        for row in re.findall(r"^\| (`.*?) \|", (TEXTS / "README.md").read_text(), re.M)
        for name in re.findall("`(.*?)`", row)
    }
    assert {name for name in stated if "*" not in name} <= pieces
    prefixes = tuple(name.split("*")[0] for name in stated if "*" in name)
    assert {name for name in pieces - stated if not name.startswith(prefixes)} == set()


def test_a_frame_that_is_none_or_states_no_size():
    with pytest.raises(FormatError, match="damaged"):
        zstd.content_size(b"no frame at all")
    with pytest.raises(FormatError, match="size"):
        zstd.content_size(b"\x28\xb5\x2f\xfd\x00\x58\x09\x00\x00abc")
