"""Mutates golden archives and reads them with both programs: nothing but their own errors may leave.

    PYTHONPATH=tests:tools:format_spec python -m fuzz.fuzz_reader --seconds 300 --seed 1

Two thirds of the cases change fields and are built anew, with all lengths, checksums, digests and index rows made right
again, so that what is behind them is reached. The rest changes bytes anywhere. Both programs must read a case to
the same tensors, or both must refuse it; so must the kernels of rac among each other. A case that fails is written to
the working directory, and the exit status is 1.
"""

import argparse
import copy
import io
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from golden.model import OBJECT, TENSOR, Archive, parse
from rac.container import msg, wire, zstd
from rac.container.forward import Forward
from rac.decode.stream import Found, forward_tensors
from rac.registry import DTYPES
from support import readers

INTS = [
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    255,
    256,
    257,
    1024,
    1025,
    4096,
    65535,
    65536,
    1 << 24,
    1 << 31,
    1 << 40,
]
INTS += [-1, -8, (1 << 59) - 1, 1 << 59, 1 << 62, (1 << 62) + 1, (1 << 63) - 1, (1 << 64) - 1, -(1 << 63)]
OTHERS = [
    None,
    True,
    False,
    "",
    "x",
    "raw/1",
    "zstd/1",
    "lanes/1",
    "trellis/1",
    "lowrank/1",
    "basis/1",
    b"",
    bytes(16),
    [],
    {},
    [0],
    [1, 1],
    [[]],
    {"id": "raw/1"},
]
KEYS = [
    "id",
    "name",
    "x-a",
    "size",
    "axis",
    "tile",
    "units",
    "needs",
    "uses",
    "extra",
    "aliases",
    "packed",
    "shard",
    "at",
]


def pick(rng: random.Random) -> Any:
    """A value that is likely to be wrong."""
    return copy.deepcopy(rng.choice((INTS, OTHERS, list(DTYPES))[rng.choice((0, 0, 1, 2))]))


def spots(value: Any) -> list[tuple[Any, Any]]:
    """All (map or array, key or place) within a value."""
    out = []
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        out += [(value, k), *spots(v)]
    return out


def change(value: Any, rng: random.Random) -> None:
    """Change one place of a map: another value, one near by, one less, one more."""
    places = spots(value)
    if not places:
        return
    where, k = rng.choice(places)
    old, what = where[k], rng.randrange(5)
    if what == 0:
        where[k] = pick(rng)
    elif what == 1:
        del where[k]
    elif what == 2 and isinstance(where, dict):
        where[rng.choice(KEYS)] = pick(rng)
    elif what == 2:
        where.insert(k, copy.deepcopy(rng.choice((old, pick(rng)))))
    elif old in (0, 1) and what == 3:
        where[k] = type(old) is int and bool(old)
    elif type(old) is int:
        where[k] = max(-(1 << 63), min((1 << 64) - 1, old + rng.choice((-1, 1, -2, 2, 16, old))))
    elif isinstance(old, list):
        rng.shuffle(old)
    elif isinstance(old, bytes | str):
        where[k] = old[: rng.randrange(len(old) + 1)]
    else:
        where[k] = pick(rng)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change, cut, double or insert a few bytes, rather at the beginning."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(min(len(out), rng.choice((8, 16, 48, len(out)))) or 1)
        what = rng.randrange(8)
        if what < 4 and out:
            out[at] = rng.choice((0, 1, 255, out[at] ^ 1 << rng.randrange(8), out[at] + 1 & 255, out[at] - 1 & 255))
        elif what == 4:
            del out[at : at + rng.choice((1, 4, 16, 64, len(out)))]
        elif what == 5:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 16, 64)))
        elif what == 6:
            out[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), (1 << 62).to_bytes(8, "little")))
        else:
            out[at:at] = out[at : at + rng.choice((1, 4, 16, 64))]
    return bytes(out)


def change_fields(a: Archive, rng: random.Random) -> None:
    """Change one thing that an archive states."""
    what = rng.randrange(12)
    r = rng.choice(a.records) if a.records else None
    if what == 0 or r is None:
        change(a.header, rng)
    elif what <= 3:
        change(r.head, rng)
    elif what == 4:
        stages = r.head.get("stages")
        change(rng.choice(stages) if isinstance(stages, list) and stages else r.head, rng)
    elif what <= 8 and r.units:
        k = rng.randrange(len(r.units))
        r.units[k] = change_bytes(r.units[k], rng)
    elif what == 9:
        if r.units and rng.random() < 0.5:
            r.head["units"] = change_bytes(wire.directory(r.units), rng)
        elif r.units:
            rng.choice((r.units.reverse, r.units.pop, lambda: r.units.append(r.units[0])))()
        else:
            r.payload = change_bytes(r.payload or b"", rng)
    elif what == 10:
        field = rng.choice(("flags", "reserved", "type", "payload_size", "head_size"))
        setattr(r, field, rng.choice(INTS) & (0xFFFF if field in ("flags", "type") else 0xFFFFFFFF))
        r.payload_size = rng.choice(INTS) & ((1 << 64) - 1) if field == "payload_size" else None
    elif rng.random() < 0.5:
        rng.choice((a.records.reverse, a.records.pop, lambda: a.records.append(copy.deepcopy(r))))()
    else:
        seed = rng.randrange(1 << 32)  # the index is made more than once, and must be the same each time
        as_bytes = rng.random() < 0.3

        def patch(index: dict[str, Any]) -> bytes | None:
            if as_bytes:
                return change_bytes(msg.pack(index), random.Random(seed))
            return change(index, random.Random(seed))

        a.patch_index = patch


