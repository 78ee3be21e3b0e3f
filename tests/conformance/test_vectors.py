"""format_spec/vectors through the stages of the second decoder, and through the codec as archives made of them."""

import json
import struct
from typing import Any

import numpy as np
import pytest

import rac
from decoder import bits, groups, lanes, online, products, trellis
from golden.good import archive
from golden.model import OBJECT, TENSOR, Record
from rac.container import zstd
from rac.container.access import BytesAccess
from support import readers

FOLDER = readers.ROOT / "format_spec" / "vectors"
CASES = [(p.stem, c) for p in sorted(FOLDER.glob("*.json")) for c in json.loads(p.read_text())["cases"]]
IDS = [f"{stage}-{i}" for i, (stage, _) in enumerate(CASES)]
Case = dict[str, Any]
RAW = {"id": "raw/1"}


def boxes(case: Case) -> list[tuple[slice, slice]]:
    """The tiles of a matrix."""
    (rows, cols), (tr, tc) = case["matrix"], case["tile"]
    return [
        (slice(y, min(rows, y + tr)), slice(x, min(cols, x + tc)))
        for y in range(0, rows, tr)
        for x in range(0, cols, tc)
    ]


def objects(case: Case) -> list[np.ndarray]:
    """The matrices of a product."""
    return [np.frombuffer(bytes.fromhex(o["elements"]), "<f4").reshape(o["shape"]) for o in case["objects"]]


def codes(case: Case) -> np.ndarray:
    """The words of one byte."""
    return np.frombuffer(bytes.fromhex(case["words"]), np.uint8).reshape(case.get("matrix", case.get("tile")))


def second(stage: str, case: Case) -> tuple[bytes, bytes]:
    """(what the second decoder makes, what is stated), bytes."""
    if stage == "bits":
        p = bits.parameters(case["stage"], 1)
        return bits.decode_tile(bytes.fromhex(case["unit"]), p, *case["tile"]).tobytes(), codes(case).tobytes()
    if stage in ("trellis", "groups"):
        out = np.zeros(case["matrix"], f"<u{4 if case['dtype'] == 'F32' else 2}")
        unit = bytes.fromhex(case["unit"])
        for ys, xs in boxes(case):
            words = codes(case)[ys, xs]
            if stage == "trellis":
                q = trellis.parameters(case["stage"], case["dtype"])
                out[ys, xs] = trellis.decode_tile(words, q, trellis.trellis_unit(unit, q, *case["matrix"]), ys, xs)
            else:
                g = groups.parameters(case["stage"], case["dtype"], case["matrix"][1])
                out[ys, xs] = groups.decode_tile(words, g, groups.groups_unit(unit, g, *case["matrix"]), ys, xs)
        return out.tobytes(), bytes.fromhex(case["elements"])
    v = np.frombuffer(bytes.fromhex(case["v"]), "<f4").reshape(case["matrix"])
    made = products.decode({"id": f"{stage}/1"}, v, objects(case), case["dtype"])
    return made.tobytes(), bytes.fromhex(case["elements"])


@pytest.mark.parametrize(("stage", "case"), CASES, ids=IDS)
def test_second_decoder(stage: str, case: Case) -> None:
    if stage == "online":
        stated = case["object"] and objects({"objects": [case["object"]]})[0]
        held = {} if stated is None else {"m": stated}
        found = online.transform(online.check(case["online"], "F32", [1, case["columns"]], held), held)
        assert np.abs(found - case["t"]).max() < 1e-12
    elif stage == "lanes":
        p = lanes.parameters(case["stage"], case["word"])
        shared = lanes.shared_unit(bytes.fromhex(case["shared"]), p, *case["matrix"])
        words = np.frombuffer(bytes.fromhex(case["words"]), f"<u{case['word']}").reshape(case["matrix"])
        for tile in case["tiles"]:
            r0, r1, c0, c1 = tile["box"]
            classes, unit = (shared.row_classes[r0:r1], shared.col_classes[c0:c1]), bytes.fromhex(tile["unit"])
            sequence, segments = lanes.order(p, shared, *classes)
            assert [[*divmod(int(k), c1 - c0)] for k in sequence] == tile["sequence"]
            coded = lanes.coded_symbols_of(lanes.cut(unit, p, len(sequence)), p, shared, segments)
            assert [[t, s.tolist()] for (t, _), s in zip(segments, coded, strict=True)] == tile["symbols"]
            assert (lanes.decode_tile(unit, p, shared, *classes)[0] == words[r0:r1, c0:c1]).all()
    else:
        made, stated = second(stage, case)
        assert made == stated


