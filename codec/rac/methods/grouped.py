"""Matrices that are on a grid already (RTN, GPTQ) to an archive: codes through a coder, groups/1 behind it."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container import zstd
from rac.encode import record as rec
from rac.encode import ties
from rac.encode.align.recipe import matrix_of
from rac.encode.code.plain import BitsEncoder
from rac.encode.code.plan import CODER, LEVELS, Level, Plan, axis_of, tuned
from rac.encode.code.table import analyse
from rac.encode.encoded import Bytes, Encoded, Fidelity
from rac.encode.options import Progress
from rac.encode.pack import Summary, pack_source
from rac.encode.schedule import Job
from rac.encode.sources import Source, SourceTensor
from rac.errors import SourceError
from rac.grid import matrix
from rac.stages import groups
from rac.stages.groups import Grouped
from rac.stages.words import DTYPES, from_words, to_words

PER_WEIGHT = 24
"""Bytes that the work takes for each weight of a matrix."""


def pack_grouped(
    source: Source,
    matrices: Mapping[str, Grouped],
    out: str | os.PathLike[str],
    entropy: bool,
    settings: Mapping[str, Any] | None = None,
    *,
    level: str = "default",
    jobs: int | None = None,
    lanes: int | None = None,
    slices: str | None = None,
    shard_size: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    layer: Callable[[Fidelity], None] | None = None,
) -> Summary:
    """Pack a source; the tensors that `matrices` has as they are there, the others losslessly.

    What a reader gets of a quantised tensor are `groups.values`, rounded to its data type once.

    Args:
        source: As `open_source` or `transforms.source` gives it. Its online transforms are kept.
        matrices: By names of tensors of F32, F16 or BF16; each is (R, C) as the tensor's matrix is: all dimensions but
            the last are rows. A name that is tied to others stands for all of them; of names of equal content that of
            the first counts. A mapping that makes its values when it is asked for them need not hold them all.
        out: The .rac file to write; with `shard_size` the stem of a set.
        entropy: Code the codes, with lanes/1 where that is smaller than bits/1. False: bits/1, at their fixed rate.
        settings: For the provenance: the name of the recipe, bits, group and so on; numbers are whole or text.
        level: Effort level of the tensors that stay lossless.
        jobs: Threads; one per core up to 8 by default. The bytes do not depend on it.
        lanes: ANS lanes per tile.
        slices: "fine" or "coarse", as in `pack`.
        shard_size: Dense bytes after which a new shard begins.
        force: Replace a file that exists.
        progress: Called after every tensor.
        layer: Called after every quantised tensor.

    Raises:
        SourceError: A name is not in the source, its tensor and matrix do not fit each other, or what the matrix stands
            for is too large for the data type.
        OutputError: The output exists, or cannot be written.
        ValueError: A matrix is not as `Grouped` says.
    """
    found = _firsts(source, matrices)
    quantiser = _ByGroups(matrices, found, tuned(CODER, lanes, slices), entropy, dict(settings or {}))
    try:
        return pack_source(
            source,
            out,
            level=level,
            jobs=jobs,
            lanes=lanes,
            shard_size=shard_size,
            force=force,
            progress=progress,
            layer=layer,
            slices=slices,
            quantiser=quantiser,
        )
    except KeyboardInterrupt:  # codes are not made twice alike for sure, so that nobody can go on with a part
        stem = glob.escape(os.fspath(out).removesuffix(".rac"))
        for part in (f"{os.fspath(out)}.part", *glob.glob(f"{stem}-*-of-*.rac.part")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        raise


def _firsts(source: Source, matrices: Mapping[str, Grouped]) -> dict[str, str]:
    """Names of records to names in `matrices`."""
    if unknown := set(matrices) - {t.name for t in source.tensors}:
        raise SourceError(f"{len(unknown)} quantised tensors are not in the source, one is {min(unknown)!r}")
    out = {}
    for group in ties.find(source.tensors):
        names = [n for n in (group.tensor.name, *(a for a, _ in group.aliases)) if n in matrices]
        if names and group.tensor.dtype not in DTYPES:
            raise SourceError(f"tensor {names[0]!r} is {group.tensor.dtype} and cannot be quantised in groups")
        if names:
            out[group.tensor.name] = names[0]
    return out


@dataclass(frozen=True, slots=True)
class _ByGroups:
    """Quantises by groups/1: gives the tensors that are on a grid already."""

    matrices: Mapping[str, Grouped]
    found: Mapping[str, str]
    coder: Level
    entropy: bool
    settings: Mapping[str, Any]

    @property
    def about(self) -> Mapping[str, Any]:
        """What the provenance states: how the codes are stored, and what the caller says."""
        return {"entropy": self.entropy, **self.settings}

    @property
    def names(self) -> Container[str]:
        """The names of the records that are quantised."""
        return self.found

    def need(self, t: SourceTensor) -> int:
        """Bytes of memory that the work on a tensor takes, about."""
        return PER_WEIGHT * math.prod(t.shape)

    def job(self, group: ties.Group) -> Job:
        """The work on a tensor."""
        return self.encode, (group,)

    def encode(self, group: ties.Group) -> Encoded:
        """A tensor with the codes of its matrix."""
        t = group.tensor
        return encode(group, self.matrices[self.found[t.name]], self.coder, self.entropy)


def encode(group: ties.Group, g: Grouped, coder: Level, entropy: bool) -> Encoded:
    """A tensor whose numbers are those that `g` stands for. SourceError where they do not fit it."""
    start, t = time.perf_counter(), group.tensor
    shape = matrix(t.dtype, t.shape, axis_of(t.shape))
    if g.codes.shape != shape:
        raise SourceError(f"tensor {t.name!r} is a matrix of {shape}, its codes are of {g.codes.shape}")
    p, unit = groups.build_unit(g)
    plan, tiles = coded(g, coder, entropy)
    words = to_words(groups.values(g), t.dtype)
    numbers = from_words(words, t.dtype)
    if not np.isfinite(numbers).all():
        raise SourceError(f"tensor {t.name!r}: what its codes stand for is too large for {t.dtype}")
    behind = rec.Behind(p, zstd.digest(words.reshape(-1).view(np.uint8).data), ties.digest(t))
    fidelity = Fidelity(
        t.name,
        t.shape,
        "identity",
        0,
        1,
        _snr(matrix_of(t), numbers),
        0,
        0,
        time.perf_counter() - start,
    )
    units: list[Bytes] = [*plan.fronts, unit, *tiles]
    objects = rec.matrix_of(t, LEVELS["default"])
    return rec.encoded(group, plan, units, behind, objects, fidelity)


def coded(g: Grouped, coder: Level, entropy: bool) -> tuple[Plan, list[Bytes]]:
    """How the codes are stored, and the units of their tiles: with `entropy` in the smaller way."""
    codes = np.ascontiguousarray(g.codes)
    encoder = analyse(lambda _, a, b: codes[a:b], "U8", codes.shape, coder)
    flat = BitsEncoder.of(encoder.plan, codes, g.bits)
    fixed = rec.tiles(flat, codes)
    if entropy:
        tiles = rec.tiles(encoder, codes)
        if sum(map(len, tiles)) + len(encoder.plan.front) < sum(map(len, fixed)):
            return encoder.plan, tiles
    return flat.plan, fixed


def _snr(w: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Signal to noise of the weights, in dB."""
    e = found.reshape(w.shape) - w
    energy, error = float(np.vdot(w, w)), float(np.vdot(e, e))
    return 10 * math.log10(energy / error) if error > 0 and energy > 0 else math.inf
