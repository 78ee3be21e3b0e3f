"""Every way to read an archive, for the tests of conformance, corruption and fuzzing.

`python -m support.readers` reads all golden files in one process under a memory limit and says what is wrong; the tests
run it, with and without the C kernel.
"""

import io
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

import decoder
import rac
from decoder.errors import RacError as DecoderError
from rac.container.access import BytesAccess
from rac.decode import random as ld
from rac.frameworks import numpy_dtype
from support import ROOT
from support.reference import reference

GOLDEN = ROOT / "format_spec" / "golden"
Content = dict[str, Any]
"""Tensors (name to array, or to dtype, shape, bytes), attachments, and whether tied names are one object."""
MOST = 100 << 20
"""Bytes that refusing a bad archive may take."""
SLOW = 1.0
"""Seconds of a processor that it may take."""


def rac_random(data: bytes) -> Content:
    """rac, random access: all tensors and attachments."""
    with rac.RacFile(BytesAccess(data), threads=1) as f:
        return {"tensors": f.load(), "files": {n: f.attachment(n) for n in f.attachments()}, "shared": True}


def rac_reference(data: bytes) -> Content:
    """rac, random access, symbols through constriction; names without aliases."""
    with reference(), rac.RacFile(BytesAccess(data), threads=1) as f:
        entries = [e for e in f.archives[0].index.entries if e.type == 1]
        found = {t.name: (t, w) for t, w in ld.load(f.archives[0], entries)}
        return {"tensors": {n: (t.dtype, t.shape, w.tobytes()) for n, (t, w) in found.items()}}


def rac_slices(data: bytes) -> Content:
    """rac, one tensor at a time through a slice of everything."""
    with rac.RacFile(BytesAccess(data), threads=1) as f:
        return {"tensors": {n: f.get_slice(n)[...] for n in list(f.keys())}}


def rac_forward(data: bytes) -> Content:
    """rac, from front to back."""
    return {"tensors": dict(rac.iter_tensors(io.BytesIO(data))), "shared": True}


def rac_verify(data: bytes) -> Content:
    """rac, everything checked. There is nothing to compare."""
    with tempfile.NamedTemporaryFile(suffix=".rac") as f:
        f.write(data)
        f.flush()
        rac.verify(f.name)
    return {}


def second_forward(data: bytes) -> Content:
    """The second decoder, from front to back; it checks everything."""
    a = decoder.decode(data)
    return {"tensors": a.tensors, "files": a.attachments, "metadata": a.metadata, "digest": a.digest}


def second_random(data: bytes) -> Content:
    """The second decoder, index first."""
    with decoder.RandomAccess(data) as r:
        files = [row["name"] for row in r.index.rows if row["type"] == 2]
        return {"tensors": {n: r.tensor(n) for n in r.names()}, "files": {n: r.attachment(n) for n in files}}


READERS = {
    f.__name__: f
    for f in (rac_random, rac_reference, rac_slices, rac_forward, rac_verify, second_forward, second_random)
}
ERRORS = (rac.RacError, DecoderError)


def manifest() -> dict[str, dict[str, Any]]:
    """What the golden files hold, or why they are refused."""
    out: dict[str, dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_text())
    return out


def plain(value: Any) -> tuple[str | None, tuple[int, ...], bytes, Any]:
    """(dtype, shape, dense bytes, numpy dtype) of a tensor of any reader."""
    if isinstance(value, tuple):
        return value[0], tuple(value[1]), value[2], None
    return None, value.shape, value.tobytes(), value.dtype