def record(stage: str, case: Case) -> list[Record]:
    """The records of an archive of the case; the tensor is the last one."""
    shape = case.get("matrix") or (case["tile"] if stage == "bits" else [case["columns"]] * 2)
    head: Case = {
        "name": "t",
        "dtype": case.get("dtype", "U8"),
        "shape": shape,
        "axis": 1,
        "tile": case.get("tile", shape),
    }
    dense, front = bytes.fromhex(case.get("elements", case.get("words", ""))), []
    for i, o in enumerate(case.get("objects", [case["object"]] if case.get("object") else [])):
        data = bytes.fromhex(o["elements"])
        stated = {"name": f"m{i}" if stage != "online" else "m", "dtype": "F32", "shape": o["shape"], "axis": 1}
        stated |= {"tile": o["shape"], "stages": [RAW], "digest": zstd.digest(data)}
        front.append(Record(OBJECT, stated, [data]))
    if stage == "bits":
        head["stages"], units = [case["stage"]], [bytes.fromhex(case["unit"])]
    elif stage == "lanes":
        r0, r1, c0, c1 = case["tiles"][0]["box"]
        head |= {"dtype": f"U{8 * case['word']}", "stages": [case["stage"]], "tile": [r1 - r0, c1 - c0]}
        units = [bytes.fromhex(u) for u in (case["shared"], *(t["unit"] for t in case["tiles"]))]
    elif stage in ("trellis", "groups"):
        head["stages"] = [RAW, case["stage"]]
        units = [bytes.fromhex(case["unit"]), *(codes(case)[ys, xs].tobytes() for ys, xs in boxes(case))]
    elif stage == "online":
        eye = np.eye(case["columns"], dtype="<f4").tobytes()
        head |= {"dtype": "F32", "stages": [RAW], "online": case["online"]}
        dense, units = eye, [eye]
    else:  # every element of V is an outlier
        v = bytes.fromhex(case["v"])
        places = [(i // shape[1], i % shape[1]) for i in range(len(v) // 4)]
        outliers = b"".join(struct.pack("<II", *p) + v[4 * i : 4 * i + 4] for i, p in enumerate(places))
        second = {
            "id": "trellis/1",
            "states": 1,
            "zero": 0,
            "low": 0,
            "scale": 0x3F800000,
            "sizes": [0, 0, 0, len(outliers)],
        }
        head |= {"stages": [RAW, second, {"id": f"{stage}/1"}], "uses": [r.head["name"] for r in front]}
        units = [outliers, bytes(len(places))]
    return [*front, Record(TENSOR, head | {"digest": zstd.digest(dense)}, units)]


@pytest.mark.parametrize(("stage", "case"), CASES, ids=IDS)
def test_codec(stage: str, case: Case) -> None:
    records = record(stage, case)
    with rac.RacFile(BytesAccess(archive(*records).build())) as f:
        found = f.get_tensor("t")
        assert (
            zstd.digest(np.ascontiguousarray(found).reshape(-1).view(np.uint8).tobytes()) == records[-1].head["digest"]
        )
        if stage == "online":
            assert np.abs(f.online("t").fold(found.astype(np.float64)) - case["t"]).max() < 1e-12
