"""The packer of a rank: what one machine's does, each stage shared with other ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from rac.calibrate.evaluate import Judge
from rac.calibrate.folder import DamagedError
from rac.calibrate.layers import Layers
from rac.encode import record, ties, workers
from rac.encode.align.recipe import Ask, Recipe, Sample, Seen, look
from rac.encode.allocate.budget import Search
from rac.encode.code.plan import LARGE, Level
from rac.encode.encoded import Encoded, Fidelity, Spool
from rac.encode.options import Hooks, Lossy, PackOptions
from rac.encode.pack import ByTrellis, Packer, Summary
from rac.encode.quantise.tensor import encode, encode_with_words, measure
from rac.encode.sources import Source, SourceTensor
from rac.errors import OutputError, RacError
from rac.ranks.crew import Crew, Made, Plan, Work
from rac.ranks.diverging import Diverging
from rac.ranks.held import SpoiledError, alone
from rac.ranks.learned import Learned
from rac.ranks.records import Records
from rac.ranks.stage import Home, Item, Marker, Stage
from rac.ranks.units import homes_of, seen_of, told
from rac.scratch import Scratch

T = TypeVar("T")
HEADS = 512  # bytes of a record beside its units, about, where a budget of the whole file is divided


@dataclass(frozen=True, slots=True)
class Elsewhere(Encoded):
    """A tensor that another rank may have encoded: what the search needs to know of it."""

    stated: int = 0

    @property
    def size(self) -> int:
        """Bytes of the record."""
        return self.stated


class _Length:
    """Bytes of which nothing is known but how many they are."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n


def _row(e: Encoded, sampled: bool = False) -> list[Any]:
    """What is exchanged of a tensor: a few numbers; of a sample also what its bytes are made of."""
    objects = [[o.name, o.size] for o in e.objects]
    fidelity = asdict(e.fidelity) if e.fidelity else None
    head: dict[str, Any] = {"name": e.name, "uses": [*e.head.get("uses", ())]}
    units = [len(u) for u in e.units]
    if sampled:
        head |= {key: e.head[key] for key in ("dtype", "shape", "axis", "tile")}
        head["stages"] = [{"id": s["id"], "sizes": s.get("sizes")} for s in e.head["stages"]]
    return [e.name, e.size, units if sampled else [sum(units)], objects, head, fidelity]


def _read(row: list[Any]) -> Elsewhere:
    _, size, units, objects, head, fidelity = row
    of = Fidelity(**fidelity | {"shape": tuple(fidelity["shape"])}) if fidelity else None
    parts = tuple(Elsewhere({"name": n}, [], {}, stated=s) for n, s in objects)
    return Elsewhere(head, [_Length(n) for n in units], {}, parts, of, size)  # type: ignore[misc]


def _lossless(groups: Sequence[ties.Group], level: Level, folder: str) -> Made:
    encoded = [record.whole(g, level) if g.tensor.nbytes < LARGE else _large(g, level, folder) for g in groups]
    return Made([[e.name, 0, [sum(map(len, e.units))], [], {"name": e.name}, None] for e in encoded], encoded)


def _large(group: ties.Group, level: Level, folder: str) -> Encoded:
    """A large lossless tensor, whose units are in a file of a folder."""
    encoder, spool = record.lossless(group.tensor, level), Spool(os.path.join(folder, "records"))
    spool.put(encoder.plan.fronts)
    for rows in record.pieces(encoder.plan.grid):
        spool.put(record.band(group.tensor, encoder, rows))
    return record.encoded(group, encoder.plan, spool, objects=record.matrix_of(group.tensor, level))


def _quantised(groups: Sequence[ties.Group], recipes: Sequence[Recipe], measured: bool) -> Made:
    encoded = [encode(g, recipe, measured) for g, recipe in zip(groups, recipes, strict=True)]
    return Made([_row(e) for e in encoded], encoded)


def _sampled(groups: Sequence[ties.Group], recipes: Sequence[Recipe]) -> Made:
    """What a sample comes to, of which no records are left."""
    every = zip(groups, recipes, strict=True)
    return Made([_row(encode(g, recipe, measured=False), sampled=True) for g, recipe in every])


def _seen(asked: Sequence[Ask], sample: Sample) -> Made:
    """What tensors say of how they are quantised."""
    return Made([told(seen) for seen in look(asked, sample)])


def _measured(encoded: Sequence[Encoded], tensors: Sequence[SourceTensor], recipes: Sequence[Recipe]) -> Made:
    """What quantising tensors came to; a lossless one has nothing to measure."""
    every = zip(encoded, tensors, recipes, strict=True)
    found = [measure(e, t, recipe).fidelity if e.fidelity else None for e, t, recipe in every]
    rows = zip(tensors, found, strict=True)
    return Made([[t.name, *((f.snr, f.zeros, f.seconds) if f else (math.nan, 0, 0.0))] for t, f in rows])


def _figures(row: list[Any]) -> tuple[str, float, int, float]:
    """Such a row: name, SNR, zeros that stayed zeros, seconds."""
    name, snr, zeros, seconds = row
    return str(name), float(snr), int(zeros), float(seconds)


