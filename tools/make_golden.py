"""Make format_spec/golden: archives that every reader must read, and archives that it must refuse.

    python tools/make_golden.py            writes all files and the manifest
    python tools/make_golden.py --check    compares with what is there, writes nothing

Everything follows from the fixed integers of tools/golden; the bytes depend on no random generator, and on zstandard
only through its pinned version.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from golden import (
    bad_container,
    bad_groups,
    bad_heads,
    bad_online,
    bad_products,
    bad_stages,
    bad_trellis,
    frames,
    good_groups,
    good_online,
    good_products,
    good_trellis,
)
from golden.cases import BAD, UNSUPPORTED
from golden.good import GOOD
from golden.model import ATTACHMENT, TENSOR, Archive
from golden.sets import NAMES, SETS
from golden.vectors import vectors

FOLDER = Path(__file__).parent.parent / "format_spec"
"""Its folders golden and vectors hold what this script makes and nothing else."""
MODULES = (
    bad_container,
    bad_groups,
    bad_heads,
    bad_online,
    bad_products,
    bad_stages,
    bad_trellis,
    frames,
    good_groups,
    good_online,
    good_products,
    good_trellis,
)
"""Imported for their entries in BAD and GOOD."""


def describe(archive: Archive) -> dict[str, Any]:
    """What a reader must find in a good archive."""
    tensors, files = {}, {}
    for r in archive.records:
        if r.type == TENSOR:
            stated = {"dtype": r.head["dtype"], "shape": r.head["shape"], "xxh3_128": r.head["digest"].hex()}
            if "online" in r.head:
                stated["online"] = r.head["online"]
            for name, tied in ((r.head["name"], None), *r.head.get("aliases", [])):
                tensors[name] = stated if tied is None else stated | {"alias_of": r.head["name"], "tied": tied}
        elif r.type == ATTACHMENT:
            files[r.head["name"]] = {"size": r.head["size"], "xxh3_128": r.head["digest"].hex()}
    return {
        "metadata": archive.header.get("metadata", {}),
        "shard": archive.header.get("shard", [1, 1]),
        "digest": archive.content_digest().hex(),
        "tensors": tensors,
        "attachments": files,
    }


def make() -> dict[str, bytes]:
    """Every file by its path in the folder, the manifest included."""
    files: dict[str, bytes] = {}
    manifest: dict[str, dict[str, Any]] = {"good": {}, "unsupported": {}, "bad": {}}
    for name, (build, about, clauses) in sorted(GOOD.items()):
        archive = build()
        data = files[f"good/{name}"] = archive.build()
        manifest["good"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "about": about, "clauses": list(clauses)}
        manifest["good"][name] |= describe(archive)
    for name, case in sorted(BAD.items()):
        data = case.build()
        kind = "unsupported" if case.error == UNSUPPORTED else "bad"
        files[f"{kind}/{name}"] = data
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "about": case.why, "clause": case.clause}
        entry |= {"error": case.error, "seen_by": case.seen}
        if case.random:
            entry["random_access"] = case.random
        manifest[kind][name] = entry
    manifest["sets"] = {}
    for name, pair in sorted(SETS.items()):
        made = dict(zip(NAMES, (a.build() for a in pair.make()), strict=True))
        files |= {f"sets/{name}/{n}": data for n, data in made.items()}
        hashes = {n: hashlib.sha256(data).hexdigest() for n, data in made.items()}
        manifest["sets"][name] = {"sha256": hashes, "about": pair.why, "clause": pair.clause, "error": pair.error}
    files["manifest.json"] = (json.dumps(manifest, indent=1, ensure_ascii=True) + "\n").encode()
    return {f"golden/{n}": d for n, d in files.items()} | {f"vectors/{n}": d for n, d in vectors().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make or check the golden files.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    files = make()
    folders = (FOLDER / "golden", FOLDER / "vectors")
    there = {str(p.relative_to(FOLDER)): p for folder in folders for p in folder.rglob("*") if p.is_file()}
    for name in sorted(there.keys() - files.keys()):
        print(f"{name}: not made by this script")
    wrong = len(there.keys() - files.keys())
    for name, data in files.items():
        if name in there and there[name].read_bytes() == data:
            continue
        wrong += 1
        print(f"{name}: {'differs' if name in there else 'is missing'}{'' if check else ', written'}")
        if not check:
            (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
            (FOLDER / name).write_bytes(data)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes")
    return 1 if check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