def build(a: Archive) -> bytes:
    """The bytes, with parts and digests that fit what rac decodes."""
    for r in a.records:
        if r.parts and sum(r.parts) != len(r.body()):
            r.parts = None
    found = {TENSOR: [], OBJECT: []}

    def note(of: Found) -> None:
        t, words, parts = of
        found[t.record.type].append((zstd.digest(words.tobytes()), parts))

    try:
        for of in forward_tensors(Forward(io.BytesIO(a.build())), of_object=note):
            note(of)
    except Exception:  # noqa: S110 - whatever it is, `compare` meets it too
        pass
    for kind, all_of in found.items():
        for r, (digest, parts) in zip([r for r in a.records if r.type == kind], all_of, strict=False):
            r.head["digest"], r.parts = digest, parts
    return a.build()


def read(name: str, data: bytes) -> tuple[str, Any]:
    """("read", bytes of all tensors and attachments) or ("refused", class)."""
    try:
        content = readers.READERS[name](data)
    except readers.ERRORS as e:
        return "refused", type(e).__name__
    return "read", {n: readers.plain(v)[2] for n, v in content.get("tensors", {}).items()}


def compare(data: bytes) -> tuple[str, str]:
    """What rac and the second decoder say. AssertionError where the readers do not agree."""
    got = {name: read(name, data) for name in readers.READERS if name != "rac_slices"}
    ours, theirs = got["rac_forward"], got["second_forward"]
    if got["rac_verify"] == (
        "refused",
        "SourceError",
    ):  # one shard of a set, under a name that does not say so
        got["rac_verify"] = theirs
    if theirs[0] == "read":
        assert ours == theirs, f"rac_forward {ours} against {theirs[0]}"
        assert got["rac_random"] == theirs, f"rac_random {got['rac_random'][1]} against {theirs[0]}"
        assert got["rac_verify"][0] == "read", f"rac_verify {got['rac_verify'][1]} against {theirs[0]}"
        assert got["second_random"] == theirs, f"second_random {got['second_random'][1]} against {theirs[0]}"
    assert got["rac_verify"][0] == theirs[0], f"rac_verify {got['rac_verify'][0]} against {theirs[1]}"
    fast, slow = got["rac_random"], got["rac_reference"]
    if fast[0] == "read":
        assert slow[0] == "read", f"the reference decoder {slow[1]}"
        assert all(fast[1][n] == v for n, v in slow[1].items()), "the kernels differ"
    return tuple(v if k == "refused" else k for k, v in (got["rac_verify"], theirs))  # type: ignore[return-value]


def run(seed: int, most: float, seconds: float, classes: Counter[tuple[str, str]] | None = None) -> int:
    """Number of archives tried, at most `most`; raises with the case saved where one fails."""
    good = sorted((readers.GOLDEN / "good").glob("*.rac"))
    corpus = [p.read_bytes() for p in good if p.stat().st_size < 20_000]
    models = [parse(data) for data in corpus]
    rng, tried, stop = random.Random(seed), 0, time.monotonic() + seconds
    while tried < most and time.monotonic() < stop:
        if rng.random() < 0.67:
            a = copy.deepcopy(rng.choice(models))
            some = rng.sample(a.records, min(len(a.records), rng.choice((1, 1, 2, 4))))
            used = {name for r in some for name in r.head.get("uses", ())}
            needed = [r for r in a.records if r.type == OBJECT and r.head["name"] in used]
            a.records = [r for r in a.records if r in some or r in needed]
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                change_fields(a, rng)
            data = build(a)
        else:
            data = change_bytes(rng.choice(corpus), rng)
        tried += 1
        try:
            said = compare(data)
        except BaseException as e:
            Path(f"fuzz-{seed}-{tried}.rac").write_bytes(data)
            e.add_note(f"seed {seed}, case {tried}, saved as fuzz-{seed}-{tried}.rac")
            raise
        if classes is not None:
            classes[said] += 1
    return tried


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    seen: Counter[tuple[str, str]] = Counter()
    print(run(args.seed, math.inf, args.seconds, seen), "archives, nothing found; rac and the second decoder said:")
    for (ours, theirs), count in sorted(seen.items()):
        print(f"{count:7d} {ours} {'' if ours == theirs else theirs}")
