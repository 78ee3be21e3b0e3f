"""Learned rotations: what there is of them, putting them into a model, keeping them in a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container.wire import MAGIC
from rac.decode.archive import RacFile
from rac.encode.sources import Attachment, Source
from rac.errors import MissingDependencyError, SourceError
from rac.methods.transforms import Parts, hadamard, matrix, online_down, rotate_residual, rotate_values

ATTACHMENT = "rotations/learned.bin"


@dataclass(frozen=True, slots=True)
class Rotations:
    """R1 and R2 of a model whose norms are fused."""

    r1: NDArray[np.float64]
    """(width, width), orthogonal: the residual stream x becomes R1 x."""
    r2: NDArray[np.float64]
    """(layers, head_dim, head_dim), each orthogonal: a value v becomes R2 v."""
    seed: int = 0
    """Seed of R4: layer i has the signs of seed + i."""
    about: dict[str, Any] = field(default_factory=dict)
    """How they were made, for the provenance: method, settings, what was minimised before and after."""
    history: tuple[float, ...] = ()
    """What was minimised, at every step."""


def fuse(p: Parts, found: Rotations) -> None:
    """Put rotations into a model whose norms are fused: R1 and R2 into weights, R4 online in front of the second half.

    R3 changes no weight: `transforms.rotated_keys` runs it. `require_same` finds whether nothing else has changed.

    ValueError where the rotations are those of another number of layers; TransformError as of `rotate_residual`,
    `rotate_values` and `online_down`: nothing of the model is right then.
    """
    if len(found.r2) != len(p.layers):
        raise ValueError(f"rotations of {len(found.r2)} layers, the model has {len(p.layers)}")
    rotate_residual(p, matrix(found.r1))
    for i, layer in enumerate(p.layers):
        rotate_values(p, layer, matrix(found.r2[i]))
        online_down(p, layer, found.seed + i)
    p.notes.append(f"R2, the values of each head: {len(found.r2)} learned matrices of order {p.head_dim}")
    p.notes.append(f"R4, online, in front of {p.rules.mlp_out}: {hadamard(p.inner, None).describe()}")
    p.about["rotations"] = json.dumps(found.about)  # files hold no floats


def to_bytes(found: Rotations) -> bytes:
    """A safetensors file of R1 and R2 in float32, the rest in its metadata, always the same bytes."""
    kept = {"r1": found.r1.astype(np.float32), "r2": found.r2.astype(np.float32)}
    stated = {"about": found.about, "history": found.history, "seed": found.seed}
    meta = {"rotations": json.dumps(stated)}  # one key: several come in no fixed order
    return bytes(_safetensors().save(kept, meta))


def save(found: Rotations, path: str | os.PathLike[str]) -> None:
    """Write `to_bytes`."""
    Path(path).write_bytes(to_bytes(found))


def load(path: str | os.PathLike[str]) -> Rotations:
    """What `save` wrote, or what a .rac file of a learned method carries, orthogonal in float64 again.

    SourceError where it is not there, or no such file; FormatError where the archive is damaged.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as f:
            data = f.read(len(MAGIC))
            data += b"" if data == MAGIC else f.read()
    except OSError as e:
        raise SourceError(f"no file of learned rotations: {e}", file=name) from e
    if data == MAGIC:
        with RacFile(name) as archive:
            if ATTACHMENT not in archive.attachments():
                raise SourceError("was not packed by a method that learns rotations", file=name)
            data = archive.attachment(ATTACHMENT)
    return _parse(data, name)


def _parse(data: bytes, file: str) -> Rotations:
    numpy = _safetensors()
    from safetensors import SafetensorError

    try:
        kept = numpy.load(data)
        stated = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        meta = json.loads(stated["rotations"])
        r1, r2 = (np.asarray(kept[n], np.float64) for n in ("r1", "r2"))
        about, history, seed = meta["about"], tuple(meta["history"]), int(meta["seed"])
    except (SafetensorError, KeyError, ValueError, TypeError) as e:
        what = f"it lacks {e}" if isinstance(e, KeyError) else str(e)
        raise SourceError(f"no file of learned rotations: {what}", file=file) from e
    square = all(r.ndim == n and r.shape[-1] == r.shape[-2] for n, r in ((2, r1), (3, r2)))
    if not square or not np.isfinite(r1).all() or not np.isfinite(r2).all() or not isinstance(about, dict):
        raise SourceError(f"no rotations: r1 is {r1.shape}, r2 is {r2.shape}", file=file)
    if any(np.abs(r @ r.T - np.eye(len(r))).max() > 1e-4 for r in (r1, *r2)):
        raise SourceError("a matrix is not orthogonal", file=file)
    return Rotations(nearest(r1), nearest(r2), seed, about, history)


def attached(source: Source, found: Rotations) -> Source:
    """A source whose file carries the rotations too, for those who want to know them: nothing reads them to decode."""
    return replace(source, attachments=(*source.attachments, Attachment(ATTACHMENT, to_bytes(found))))


def nearest(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """The orthogonal matrices (..., n, n) nearest to r: the polar factors."""
    u, _, v = np.linalg.svd(r)
    return np.asarray(u @ v)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as e:
        raise MissingDependencyError("rotations are kept in safetensors: pip install rac-codec[safetensors]") from e
    return safetensors.numpy
