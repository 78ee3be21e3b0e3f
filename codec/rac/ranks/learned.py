"""A calibration that one rank runs and all read: as files in the work folder, each what `Layers.save` writes."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from rac.calibrate.file import ABOUT, load
from rac.calibrate.layers import Layers
from rac.container.access import guarded
from rac.container.zstd import digest
from rac.encode.allocate.budget import OnText
from rac.errors import RacError, SourceError
from rac.ranks.crew import Crew, Made, Plan
from rac.ranks.stage import Item, Marker, Stage
from rac.ranks.store import fetched

PIECE = 1 << 24
Calibration = Callable[[], Sequence[Layers]]


@dataclass(slots=True)
class Learned:
    """The calibrations of a pack, in the order in which they are asked for."""

    crew: Crew
    folder: str
    """A local folder for copies of what is far away."""
    pool: Executor
    """Threads, one of which runs it."""
    _asked: int = 0

    def once(self, calibration: Calibration) -> Sequence[Layers]:
        """What a calibration finds, run by this rank or another; SourceError where it says so there."""
        stage = Stage(f"calibration{self._asked}", "calibrating", (Item(0, (), 1),))
        self._asked += 1
        if isinstance(calibration, OnText) and not self.crew.markers(stage, stage.items):
            calibration = self._shared(stage.key, calibration)
        plan = Plan(stage, lambda _: (self._run, (stage, calibration)), lambda _: 0, self.pool)
        marker = self.crew.do(plan)[0]
        try:
            return self._read(stage, marker)
        except RacError:
            if marker.rows and marker.rows[0][0] == "error":
                raise
            return self._read(stage, self.crew.again(plan, stage.items[0]))

    def _shared(self, key: str, on: OnText) -> Calibration:
        """What hands over what all ranks have found together, or runs what one rank has to find alone."""
        from rac.calibrate.chain import UnfitError  # imports torch
        from rac.ranks.sharded import Shared

        try:
            found = Shared(self.crew, key, self.folder).run(on.path, on.text, on.how)
        except UnfitError:
            return on
        return lambda: [found]

    def _run(self, stage: Stage, calibration: Calibration) -> Made:
        """Run it, and write what it found; an error that any rank would have is what it found."""
        try:
            found = calibration()
        except SourceError as e:
            return Made([["error", e.message, e.file]])
        rows: list[list[Any]] = []
        for layers in found:
            name = stage.name(stage.items[0], f"{len(rows)}.calibration")
            path = os.path.join(self.folder, f"{stage.key}.{len(rows)}.made")
            layers.save(path)
            with guarded(SourceError, path), self.crew.store.writing(name) as out, open(path, "rb") as made:
                shutil.copyfileobj(made, out, PIECE)
            rows.append([name, _about(path), layers.missing])
            os.unlink(path)
        return Made(rows)

    def _read(self, stage: Stage, marker: Marker) -> list[Layers]:
        out = []
        for name, about, missing in marker.rows:
            if name == "error":
                raise SourceError(about, file=missing)
            path = fetched(self.crew.store, name, self.folder)
            if _about(path) != about:
                raise SourceError("is not what was written", file=path)
            layers = load(path)
            out.append(Layers(layers, layers.tokens, layers.digest, missing))
        return out


def _about(path: str) -> str:
    """Digest, in hexadecimal, of the description of a calibration, in which the digests of all its arrays are."""
    with guarded(SourceError, path, of=(OSError, zipfile.BadZipFile, KeyError)), zipfile.ZipFile(path) as archive:
        return digest(archive.read(ABOUT)).hex()
