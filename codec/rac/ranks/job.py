"""What all ranks of a work folder must agree on, kept there once: a rank with anything else is refused."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rac.calibrate.folder import fed
from rac.container import wire
from rac.container.access import guarded
from rac.container.zstd import Digest
from rac.encode.asked import Asked
from rac.encode.sources import Source, SourceTensor
from rac.errors import OutputError, SourceError
from rac.linalg.device import name_of
from rac.ranks.lease import parsed
from rac.ranks.store import WAITS, Store
from rac.registry import VERSION

NAME, DONE = "job.json", "finished.json"
FOLDERS = re.compile(r"ranks|units|lossless|measure|calibration\d+(-.*)?|(scale|kl)-?\d.*|kl-machine\.json")
"""Names of stages and their files, and of the folder of signs of life."""
SAMPLES, SAMPLE = 256, 4096  # tensors that are looked at, at most, and bytes of each
DECIDING = ("numpy", "zstandard")  # packages whose version decides about bytes: sums of one, frames of the other
RUNNING = ("torch", "transformers")  # and where a model is run


@dataclass(frozen=True, slots=True)
class Job:
    """One pack."""

    source: str
    """Path of what is packed, as the first rank had it."""
    asked: Asked
    about: Mapping[str, Any]
    """What must be the same for all ranks, by name."""

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that stand for all that must be the same."""
        d = Digest()
        d.update(json.dumps(dict(self.about), sort_keys=True).encode())
        return d.value().hex()

    def join(self, store: Store) -> None:
        """Begin the work folder, or find the same job in it; OutputError where it holds another one."""
        stated = {"source": self.source, "asked": self.asked.changed, "about": dict(self.about), "job": self.digest}
        store.create(NAME, json.dumps(stated, indent=1).encode())
        data = store.get(NAME)
        for wait in WAITS:  # a store may show late what was written; if it never does, markers tell jobs apart too
            if data is not None:
                break
            time.sleep(wait)
            data = store.get(NAME)
        there = stated if data is None else parsed(data)
        if there.get("job") != self.digest:
            raise OutputError(f"is the work folder of another job: {_difference(there, stated)}", file=store.where)


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What is another in two jobs, the first of it."""
    if "about" not in there:
        return f"its {NAME} is damaged; remove the folder"
    known = there["about"]
    for name, value in here["about"].items():
        other = known.get(name) if isinstance(known, dict) else None
        if other != value:
            if name == "source":
                return f"its source is another ({there.get('source')} there, {here['source']} here)"
            if name == "asked" and isinstance(other, dict):
                name = next(k for k in {**value, **other} if value.get(k) != other.get(k))
                return f"{name} is {_said(other.get(name))} there, {_said(value.get(name))} here"
            return f"{name} is {_said(other)} there, {_said(value)} here"
    return f"its {NAME} is damaged; remove the folder"


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)


def opened(store: Store) -> tuple[str, Asked]:
    """The source and what was asked of the job that a work folder holds; SourceError where it holds none."""
    there = parsed(store.get(NAME))
    try:
        return str(there["source"]), Asked.of(there["asked"])
    except (KeyError, TypeError, AttributeError) as e:
        raise SourceError(f"holds no job: no {NAME} that could be read; is a rank started?", file=store.where) from e


def finished(store: Store, path: str | None = None) -> str:
    """The file that was written of the job, empty where none was; with a `path` it is that from now on."""
    if path is not None:
        store.put(DONE, json.dumps({"job": parsed(store.get(NAME)).get("job"), "file": os.path.abspath(path)}).encode())
    found = parsed(store.get(DONE))
    return str(found.get("file", "")) if found.get("job") == parsed(store.get(NAME)).get("job") else ""


def clean(store: Store) -> tuple[int, list[str]]:
    """Remove what a job has left in its work folder: files and folders removed, names that are none of its own."""
    opened(store)
    names = store.names("")
    mine = [name for name in names if FOLDERS.fullmatch(name)]
    for name in [*mine, DONE, NAME]:  # the job last: what was cut off here can be gone on with
        store.remove(name)
    store.remove("")
    return len(mine), [name for name in names if name not in (*mine, DONE, NAME)]


def job_of(path: str, source: Source, asked: Asked) -> Job:
    """The job that packs an open source."""
    changed, texts = asked.changed, dict[str, str]()
    for name in ("calibrate", "calibration"):
        if name in changed:
            changed[name], digests = _texts(changed[name])
            texts |= digests
    about: dict[str, Any] = {"rac": VERSION, "format": f"{wire.MAJOR}.{wire.MINOR}", "asked": changed}
    about["source"] = digest_of(source)
    runs = asked.lossy and asked.calibrate not in ("none", ["none"], ("none",))
    about |= {name: _version(name) for name in (*DECIDING, *(RUNNING if runs else ()))}
    if texts:
        about["texts"] = texts
    if asked.device != "cpu":  # another kind of it adds up in another order
        about["device"] = name_of(asked.device)
    return Job(os.path.abspath(path), asked, json.loads(json.dumps(about)))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _texts(given: Any) -> tuple[list[str], dict[str, str]]:
    """What is calibrated on, files by their names alone, and the digests of these: they may lie anywhere."""
    names, digests = list[str](), dict[str, str]()
    for name in [given] if isinstance(given, str | os.PathLike) else given:
        names.append(os.path.basename(name) if os.path.isfile(name) else os.fspath(name))
        if os.path.isfile(name):
            with guarded(SourceError, os.fspath(name)):
                digests[names[-1]] = fed(Digest(), name).value().hex()
    return names, digests


def digest_of(source: Source) -> str:
    """Digest, in hexadecimal, by which a source is known: all but its tensors, and a sample of these.

    Of at most SAMPLES tensors SAMPLE bytes are read; of all of them it has name, type and shape.
    """
    d = Digest()

    def feed(*what: Any) -> None:
        d.update(json.dumps(what, sort_keys=True, default=str).encode())

    feed(
        source.kind, dict(source.metadata), dict(source.links), source.folders, source.dequantised, dict(source.pieces)
    )
    for name, data in sorted({**source.headers, **source.frames}.items()):
        feed(name, len(data))
        d.update(data)
    for file in source.attachments:
        feed(file.name, len(file.data) if isinstance(file.data, bytes) else file.data.size)
        d.update(file.data[:SAMPLE] if isinstance(file.data, bytes) else _sample(file.data))
    for t in source.tensors:
        feed(t.name, t.dtype, t.shape, t.tie)
    for t in _spread(source.tensors):
        d.update(_sample(t))
    return d.value().hex()


def _spread(tensors: Sequence[SourceTensor]) -> list[SourceTensor]:
    step = -(-len(tensors) // SAMPLES)
    return list(tensors[:: max(1, step)])


def _sample(data: Any) -> bytes:
    """Bytes from the middle of a tensor or of a file."""
    size = data.nbytes if isinstance(data, SourceTensor) else data.size
    start = max(0, (size - SAMPLE) // 2)
    return bytes(data.read(start, min(size, start + SAMPLE)).data)
