"""Matrices that are on a grid already (RTN, GPTQ) to an archive: codes through a coder, groups/1 behind it."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rac.container import zstd
from rac.encode import record as rec
from rac.encode import ties
from rac.encode.align.recipe import matrix_of
from rac.encode.code.plain import BitsEncoder
from rac.encode.code.plan import LEVELS, Level, Plan, axis_of
from rac.encode.code.table import analyse
from rac.encode.encoded import Bytes, Encoded, Fidelity
from rac.encode.options import Hooks, PackOptions, Progress, silent
from rac.encode.pack import Packer, Summary
from rac.encode.schedule import Job
from rac.encode.sources import Source, SourceTensor
from rac.errors import SourceError
from rac.grid import matrix
from rac.native.prototypes import F32
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

    What a reader gets of a quantised tensor are `groups.values`, rounded to its data type once. `level`, `jobs`,
    `lanes`, `slices`, `shard_size` and `force` are those of `rac.pack`.

    `source` is what `open_source` or `transforms.source` gives; its online transforms are kept. `matrices` go by names
    of tensors of F32, F16 or BF16; each is (R, C) as the tensor's matrix is: all dimensions but the last are rows. A
    name that is tied to others stands for all of them; of names of equal content that of the first counts. A mapping
    that makes its values when it is asked for them need not hold them all. With `entropy` codes are coded with lanes/1
    where that is smaller than bits/1, their fixed rate. `settings` are for the provenance: the name of the recipe,
    bits, group and so on; numbers are whole or text. `progress` is called after every tensor, `layer` after every
    quantised one.

    SourceError where a name is not in the source, its tensor and matrix do not fit each other, or what the matrix
    stands for is too large for the data type; OutputError where the output exists, or cannot be written; ValueError
    where a matrix is not as `Grouped` says.
    """
    options = PackOptions(level, jobs, lanes, slices, shard_size, force=force)
    about = {"entropy": entropy, **(settings or {})}
    quantiser = ByGroups(matrices, _firsts(source, matrices), options.coder, entropy, about)
    try:
        with Packer(source, out, options, Hooks(progress or silent, layer=layer or silent)) as packer:
            return packer.write(quantiser)
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
class ByGroups:
    """Quantises by groups/1: gives the tensors that are on a grid already."""

    matrices: Mapping[str, Grouped]
    names: Mapping[str, str]
    """Names of records to those in `matrices`."""
    coder: Level
    entropy: bool
    about: Mapping[str, Any]

    def need(self, t: SourceTensor) -> int:
        """Bytes of memory that the work on a tensor takes, about."""
        return PER_WEIGHT * math.prod(t.shape)

    def job(self, group: ties.Group) -> Job:
        """The work on a tensor."""
        return self.encode, (group,)

    def encode(self, group: ties.Group) -> Encoded:
        """A tensor whose numbers are those that its codes stand for. SourceError where they do not fit it."""
        start, t = time.perf_counter(), group.tensor
        g, shape = self.matrices[self.names[t.name]], matrix(t.dtype, t.shape, axis_of(t.shape))
        if g.codes.shape != shape:
            raise SourceError(f"tensor {t.name!r} is a matrix of {shape}, its codes are of {g.codes.shape}")
        p, unit = groups.build_unit(g)
        plan, tiles = self._coded(g)
        exact = groups.values(g)
        words = to_words(exact, t.dtype)
        numbers, w = from_words(words, t.dtype), matrix_of(t)
        if not np.isfinite(numbers).all():
            raise SourceError(f"tensor {t.name!r}: what its codes stand for is too large for {t.dtype}")
        energy, error = _lost(g, numbers.reshape(w.shape), exact, w)
        snr = 10 * math.log10(energy / error) if error > 0 and energy > 0 else math.inf
        seconds = time.perf_counter() - start
        fidelity = Fidelity(t.name, t.shape, "identity", 0, 1, snr, outliers=0, dead=0, seconds=seconds)
        behind = rec.Behind(p, zstd.digest(words.reshape(-1).view(np.uint8).data), ties.digest(t))
        units: list[Bytes] = [*plan.fronts, unit, *tiles]
        objects = rec.matrix_of(t, LEVELS["default"])
        return rec.encoded(group, plan, units, behind, objects, fidelity)

    def _coded(self, g: Grouped) -> tuple[Plan, list[Bytes]]:
        """How the codes are stored, and the units of their tiles: with `entropy` in the smaller way."""
        codes = np.ascontiguousarray(g.codes)
        encoder = analyse(lambda _, a, b: codes[a:b], "U8", codes.shape, self.coder)
        flat = BitsEncoder.of(encoder.plan, codes, g.bits)
        fixed = rec.tiles(flat, codes)
        if self.entropy:
            tiles = rec.tiles(encoder, codes)
            if sum(map(len, tiles)) + len(encoder.plan.front) < sum(map(len, fixed)):
                return encoder.plan, tiles
        return flat.plan, fixed


def _lost(g: Grouped, numbers: F32, exact: F32, source: F32) -> tuple[float, float]:
    """Energy of a matrix, and of the error of the `numbers` that a reader gets for it.

    Where the matrix was rounded in place its source holds the numbers of the grid, and `lost` says what they were made
    of; the rounding to the data type comes on top.
    """
    e = numbers - (source if g.lost is None else exact)
    energy, error = (float(np.vdot(source, source)), 0.0) if g.lost is None else g.lost
    return energy, error + float(np.vdot(e, e))
