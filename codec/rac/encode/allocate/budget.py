"""How fine everything is quantised, so that the file meets a budget in real bytes or a quality."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from rac.calibrate.builtin import AUTO, learned, measured
from rac.calibrate.evaluate import Judge
from rac.calibrate.file import load
from rac.calibrate.given import Given
from rac.calibrate.inputs import calibrate as calibrate_on
from rac.calibrate.inputs import inputs_of
from rac.calibrate.layers import Layer, Layers, calibrate, joined
from rac.calibrate.pooling import readings
from rac.calibrate.text import Note
from rac.container import zstd
from rac.encode import ties, workers
from rac.encode.align.choose import choose
from rac.encode.align.recipe import Look, Recipe, Sample, composed, data_free, look_here, looked
from rac.encode.allocate.few import Few, few
from rac.encode.allocate.made import matched
from rac.encode.encoded import Encoded, Kept
from rac.encode.options import CONTEXT, DECIBELS, Budget, Lossy, silent
from rac.encode.quantise.tensor import encode, encode_with_words, size_of
from rac.errors import BudgetError, SourceError
from rac.linalg.device import check
from rac.linalg.factors import Factors
from rac.machine import room
from rac.stages.words import from_words

T = TypeVar("T")
TOLERANCE = 0.005
CLOSE = 0.1  # decibels that a file may have beyond the --snr that was asked for
FINEST = 12.0  # bits at which a search begins at most: words have 8, and beyond them most tensors are lossless
LEAN = 0.4  # where in the tolerance a sample aims: rows alone take a little more than as a part of their tensor
NEAR = 0.0005  # share of the bits to which a sample is to meet them
TRIES, FAR = 6, 60  # scales that a sample is tried at, and how far from 0 none can be
FAR_APART = 0.1  # scales between which the rate's slope is found
LOSSLESS = 100.0  # decibels that a tensor counts for at most


Once = Callable[[Callable[[], Sequence[Layers]]], Sequence[Layers]]
"""What runs a calibration, or knows what another process has found by running it."""


@dataclass(frozen=True, slots=True)
class OnText:
    """A calibration of a language model on a text; None: on text that it writes. `how` as `calibrate` has it."""

    path: str | Given
    text: str | None
    how: Mapping[str, Any]

    def __call__(self) -> Sequence[Layers]:
        """What it finds."""
        return [calibrate(self.path, self.text, **self.how)]


def here(calibration: Callable[[], Sequence[Layers]]) -> Sequence[Layers]:
    """What a calibration finds that is run now."""
    return calibration()


def recipe_for(
    groups: Sequence[ties.Group],
    path: str | Given,
    request: Lossy,
    note: Note = silent,
    once: Once = here,
    by: Look = look_here,
) -> Recipe:
    """The recipe that the request and the weights (and the calibration, if any) give, at common scale 0.

    `path` is the folder of the model, which a calibration runs. Where nobody has named the texts, and the model cannot
    be run over them, that is said, and it is from the weights alone.
    """
    c = request.calibration
    check(c.device)
    if c.remark:
        note(c.remark, 0, 0)
    failed: dict[str, str] = {}
    if c.any:
        try:
            return _learned(groups, path, request, note, once, by)
        except SourceError as e:
            if c.named or request.needs_texts:
                raise
            why = f"the model could not be calibrated, and is quantised from the weights alone: {e}"
            failed = {"uncalibrated": e.message}
            note(why, 0, 0)
            if note is silent:
                warnings.warn(why, stacklevel=2)
    recipe = data_free(groups, request.keep, request.effort, request.embeddings, by)
    return replace(recipe, about={**recipe.about, **request.about, **failed})


def _learned(
    groups: Sequence[ties.Group], path: str | Given, request: Lossy, note: Note, once: Once, by: Look
) -> Recipe:
    """The recipe that the calibration gives."""
    effort = request.effort
    found, used = _calibrations(groups, path, request, note, once)
    layers, factors = found[0] if len(found) == 1 else joined(found), Factors(request.calibration.device)
    layers = {name: replace(layer, factors=factors) for name, layer in layers.items()}
    every = (one.missing.items() for one in found if isinstance(one, Layers))
    missing = {name: part for one in every for name, part in one if name not in layers}
    sample = replace(Sample.general() if request.calibration.general else Sample(), rows=effort == "max")
    of = looked(groups, layers, request.keep, request.embeddings, sample, missing, by)
    recipe = composed(of, layers, effort, sample, missing)
    rank = 0 if request.rank is None and effort != "max" else request.rank  # takes long to find, and is rare
    recipe = choose(recipe, groups, rank, request.align, request.budget.expected)
    slopes = {name: f"{one.slope:.4g}" for name, one in layers.items() if name in recipe.aligned and one.slope}
    measured: dict[str, Any] = {"slopes": slopes} if slopes else {}
    if fed := sum(a.by_outputs for a in recipe.aligned.values()):
        measured["rows"] = fed  # tensors whose errors are fed back along rows too
    return replace(recipe, about={**recipe.about, **request.about, "calibrate": used, **measured})


def _calibrations(
    groups: Sequence[ties.Group], path: str | Given, request: Lossy, note: Note, once: Once
) -> tuple[list[Mapping[str, Layer]], list[dict[str, Any]]]:
    """What each text, and each calibration made beforehand, says of the tensors; and what the provenance says of it."""
    c, found = request.calibration, list[Mapping[str, Layer]]()
    used: list[dict[str, Any]] = []
    for name in c.texts:
        if (media := inputs_of(path, name)) is not None:
            made = once(partial(calibrate_on, path, replace(media, backward=c.backward), note, c.cache))
            found.append(joined([matched(groups, layers, name) for layers in made]))
            used.append({media.kind: media.digest, "tokens": max(layers.tokens for layers in made)})
            continue
        text = None if name == "self" else learned() if name == AUTO else read_text(name)
        how: Any = {"fisher": c.backward, "note": note, "cache": c.cache}
        how |= {} if c.device == "cpu" else {"device": c.device}
        how |= {"outer": True} if c.backward and request.effort == "max" else {}
        parts = readings(path, text, c.tokens, c.context)
        each = [once(OnText(path, part, how | {"tokens": n, "context": context}))[0] for part, n, context in parts]
        found += each
        read = sum(one.tokens for one in each)
        about = {"text": "self" if text is None else zstd.digest(text.encode()).hex(), "tokens": read}
        unusual: dict[str, Any] = {"lengths": [context for *_, context in parts]} if len(parts) > 1 else {}
        unusual |= {"context": c.context} if c.context != CONTEXT else {}
        unusual |= {} if c.backward else {"backward": False}
        used.append(about | unusual | ({"name": AUTO} if name == AUTO else {}))
    for one in c.made:
        layers = one if isinstance(one, Layers) else load(one)
        found.append(matched(groups, layers, "" if isinstance(one, Layers) else one))
        used.append({"calibration": layers.digest, "tokens": layers.tokens})
    return found, used


def read_text(path: str) -> str:
    """A text to calibrate or to measure on, "auto" the part of the built-in mix that no calibration has seen.

    SourceError where it cannot be read.
    """
    if path == AUTO:
        return measured()
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"the text cannot be read: {e}", file=path) from e


@dataclass(slots=True)
class Search:
    """The search for the common scale of a recipe."""

    groups: Sequence[ties.Group]
    recipe: Recipe
    pool: Executor  # does the work
    note: Note = silent
    kept: Kept | None = None  # gets the quantised tensors of the last try; None: they are not wanted
    reserve: int = 0  # bytes that quantised tensors get when this is over
    tried: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # what tensors take losslessly, about; counted once

    def meet(self, budget: Budget, rest: Callable[[], int] | None = None, judge: Judge | None = None) -> Recipe:
        """The recipe at the scale that meets a budget, real bytes from below, to half a percent; or BudgetError."""
        if not self._mine:
            every = Counter(self.recipe.why.values()).most_common()
            these = ", ".join(f"{n} are {why}" for why, n in every)
            raise BudgetError(f"no tensor can be quantised: of {len(self.groups)} tensors {these}")
        if budget.snr is not None:
            scale = self._snr(budget.snr)
        elif budget.kl is not None:
            assert judge is not None  # noqa: S101 - it gives what measures the model
            scale = self._kl(budget.kl, self._diverging(judge))
        else:
            bits, other, everything = budget.bits, 0, self._weights
            if bits is None:  # what a budget of the whole file leaves
                assert rest is not None  # noqa: S101 - it gives the bytes of all that is not quantised
                everything = sum(math.prod(g.tensor.shape) * (1 + len(g.aliases)) for g in self.groups)
                size = budget.size if budget.size is not None else int((budget.file_bits or 0) * everything / 8)
                bits = 8 * (size - (other := rest())) / self._weights
                if bits <= 0:
                    raise BudgetError(
                        f"what stays lossless takes {other} bytes, more than the {size} of the whole file: allow more, "
                        "or quantise embeddings too"
                    )

            def missed(got: float) -> str:
                size = other + got * self._weights / 8
                if budget.size is not None:
                    return f"{budget.size} bytes cannot be met: the nearest is about {size:.0f}"
                asked = budget.bits or budget.file_bits
                return f"{asked:.3f} bits per weight cannot be met: the nearest is {8 * size / everything:.3f}"

            scale = self._bits(bits, missed)
        return replace(self.recipe, scale=scale)

    @property
    def _mine(self) -> list[ties.Group]:
        """The tensors that are quantised."""
        return [g for g in self.groups if g.tensor.name in self.recipe.aligned]

    @property
    def _weights(self) -> int:
        """Number of their elements."""
        return sum(math.prod(g.tensor.shape) for g in self._mine)

    def _bits(self, bits: float, missed: Callable[[float], str]) -> float:
        def rate(scale: float) -> float:
            size, exact = self.reserve, True
            for e in self._at(scale, partial(encode, measured=False), f"{bits:.3f} bits"):
                size += size_of(self._keep(e), self.recipe)
                exact &= e.fidelity is None
            got = 8 * size / self._weights
            return bits if exact and got < bits else got  # nothing is finer than lossless

        first, slope = self._begun(bits, 1.03 - min(bits, FINEST), 1.0 if bits > 1 else 1.5)
        return _meet(rate, (bits * (1 - TOLERANCE), bits), first, slope, missed)

    def _begun(self, bits: float, scale: float, slope: float) -> tuple[float, float]:
        """A scale at which a sample of the rows takes so many bits, about, and its change for a bit; or those given."""
        some, goal = few(self._mine, self.recipe), bits * (1 - LEAN * TOLERANCE)
        if some is None:
            return scale, slope
        first, usual, high = scale, slope, math.nan
        for _ in range(TRIES):
            rate = 8 * self._sampled(some, scale, f"{bits:.3f} bits") / self._weights
            high = rate if math.isnan(high) else high
            if abs(scale - first) >= FAR_APART and rate != high:  # what lies nearer is of its chance
                slope = min(max((scale - first) / (high - rate), usual / 2), 3 * usual)
            if abs(rate - goal) <= goal * NEAR:
                return scale, slope
            scale += (rate - goal) * slope
        return (scale, slope) if abs(scale) <= FAR else (first, usual)

    def _sampled(self, some: Few, scale: float, what: str) -> float:
        """Bytes of all quantised tensors at a scale, about, from some of their rows."""
        every = self._over(some.groups, replace(some.recipe, scale=scale), partial(encode, measured=False), what)
        return self.reserve + math.fsum(some.bytes_of(e, size_of(e, some.recipe)) for e in every)

    def again(self) -> None:
        """Make and keep the tensors at the scale of the recipe, which is known."""
        for e in self._at(self.recipe.scale, partial(encode, measured=False), "the scale that was found"):
            self._keep(e)

    def _snr(self, goal: float) -> float:
        def mean(scale: float) -> float:
            found = [self._keep(e).fidelity for e in self._at(scale, encode, f"{goal:g} dB")]
            return math.fsum(min(LOSSLESS, f.snr if f else LOSSLESS) for f in found) / len(found)

        missed = f"{goal:g} dB cannot be met: the nearest is {{:.2f}} dB".format
        least, first = min(goal, LOSSLESS), 0.8 - min(goal / DECIBELS, FINEST)
        return _meet(mean, (least, least + CLOSE), first, 1 / DECIBELS, missed, above=True)

    def _kl(self, nats: float, diverging: Callable[[float, str], float]) -> float:
        def loss(scale: float) -> float:
            return -math.log2(max(diverging(scale, f"{nats:g} nats"), 1e-9))

        goal = -math.log2(nats), -math.log2(nats * (1 - 10 * TOLERANCE))
        missed = f"{nats:g} nats cannot be met: the nearest is {{:.4f}}".format
        return _meet(loss, goal, -2.0, 0.5, lambda x: missed(2**-x), above=True)

    def _diverging(self, judge: Judge) -> Callable[[float, str], float]:
        """What measures the divergence of the model at a scale."""
        by_name, model = {g.tensor.name: g for g in self._mine}, judge()

        def at(scale: float, what: str) -> float:
            for e, words in self._at(scale, encode_with_words, what):
                group = by_name[self._keep(e).name]
                model.put((e.name, *(a for a, _ in group.aliases)), from_words(words, group.tensor.dtype))
            return model.kl()

        return at

    def _at(self, scale: float, work: Callable[[ties.Group, Recipe], T], what: str) -> Iterator[T]:
        """Results of the work on every quantised tensor at a scale, as they come."""
        known = {name: replace(a, lossless=self.sizes.get(name)) for name, a in self.recipe.aligned.items()}
        self.tried += 1
        if self.kept is not None:
            self.kept.clear()
        now = replace(self.recipe, scale=scale, aligned=known)
        yield from self._over(self._mine, now, work, f"{what}, pass {self.tried}")

    def _over(
        self, groups: Sequence[ties.Group], now: Recipe, work: Callable[[ties.Group, Recipe], T], what: str
    ) -> Iterator[T]:
        every = ((workers.need(g.tensor, now), (g, workers.only(now, g.tensor.name))) for g in groups)
        for i, result in enumerate(workers.run(self.pool, work, every, room()), 1):
            self.note(f"looking for the scale: {what} at {now.scale:+.3f}", i, len(groups))
            yield result

    def _keep(self, e: Encoded) -> Encoded:
        if e.fidelity:
            self.sizes[e.name] = e.fidelity.lossless
        if self.kept is not None:
            self.kept.put(e.name, e)
        return e


def _meet(
    at: Callable[[float], float],
    goal: tuple[float, float],
    scale: float,
    slope: float,
    say: Callable[[float], str],
    above: bool = False,
) -> float:
    """A scale at which what is measured there, falling in it, is within the goal.

    Where it jumps over the goal, the nearest scale on the side that was asked for: below it, or `above`. BudgetError
    where there is none.
    """
    low, high = -math.inf, math.inf  # coarser than `low`, finer than `high`
    for _ in range(16):
        got = at(scale)
        if goal[0] <= got <= goal[1]:
            return scale
        if got > goal[1]:
            low = max(low, scale)
        else:
            high = min(high, scale)
        step = scale + (got - sum(goal) / 2) * slope
        if not low < step < high:
            step = (low + high) / 2 if math.isfinite(low + high) else step
        if abs(step) > 80 or abs(step - scale) < (1e-3 if above else 1e-5):
            break
        scale = step
    if not math.isfinite(best := low if above else high):
        raise BudgetError(say(got))
    if best != scale:
        at(best)
    return best