@dataclass(slots=True)
class Gathered:
    """Records in the work folder by the name of their tensor: what a Packer takes instead of encoding anything."""

    crew: Crew
    _where: dict[str, tuple[Plan, Item, Marker]] = field(default_factory=dict)
    _fidelity: dict[str, Fidelity] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)
    _open: tuple[tuple[str, int], Records] | None = None

    def add(self, plan: Plan, markers: dict[int, Marker]) -> None:
        """The records of a stage."""
        for item in plan.stage.items:
            for row in markers[item.number].rows:
                self._where[row[0]] = plan, item, markers[item.number]
                self._sizes[row[0]] = row[1]
                if of := _read(row).fidelity:
                    self._fidelity[row[0]] = of

    def know(self, markers: dict[int, Marker]) -> None:
        """What the records came to, measured."""
        for name, snr, zeros, seconds in (_figures(row) for marker in markers.values() for row in marker.rows):
            if name in self._fidelity:
                self._fidelity[name] = replace(self._fidelity[name], snr=snr, zeros=zeros, seconds=seconds)

    @property
    def unmeasured(self) -> bool:
        """Whether it is not known of some tensors what quantising them came to."""
        return any(math.isnan(f.snr) for f in self._fidelity.values())

    def take(self, name: str) -> Encoded | None:
        """A tensor; None where no stage has it. What is damaged is made again."""
        if name not in self._where:
            return None
        plan, item, marker = self._where[name]
        try:
            e = self._records(plan, item, marker).tensor(name)
        except RacError:
            self.close()
            marker = self.crew.again(plan, item)
            self._where |= {g.tensor.name: (plan, item, marker) for g in item.groups}
            e = self._records(plan, item, marker).tensor(name)
        if self._sizes[name] and isinstance(e.units, list) and self._sizes[name] != e.size:  # it found the scale
            what = f"{name!r} takes {e.size} bytes, and its marker says {self._sizes[name]}: remove the work folder"
            raise OutputError(what, file=self.crew.store.where)
        return replace(e, fidelity=self._fidelity.get(name))

    def _records(self, plan: Plan, item: Item, marker: Marker) -> Records:
        key = plan.stage.key, item.number
        if self._open is None or self._open[0] != key:
            self.close()
            self._open = key, self.crew.records(plan, item, marker)
        return self._open[1]

    def put(self, name: str, e: Encoded) -> None:
        """Nothing: what is made is in the work folder."""

    def clear(self) -> None:
        """Forget all."""
        self.close()
        self._where.clear()
        self._fidelity.clear()

    def close(self) -> None:
        """Let go of the file that was read last."""
        if self._open:
            self._open[1].close()
            self._open = None


@dataclass(slots=True)
class SharedSearch(Search):
    """The search for the common scale, each try of which is a stage: all ranks read all sizes, and go on alike."""

    plan: Callable[[Sequence[ties.Group], Recipe, str], Plan] | None = None
    gathered: Gathered | None = None

    def _over(
        self, groups: Sequence[ties.Group], now: Recipe, work: Callable[[ties.Group, Recipe], T], what: str
    ) -> Iterator[T]:
        """What tensors came to at a scale, in their order: all that are quantised, or a sample of their rows."""
        assert self.plan is not None and self.gathered is not None  # noqa: S101, PT018
        whole = all(a is b for a, b in zip(groups, self._mine, strict=True))
        plan = self.plan(groups, now, ("measured" if work is encode else "") if whole else "sample")
        plan = replace(plan, stage=replace(plan.stage, what=f"looking for the scale: {what} at {now.scale:+.3f}"))
        markers = self.gathered.crew.do(plan)
        if whole:
            self.gathered.clear()
            self.gathered.add(plan, markers)
        for number in range(len(plan.stage.items)):
            yield from map(_read, markers[number].rows)  # type: ignore[misc]

    def _diverging(self, judge: Judge) -> Callable[[float, str], float]:
        assert self.gathered is not None  # noqa: S101
        gathered = self.gathered
        model = Diverging(gathered.crew, judge, {g.tensor.name: g for g in self._mine}, gathered.take)

        def at(scale: float, what: str) -> float:
            for e in self._at(scale, encode_with_words, what):
                self._keep(e)  # type: ignore[arg-type]  # what is known of it: another rank may have it
            return model.at(scale, what)

        return at


