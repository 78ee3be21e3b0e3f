"""What a pack is asked for: options of any pack, a budget and a calibration of a lossy one, and who is told of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rac.calibrate.builtin import AUTO
from rac.calibrate.layers import Layers
from rac.calibrate.text import Note
from rac.encode.code.plan import CODER, LEVELS, SLICES, Level, tuned
from rac.stages.lanes.parameters import MAX_LANES

if TYPE_CHECKING:
    from rac.encode.encoded import Fidelity

GOALS = ("bits", "file_bits", "size", "snr", "kl")  # budgets of a lossy pack
EFFORTS = {"fast": (32, 1), "default": (256, 1), "max": (1024, 2)}  # states of the trellis, and passes over each matrix
DEVICES = ("cpu", "cuda", "mps")  # where a pack calibrates
STEPS = 240  # of a recovery, where nobody says how many
ALIGNMENTS = ("auto", "triangular", "pca", "identity")
CONTEXT = 1024  # tokens of a sequence that a model is calibrated on, at most
DECIBELS = 6.020599913279624  # signal to noise that one bit is worth: 20 log10 2
Made = str | Layers
"""A calibration made beforehand: the file that it was saved to, or itself."""
Progress = Callable[[str, int], None]  # called with the name of a finished tensor and its dense bytes


def silent(*_: object) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions that are called while a pack goes on: `progress` and `note` as `pack` has them."""

    progress: Progress = silent
    note: Note = silent
    layer: Callable[[Fidelity], None] = silent  # called after every quantised tensor that is written


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How a source is packed, whatever its tensors become: arguments of `pack`. ValueError for what cannot be."""

    level: str = "default"
    jobs: int | None = None
    lanes: int | None = None
    slices: str | None = None
    shard_size: int | None = None
    resume: bool = False
    force: bool = False
    processes: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the provenance states: patterns of tensors, transforms, and so on."""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {self.level!r}")
        if self.lanes is not None and not 1 <= self.lanes <= MAX_LANES:
            raise ValueError(f"lanes must be 1..{MAX_LANES}")
        if self.slices not in (None, *SLICES):
            raise ValueError(f"slices must be one of {', '.join(SLICES)}, not {self.slices!r}")
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError("shard size must be positive")

    @property
    def lossless(self) -> Level:
        """How tensors that stay lossless are coded."""
        return tuned(LEVELS[self.level], self.lanes, self.slices)

    @property
    def coder(self) -> Level:
        """How the integers of quantised tensors are coded."""
        return tuned(CODER, self.lanes, self.slices)


def one_goal(given: Mapping[str, float | None]) -> None:
    """Check budgets by their names, None where one is not given; ValueError unless there is one, a number above 0."""
    there = {name: value for name, value in given.items() if value is not None}
    if len(there) > 1:
        raise ValueError(f"{' and '.join(there)} are {len(there)} budgets: give one of them")
    if not there:
        raise ValueError(f"a lossy pack has a budget: give one of {', '.join(given)}")
    for name, value in there.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is a number above 0, not {value:g}")


def no_goal(given: Mapping[str, bool]) -> None:
    """Check that no argument of a lossy pack is given, by their names, where no budget is; ValueError."""
    if there := [name for name, is_there in given.items() if is_there]:
        raise ValueError(f"{', '.join(there)}: for a lossy pack; give one of {', '.join(GOALS)} too")


