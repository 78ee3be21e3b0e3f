"""format_spec/maps.cddl, the schema of all maps, against the golden files."""

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from decoder.container import check_trailer
from decoder.frames import decompress
from decoder.structure import Map, parse_map
from support import readers
from support.cddl import Schema

SCHEMA = Schema((readers.ROOT / "format_spec" / "maps.cddl").read_text())
MANIFEST = readers.manifest()
KINDS = {1: "tensor", 2: "attachment", 3: "object", 4: "index-head"}


def maps(data: bytes) -> Iterator[tuple[str, Map]]:
    """(rule, map) of all maps of an archive whose lengths are right, but for the heads of records to skip."""
    size = struct.unpack_from("<I", data, 16)[0]
    yield "header", parse_map(data[32 : 32 + size])
    at, end = -(-(32 + size) // 64) * 64, check_trailer(data[-32:])[0]
    while at <= end:
        kind, _, h, _, p = struct.unpack_from("<HHIIQ", data, at + 4)
        payload = at + -(-(32 + h) // 64) * 64
        if kind in KINDS:
            head = parse_map(data[at + 32 : at + 32 + h])
            yield KINDS[kind], head
        at = payload + -(-p // 64) * 64
    unit = int.from_bytes(head["units"][:8], "little")  # type: ignore[index, arg-type]
    yield "index", parse_map(decompress(data[payload : payload + unit], head["size"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(MANIFEST["good"]))
def test_good(name: str) -> None:
    for rule, found in maps((readers.GOLDEN / "good" / name).read_bytes()):
        assert SCHEMA.fits(("name", rule), found), (rule, found)


SEEN = ("TEN-001", "TEN-002", "TEN-003", "TEN-004", "TEN-005", "TEN-008", "TEN-009", "OBJ-001", "OBJ-003", "ATT-001")
SEEN += ("ATT-002", "HDR-001", "HDR-002", "HDR-003", "HDR-005", "IDX-001", "IDX-004", "IDX-005", "IDX-006", "LAN-001")
SEEN += ("LAN-002", "TCQ-001", "TCQ-002", "TCQ-004", "GRP-001", "GRP-002", "BIT-001", "BIT-002", "RAW-001", "ZTD-001")
SEEN += ("LOW-001", "BAS-001", "ONL-001", "ONL-002", "ONL-003", "ONL-004")
"""Clauses of which the schema must notice every golden file."""
BROKEN = [
    (kind, name)
    for kind in ("bad", "unsupported")
    for name, entry in MANIFEST[kind].items()
    if entry["clause"][4:] in SEEN and name not in ("index-units-two.rac", "index-units-none.rac")
]


@pytest.mark.parametrize(("kind", "name"), BROKEN)
def test_broken(kind: str, name: str) -> None:
    """An archive that violates a clause of keys or types has a map that the schema refuses."""
    found = maps((readers.GOLDEN / kind / name).read_bytes())
    assert any(not SCHEMA.fits(("name", rule), value) for rule, value in found)


@pytest.mark.parametrize("value", [{"id": "bits/1", "bits": True}, {"id": "bits/1"}, {"id": "bits/1", "bits": 9}, []])
def test_checker_refuses(value: Any) -> None:
    assert SCHEMA.fits(("name", "bits"), {"id": "bits/1", "bits": 3})
    assert not SCHEMA.fits(("name", "bits"), value)
