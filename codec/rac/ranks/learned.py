"""Calibrations that all ranks read: what they have found together, or what one has, as `Layers.save` writes it."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from rac.calibrate.file import ABOUT, load
from rac.calibrate.layers import Layers, layers_of
from rac.container.access import guarded
from rac.container.zstd import digest
from rac.encode.allocate.budget import OnText
from rac.errors import RacError, SourceError
from rac.ranks.crew import Crew, Made, Plan
from rac.ranks.held import Held, alone
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
    _held: dict[str, Held] = field(default_factory=dict)

    def once(self, calibration: Calibration) -> Sequence[Layers]:
        """What a calibration finds, run by this rank or another; SourceError where it says so there."""
        stage, held = Stage(f"calibration{self._asked}", "calibrating", (Item(0, (), 1),)), None
        self._asked += 1
        if isinstance(calibration, OnText) and not self.crew.markers(stage, stage.items):
            held = self._shared(stage.key, calibration)
        plan = Plan(stage, lambda _: (self._run, (stage, calibration, held)), lambda _: 0, self.pool)
        with alone():
            marker = self.crew.do(plan)[0]
            try:
                found = self._read(stage, marker)
            except RacError:
                if stage.key in self._held:
                    raise
                found = self._read(stage, self.crew.again(plan, stage.items[0]))
        if isinstance(found, SourceError):
            raise found
        return found

    def _shared(self, key: str, on: OnText) -> Held | None:
        """What all ranks have found together; None: one rank has to find it, or that it cannot be found, alone."""
        from rac.calibrate.chain import UnfitError  # imports torch
        from rac.ranks.sharded import Shared

        try:
            return Shared(self.crew, key, self.folder).run(on.path, on.text, on.how)
        except UnfitError:
            return None
        except SourceError:
            if self.crew.store.get(f"{key}-machine.json") is None:
                return None
            with alone():  # others calibrate: it is this machine where something is wrong
                raise

    def mend(self) -> bool:
        """Have what is damaged of that be found again, when it is asked for next; whether anything was."""
        for key, held in self._held.items():
            for file in held.spoiled():  # beside its marker
                self.crew.store.put(f"{os.path.dirname(file)}/00000.json", b"")
            self.crew.store.put(f"{key}/00000.json", b"")
        self._asked, held_any = 0, bool(self._held)
        self._held.clear()
        return held_any

    def _run(self, stage: Stage, calibration: Calibration, held: Held | None) -> Made:
        """Run it, and write what it found; an error that any rank would have is what it found."""
        if held is not None:
            return Made([held.told(stage.key)])
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

    def _read(self, stage: Stage, marker: Marker) -> list[Layers] | SourceError:
        out = []
        for name, about, missing in marker.rows:
            if name == "error":
                return SourceError(about, file=missing)
            if name == "held":
                self._held[stage.key] = held = Held.of(self.crew.store, marker.rows[0])
                return [layers_of(held, stage.key)]
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
