"""A calibration that ranks share: batches of a text through one block after the other, the steps of `passes.Passes`.

What a batch leaves is its hidden states, its gradients, and what it adds to the sums of second moments. These are added
up in the order of the batches, by whichever rank comes to it, as one machine does: the numbers do not depend on how
many ranks there are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate import passes
from rac.calibrate.chain import UnfitError
from rac.calibrate.folder import Folder, fed
from rac.calibrate.given import Given
from rac.calibrate.leading import Leading
from rac.calibrate.moments import Sums
from rac.calibrate.outer import Outer
from rac.calibrate.wide import Wide
from rac.container.zstd import Digest
from rac.errors import RacError, SourceError
from rac.ranks.agree import agree
from rac.ranks.crew import Crew, Made, Plan
from rac.ranks.held import Held, alone, uploaded, written
from rac.ranks.stage import Item, Marker, Stage
from rac.ranks.store import Disk, fetched

Row = list[Any]


@dataclass(frozen=True, slots=True)
class Shared:
    """Who shares a calibration, and where its files are."""

    crew: Crew
    key: str
    """What names of stages and files begin with."""
    folder: str
    """A local folder for copies."""

    def run(self, path: str | Given, text: str | None, how: Mapping[str, Any]) -> Held:
        """What the model finds on a text, or on text of its own; UnfitError where it is no chain of blocks."""
        given = path if isinstance(path, Given) else None
        more = {key: how[key] for key in ("device", "outer") if key in how}
        asked = passes.Asked(os.fspath(path), how["tokens"], how["context"], how["fisher"], given, **more)
        held = Held(self.crew.store)
        with ThreadPoolExecutor(1) as pool:
            if text is None:
                self._own_text(asked, held, pool)
            steps = partial(_SharedPasses, shared=self, pool=pool)
            passes.find(asked, text, held, how["note"], steps)
        return held

    def _own_text(self, asked: passes.Asked, held: Held, pool: ThreadPoolExecutor) -> None:
        """Have one rank let the model write."""
        stage = Stage(f"{self.key}-tokens", "writing its own text", (Item(0, (), 1),))

        def work() -> Made:
            folder = Folder(None, "")
            try:
                passes.own_text(asked, folder, self.crew.note)
            except SourceError as e:
                return Made([["error", e.message, e.file]])
            return Made([uploaded(self.crew.store, folder, "ids.npy", stage.name(stage.items[0], "npy"))])

        with alone():
            row = self.crew.do(Plan(stage, lambda _: (work, ()), lambda _: 0, pool))[0].rows[0]
        if row[0] == "error":
            raise SourceError(row[1], file=row[2])
        held.know(row)


class _SharedPasses(passes.Passes):
    """The steps, each a stage whose items are batches."""

    def __init__(self, *args: Any, shared: Shared, pool: ThreadPoolExecutor) -> None:
        super().__init__(*args)
        self._key, self._crew, self._pool, self._local = shared.key, replace(shared.crew, jobs=1), pool, shared.folder
        self._store = shared.crew.store
        self._left: list[Row] = []  # by the item that is in work
        self._plans = [self._plan(number) for number in range(len(self.steps))]
        self._markers: list[dict[int, Marker]] = []
        self._from = {piece: number for number, piece in enumerate(map(self._writes, range(len(self.steps)))) if piece}

    def _writes(self, number: int) -> tuple[str, int] | None:
        """What a step leaves for others."""
        step, i, *_ = self.steps[number]
        every = {"_start": ("hidden", 0), "_forward": ("hidden", i + 1), "_backward": ("gradient", i)}
        every |= {"_end": ("gradient", i)} if self.fisher else {}
        return every.get(step.__name__)

    def _units(self, number: int) -> list[tuple[int, int]]:
        return self.units(1 if self.steps[number][0].__name__ in ("_end", "_back") else self.batch)

    def _plan(self, number: int) -> Plan:
        """The stage of a step."""
        items = tuple(Item(k, (), b - a) for k, (a, b) in enumerate(self._units(number)))
        what = f"calibrating, step {number + 1} of {len(self.steps)}"
        stage = Stage(f"{self._key}-{number:04}", what, items)
        return Plan(stage, lambda item: (self._work, (number, item.number)), lambda _: 0, self._pool)

    def go(self) -> None:
        """Do the steps with others; what is found is in the folder's state, arrays where they were made."""
        with alone():
            agree(
                self._store, self._key, {"sequences at once": self.batch}
            )  # fewer where a device has no memory for more
            self._go()

    def _go(self) -> None:
        self.folder.state["layers"] = {}
        adding: list[Plan] = []
        for number, plan in enumerate(self._plans):
            self._markers.append(self._crew.do(plan))
            rows = [row for marker in self._markers[-1].values() for row in marker.rows]
            if why := [row[1] for row in rows if row[0] == "unfit"]:
                raise UnfitError(why[0])
            if any(row[0] == "sums" for row in rows):
                stage = Stage(f"{plan.stage.key}-sum", f"{plan.stage.what}: sums", (Item(0, (), 1),))
                adding.append(Plan(stage, lambda _, n=number: (self._sum, (n,)), lambda _: 0, self._pool))  # type: ignore[misc]
                self._crew.do(adding[-1], wait=False)
        for plan in adding:
            layers, *files = self._crew.do(plan)[0].rows
            self.folder.state["layers"] |= layers[0]
            for row in files:
                self.folder.know(row)  # type: ignore[attr-defined]

    def each(self, key: str, count: int, work: Callable[[int], list[list[float]]]) -> list[list[float]]:
        """The same, each part by one rank."""
        items = tuple(Item(k, (), 1) for k in range(count))
        stage = Stage(f"{self._key}-{key}", f"measuring {key}", items)
        plan = Plan(stage, lambda item: (lambda: Made(work(item.number)), ()), lambda _: 0, self._pool)
        with alone():
            markers = self._crew.do(plan)
        return [row for k in range(count) for row in markers[k].rows]

    def _tell(self, sequences: int) -> None:
        """Nothing: stages tell."""

    def _work(self, number: int, unit: int) -> Made:
        """A step of one batch."""
        before = self.only, self._left
        self.only, self._left = self._units(number)[unit], []
        step, i, *_ = self.steps[number]
        try:
            with Wide(), torch.enable_grad():
                self._do(step, i)
            return Made(self._left)
        except UnfitError as e:
            return Made([["unfit", str(e)]])
        finally:
            self.only, self._left = before

    def _name(self, what: str, ending: str) -> str:
        assert self.only is not None  # noqa: S101
        return f"{self._key}-{what}/{self.only[0]:06}.{ending}"

    @contextlib.contextmanager
    def _sink(self, kind: str, i: int) -> Iterator[Callable[[Any], None]]:  # type: ignore[override]
        pieces: list[Any] = []
        yield pieces.append
        name = self._name(f"{kind}-{i:04}", "npy")
        with written(self._store, name) as f:
            np.lib.format.write_array(f, np.concatenate(pieces), allow_pickle=False)  # type: ignore[arg-type]
        self._left.append([kind, f.size, f.digest.value().hex(), name])

    def _save(self, sums: Sums, tag: str, outputs: bool) -> None:
        if not sums.rows:
            return
        name = self._name(f"sums-{tag}-{int(outputs)}", "npy")
        with written(self._store, name) as f:
            outer = [one.total for one in sums.outer.values()]
            for total in (*sums.second.values(), *sums.squares.values(), *outer):
                array = total.array if isinstance(total, Leading) else total
                np.lib.format.write_array(f, array, allow_pickle=False)  # type: ignore[arg-type]
        about = asdict(replace(sums, second={}, squares={}, outer={})) | {"alone": sorted(sums.alone)}
        about |= {"second": [*sums.second], "squares": [*sums.squares]}
        about["outer"] = {name: [one.chance, one.batches] for name, one in sums.outer.items()}
        about["leading"] = [name for name, total in sums.second.items() if isinstance(total, Leading)]
        self._left.append(["sums", f.size, f.digest.value().hex(), name, tag, outputs, about])

    @contextlib.contextmanager
    def _opened(self, number: int, unit: int, kind: str) -> Iterator[tuple[Row, BinaryIO]]:
        """What a batch has left in a step; where it is damaged or gone, the batch is run again."""
        row = next(row for row in self._markers[number][unit].rows if row[0] == kind)
        path = self._checked(row)
        if path is None:
            plan = self._plans[number]
            marker = self._crew.leave(plan.stage, plan.stage.items[unit], self._work(number, unit), 0.0)
            self._markers[number][unit] = marker
            row = next(row for row in marker.rows if row[0] == kind)
            path = self._checked(row)
        if path is None:
            raise SourceError("is not what was written", file=f"{self._store.where}/{row[3]}")
        try:
            with open(path, "rb") as f:
                yield row, f
        finally:
            if not isinstance(self._store, Disk):
                os.unlink(path)

    def _checked(self, row: Row) -> str | None:
        """The path of a file that is what was written; None where it is not."""
        with contextlib.suppress(RacError, OSError):
            path = fetched(self._store, row[3], self._local)
            if fed(Digest(), path).value().hex() == row[2]:
                return path
        return None

    def _read(self, kind: str, i: int, start: int, end: int) -> Any:
        number, found = self._from[kind, i], list[NDArray[np.float32]]()
        for unit, (a, b) in enumerate(self._units(number)):
            if a < end and start < b:
                with self._opened(number, unit, kind) as (_, f):
                    array = np.lib.format.read_array(f, allow_pickle=False)
                found.append(array[max(0, start - a) : end - a])
        return torch.from_numpy(np.concatenate(found))

    def _sum(self, number: int) -> Made:
        """Add up what the batches of a step have left, in their order."""
        total, tag, outputs = Sums(), "", False
        for unit in range(len(self._units(number))):
            if not any(row[0] == "sums" for row in self._markers[number][unit].rows):
                continue
            with self._opened(number, unit, "sums") as (row, f):
                *_, tag, outputs, about = row
                read = partial(np.lib.format.read_array, f, allow_pickle=False)
                second = {name: read() for name in about["second"]}
                squares = {name: read() for name in about["squares"]}
                outer = {name: Outer(read(), *known) for name, known in about["outer"].items()}
            about = dict(about)
            second |= {name: Leading.from_array(second[name]) for name in about.pop("leading")}
            sums = {"second": second, "squares": squares, "outer": outer, "alone": set(about["alone"])}
            total.add(Sums(**about | sums))
        folder = Folder(None, "")
        total.save(folder, tag, self.ids.numel(), outputs)
        far = f"{self._key}-{number:04}-sum"
        rows = [uploaded(self._store, folder, name, f"{far}/{name}") for name in folder.names]
        return Made([[folder.state["layers"]], *rows])