class RankPacker(Packer):
    """A pack that ranks share: `share` does work, `finish` writes the archive too. Leave it by `with`."""

    def __init__(self, source: Source, out: str, options: PackOptions, hooks: Hooks, crew: Crew) -> None:
        super().__init__(source, out, options, hooks)
        self._crew, self._gathered = crew, Gathered(crew)
        self._lossless = self._lossy = self._gathered  # type: ignore[assignment]
        folder = str(self.enter_context(Scratch("ranks")).path)
        self._homes: Mapping[str, Home] = {}
        self._learned, self._folder = Learned(crew, folder, self._threads), folder
        self.callback(self._gathered.close)

    def share(self, path: str, request: Lossy | None) -> tuple[int, int]:
        """Work until nothing is left that no other rank is doing: items done, and all, of the last stage."""

        def work() -> tuple[int, int]:
            done = of = 0
            for plan in self._last(self._recipe(path, request)):
                done, of = len(self._crew.do(plan, wait=False)), len(plan.stage.items)
            return done, of

        return self._mended(work)

    def finish(self, path: str, request: Lossy | None) -> Summary:
        """Do, or wait for, all that is left, and write the archive."""

        def work() -> Recipe | None:
            recipe = self._recipe(path, request)
            lossless, *measuring = self._last(recipe)
            self._gathered.add(lossless, self._crew.do(lossless))
            for plan in measuring:
                self._gathered.know(self._crew.do(plan))
            return recipe

        recipe = self._mended(work)
        return self.write(ByTrellis(recipe, self.kept) if recipe else None)

    def _mended(self, work: Callable[[], T]) -> T:
        """What some work gives, once more where a calibration in the work folder was damaged."""
        try:
            return work()
        except (SpoiledError, DamagedError):
            if not self._learned.mend():
                raise
        self._gathered.clear()
        return work()

    def _recipe(self, path: str, request: Lossy | None) -> Recipe | None:
        return self.allocate(path, request) if request else None

    def _once(self, calibration: Callable[[], Sequence[Layers]]) -> Sequence[Layers]:
        return self._learned.once(calibration)

    def _look(self, asked: Sequence[Sequence[Ask]], sample: Sample) -> Iterable[Seen]:
        layers = {t.name: layer for some in asked for t, layer in some}
        self._homes = homes_of(asked)
        parts = [[ties.Group(t, (), {}) for t, _ in some] for some in asked]
        stage = replace(Stage.parted("units", "choosing units", parts, self._homes), read=seen_of)

        def given(item: Item) -> list[Ask]:
            return [(g.tensor, layers[g.tensor.name]) for g in item.groups]

        def work(item: Item) -> Work:
            return _seen, (given(item), sample)

        need = lambda item: max(workers.taken(*ask) for ask in given(item))  # noqa: E731
        with alone():
            markers = self._crew.do(Plan(stage, work, need, self._pool))
        return [seen_of(row) for number in range(len(stage.items)) for row in markers[number].rows]

    def _search(self, recipe: Recipe) -> Search:
        note, shared = self._hooks.note, {"plan": self._tries, "gathered": self._gathered}
        return SharedSearch(self._groups, recipe, self._pool, note, None, **shared)  # type: ignore[arg-type]

    def _rest(self, recipe: Recipe) -> int:
        """About the bytes of all that is not quantised, with heads and index rows."""
        markers = self._crew.do(self._plain(recipe))
        size: int = sum(sum(row[2]) + HEADS for marker in markers.values() for row in marker.rows)
        return size + sum(sum(map(len, record.attachment(file).units)) + HEADS for file in self._files)

    def _plain(self, recipe: Recipe | None) -> Plan:
        """What stays lossless by its name, type or size."""
        groups = [g for g in self._groups if recipe is None or g.tensor.name not in recipe.aligned]
        level, stage = self._options.lossless, replace(Stage.of("lossless", "packing", groups), read=_read)
        work = (lambda item: (_lossless, (item.groups, level, self._folder)), lambda item: 2 * min(item.size, LARGE))
        return Plan(stage, *work, self._threads)

    def _tries(self, groups: Sequence[ties.Group], recipe: Recipe, kind: str) -> Plan:
        """What is quantised, or a sample of it, at a scale."""
        key = f"scale{recipe.scale!r}" + f"-{kind}" * bool(kind)

        def work(item: Item) -> Work:
            given = item.groups, _only(item, recipe)
            return (_sampled, given) if kind == "sample" else (_quantised, (*given, kind == "measured"))

        stage = replace(Stage.of(key, "", groups, self._homes), read=_read)
        return Plan(stage, work, lambda item: _need(item, recipe), self._pool)

    def _last(self, recipe: Recipe | None) -> Iterator[Plan]:
        """What is done when the scale is known."""
        yield self._plain(recipe)
        if recipe is None or not self._gathered.unmeasured:
            return
        plan = self._tries([g for g in self._groups if g.tensor.name in recipe.aligned], recipe, "")

        def work(item: Item) -> Work:
            encoded = [self._gathered.take(g.tensor.name) for g in item.groups]
            return _measured, (encoded, [g.tensor for g in item.groups], _only(item, recipe))

        yield replace(plan, stage=replace(plan.stage, key="measure", what="measuring", read=_figures), work=work)


def _only(item: Item, recipe: Recipe) -> list[Recipe]:
    return [workers.only(recipe, g.tensor.name) for g in item.groups]


def _need(item: Item, recipe: Recipe) -> int:
    """Bytes of memory that quantising an item takes, about: one tensor after the other."""
    return max(workers.need(g.tensor, recipe) for g in item.groups)