def differences(content: Content, entry: dict[str, Any]) -> list[str]:
    """Where the content differs from a good entry of the manifest."""
    out = []
    if "tensors" in content and content["tensors"].keys() - entry["tensors"].keys():
        out.append("names that are not there")
    for name, stated in entry["tensors"].items() if "tensors" in content else ():
        if name not in content["tensors"]:
            if "alias_of" not in stated or "files" in content:
                out.append(f"{name!r} is missing")
            continue
        dtype, shape, dense, numpy = plain(content["tensors"][name])
        expected = tuple(stated["shape"])
        if dtype is None:
            expected = (*expected[:-1], expected[-1] // 2) if stated["dtype"] == "F4" else expected
            dtype = stated["dtype"] if numpy == numpy_dtype(stated["dtype"]) else str(numpy)
        if (dtype, shape) != (stated["dtype"], expected):
            out.append(f"{name!r} is {dtype} {shape}")
        if xxhash.xxh3_128_hexdigest(dense) != stated["xxh3_128"]:
            out.append(f"{name!r} has other content")
        if "alias_of" in stated and content.get("shared"):
            first = content["tensors"][stated["alias_of"]]
            same = content["tensors"][name] is first
            if same != stated["tied"]:
                out.append(f"{name!r} is {'one' if same else 'another'} object")
    if "files" in content:
        files = {n: {"size": len(d), "xxh3_128": xxhash.xxh3_128_hexdigest(d)} for n, d in content["files"].items()}
        if files != entry["attachments"]:
            out.append("attachments differ")
    if content.get("metadata", entry["metadata"]) != entry["metadata"]:
        out.append("metadata differs")
    if content.get("digest", bytes.fromhex(entry["digest"])).hex() != entry["digest"]:
        out.append("the content digest differs")
    return out


def expected(reader: str, entry: dict[str, Any]) -> set[str]:
    """Error classes that a reader may give for a refused entry; "" is none, "*" any."""
    error, other = entry["error"], entry.get("random_access", entry["error"])
    whole = {"rac_verify": {error, other}, "second_forward": {error}}  # verify opens the file at random first
    if reader in whole:
        return whole[reader]
    if entry["seen_by"] == "all" or (entry["seen_by"] == "forward" and reader == "rac_forward"):
        return {error} if reader == "rac_forward" else {other}
    return {"", "*"}


def outcome(reader: str, data: bytes) -> tuple[str, Content | str]:
    """("", content) or (name of the error class, message)."""
    try:
        return "", READERS[reader](data)
    except ERRORS as e:
        return type(e).__name__, str(e)


REFUSING = tuple(READERS.keys() - {"rac_slices", "rac_reference"})
"""The readers that bad archives are tried with."""


def wrong_refusals(entry: dict[str, Any], data: bytes, names: Iterable[str] = REFUSING) -> list[str]:
    """Readers that do not refuse a bad archive as the manifest says, or not fast enough."""
    out = []
    for reader in names:
        start = time.process_time()
        got, why = outcome(reader, data)
        spent = time.process_time() - start
        may = expected(reader, entry)
        if got not in may and "*" not in may:
            out.append(f"{reader}: {got or 'no error'} instead of {'/'.join(sorted(may))} ({why if got else ''})")
        if spent > SLOW:
            out.append(f"{reader}: {spent:.1f} s")
    return out


def main() -> int:
    """All golden files in this process, under a limit of memory."""
    known = manifest()
    faults = []
    for name, entry in known["good"].items():
        data = (GOLDEN / "good" / name).read_bytes()
        for reader in ("rac_random", "rac_slices", "rac_forward"):
            try:
                faults += [f"{name}: {reader}: {d}" for d in differences(READERS[reader](data), entry)]
            except Exception as e:
                faults.append(f"{name}: {reader}: {e!r}")
    if "--limit" in sys.argv:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST, resource.RLIM_INFINITY))
    for kind in ("bad", "unsupported"):
        for name, entry in known[kind].items():
            data = (GOLDEN / kind / name).read_bytes()
            try:
                faults += [f"{name}: {w}" for w in wrong_refusals(entry, data)]
            except Exception as e:
                faults.append(f"{name}: {e!r}")
    print("\n".join(faults) or f"kernel: {rac_kernel()}")
    return len(faults) and 1


def rac_kernel() -> str:
    """What decodes."""
    from rac import native

    return native.kernel()


def dense_size(entry: dict[str, Any]) -> int:
    """Elements of all tensors of a good entry."""
    return sum(math.prod(t["shape"]) for t in entry["tensors"].values())


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "error")
    sys.exit(main())