@dataclass(frozen=True, slots=True)
class Budget:
    """What a lossy pack may cost, or how good it is to be: one of these arguments of `pack`, above 0, or ValueError."""

    bits: float | None = None
    file_bits: float | None = None
    size: int | None = None
    snr: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        one_goal(asdict(self))

    @property
    def goal(self) -> dict[str, float]:
        """The one that is given, by its name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def expected(self) -> float:
        """Bits per weight to expect, about: what ranks and bases are judged by."""
        return self.bits or self.file_bits or (self.snr / DECIBELS if self.snr else 3.0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the inputs of layers are learned from; `tokens`, `cache`, `context`, `backward` as `pack` has them."""

    texts: tuple[str, ...] = ()
    """Text files, "auto" for the built-in mix, "self" for text that the model writes: each counts alike. Empty: nothing
    is learned."""
    tokens: int = 40960
    cache: str | None = None
    made: tuple[Made, ...] = ()
    """What `rac.calibrate` has returned, and files that it was saved to: each counts as a text does."""
    remark: str = ""
    """What the user is told of this choice before the work."""
    named: bool = True
    """Whether the caller has named what to learn from: then what cannot be learned is an error."""
    context: int = CONTEXT
    backward: bool = True
    device: str = "cpu"
    """Where blocks are run, factors found and errors fed back: DEVICES."""

    @property
    def any(self) -> bool:
        """Whether anything is learned."""
        return bool(self.texts or self.made)

    @property
    def general(self) -> bool:
        """Whether all that is learned from is the built-in mix and what the model writes beside it."""
        return AUTO in self.texts and set(self.texts) <= {AUTO, "self"} and not self.made

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.context < 1:
            raise ValueError("tokens and context must be at least 1")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if "none" in self.texts:
            raise ValueError("none is no text: it cannot be among those to calibrate on")

    @staticmethod
    def made_of(given: Made | os.PathLike[str] | Sequence[Made | os.PathLike[str]] | None) -> tuple[Made, ...]:
        """The calibrations that a caller hands over: none, one or several."""
        several = (given,) if isinstance(given, str | os.PathLike | Layers) else given or ()
        return tuple(one if isinstance(one, Layers) else os.fspath(one) for one in several)

    @staticmethod
    def texts_of(given: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
        """The texts that a caller names: one or several; "none" alone is no text, "auto" brings "self" with it."""
        several = (given,) if isinstance(given, str | os.PathLike) else given
        names = tuple(os.fspath(name) for name in several)
        if AUTO in names:
            names = tuple(dict.fromkeys((*names, "self")))
        return () if names == ("none",) else names


@dataclass(frozen=True, slots=True)
class Lossy:
    """What a user asks of a lossy pack: arguments of `pack`. ValueError for what does not go together."""

    budget: Budget
    calibration: Calibration = Calibration()
    effort: str = "default"
    keep: tuple[str, ...] = ()
    align: str = "auto"
    rank: int | None = None
    embeddings: bool = True
    recover: int = 0
    """Steps of recovery (rac.recover); 0: none."""

    def __post_init__(self) -> None:
        texts = self.calibration.texts
        if self.recover < 0 or (self.recover and not texts):
            raise ValueError("recovery is a number of steps, and learns from a text: give --calibrate too")
        if self.effort not in EFFORTS:
            raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, not {self.effort!r}")
        if self.align not in ALIGNMENTS:
            raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}, not {self.align!r}")
        if self.rank is not None and (self.rank < 0 or (self.rank and self.align in ("pca", "identity"))):
            raise ValueError("a rank is 0 or more, and above 0 only with triangular alignment")
        if not self.calibration.any and (self.rank or self.align in ("triangular", "pca")):
            raise ValueError("ranks and alignments follow from the inputs of layers: give --calibrate too")
        if not self.calibration.any and self.calibration.device != "cpu":
            raise ValueError("a device calibrates, and there is nothing to calibrate on: give --calibrate too")
        if self.budget.kl is not None and (texts[:1] in ((), ("self",)) or os.path.isdir(texts[0])):
            raise ValueError("a divergence is measured on the first calibration text: give a text file to calibrate on")

    @property
    def needs_texts(self) -> bool:
        """Whether the request means nothing without texts."""
        return bool(self.rank or self.align in ("triangular", "pca") or self.budget.kl is not None)

    @property
    def about(self) -> dict[str, Any]:
        """The request for the provenance: what is not as one gets it unasked, and the budget; numbers are text."""
        every = {"align": self.align, "rank": self.rank, "keep": sorted(self.keep)}
        every["recover"] = self.recover or None
        every["device"] = None if self.calibration.device == "cpu" else self.calibration.device
        asked = {k: v for k, v in every.items() if v not in ("auto", None, []) and v is not False}
        asked |= {} if self.embeddings else {"embeddings": False}
        return {**asked, "goal": {k: repr(v) for k, v in self.budget.goal.items()}}
