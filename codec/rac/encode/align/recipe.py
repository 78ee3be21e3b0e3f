"""What is quantised and how: which tensors, their units by row and column, and what their errors cost."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.layers import Layer
from rac.dequantise import SMALLEST
from rac.encode import ties
from rac.encode.code.plan import CODER, LEVELS, Level, axis_of
from rac.encode.options import EFFORTS
from rac.encode.quantise import trellis as lossy
from rac.encode.sources import SourceTensor
from rac.encode.sources.tables import is_table
from rac.errors import SourceError
from rac.grid import matrix
from rac.linalg import exact
from rac.linalg.device import triangular_on
from rac.linalg.triangular import Rows, Triangular, blocks, damped, rows, triangular
from rac.stages import trellis
from rac.stages.words import DTYPES, from_words

if TYPE_CHECKING:
    from rac.encode.split.objects import Basis

KEEP = ("*norm*", "*bias", "*router*", "*.gate.weight")
"""Kept lossless: small, and an error in what chooses the experts is an error in all that they do."""
TABLES = "embeddings or output layers (--no-embeddings)"  # as what they are lossless
KEPT = "kept by --keep"
FINER = 1.0  # bits that embeddings get beyond the rest: they are read as they are, and tied ones make the logits too
DAMP = 0.03  # share of the mean energy that every input is taken to have beyond what was seen: the text is but a sample
GENERAL_DAMP = 0.08  # the same where the text is of no kind in particular (docs/lossy.md)
FAR = 16  # medians beyond which a weight counts no more in the energies
FEW = 1 / 32  # share of the weights that may lie so far out: where more do, the median says nothing of the energies
FINER_FEW = 0.5  # bits at most that weights among zeros get beyond the rest
ZEROS = 0.2  # share of zeros from which on they are kept: without a trellis, and worth its 0.22 bit (docs/lossy.md)
SMALL, LARGE = (
    2.0**-46,
    2.0**60,
)  # largest magnitudes of a matrix that the scales of the format reach, and binary32 squares
LEAST_ENERGY = 0.05  # share of the deviation of a matrix that every column and row is taken to have
LEAST = 1e-4  # share of the mean sensitivity that every output is taken to have
SHARE, FEWEST = 20, 64  # one row of so many stands for all, and how many do: a trellis that is too short costs more
LEAST_OF_TABLE = 1e-2  # the same of every token: what the text does not speak of, others do
MORE = 0.7  # bits that tables get beyond what the calibration foretells, where it has not measured what they cost
MOST = 6.0  # bits at most by which a table is finer or coarser than the layers
DRAWN = 0.2  # share of what is off the diagonal of outputs' second moments that is not believed (docs/experiments.md)
PAYS = 0.06  # bits that errors fed back along rows promise at least: they take a trellis of few states
SPREAD = 1.5  # bits at most by which a tensor is finer or coarser than its share (docs/lossy.md)


@dataclass(frozen=True, slots=True)
class Sample:
    """How far a recipe follows what a text has shown (docs/lossy.md)."""

    damp: float = DAMP
    strength: float = 0.5  # how far bits follow the sensitivity of a tensor
    trust: float = 0.8  # exponent of sensitivities of outputs, about their mean: on another text they are others
    rows: bool = False  # whether errors are fed back along rows too, where that promises to pay

    @classmethod
    def general(cls) -> Sample:
        """What suits a text of no kind in particular: what the model will read differs from it by more than chance."""
        return cls(damp=GENERAL_DAMP)


@contextlib.contextmanager
def _of_moments() -> Iterator[None]:
    """SourceError where what a calibration calls a second moment is none."""
    try:
        yield
    except np.linalg.LinAlgError as e:
        raise SourceError(f"damaged calibration: a second moment that is none ({e})") from e


@dataclass(frozen=True, slots=True)
class Aligned:
    """What the alignment found for one matrix: everything about its quantisation but the common scale."""

    base: float  # log2 of the unit at common scale 0
    scales: lossy.Scales
    layer: Layer | None = None  # what calibration found of the inputs; None: not known, and no errors are fed back
    damp: float = DAMP
    alignment: str = "triangular"  # of a tensor with a layer; "pca", or "identity", where all columns count alike
    rank: int = 0  # rank of the low-rank part beside the trellis; 0: there is none
    basis: Basis | None = None  # the basis that "pca" turns the columns into; None with any other alignment
    zeros: float = 0.0  # share of zeros that stay zeros: no trellis then, no low-rank part, no basis; 0: they do not
    lossless: int | None = None  # bytes that it takes losslessly, about; None: nobody has counted yet
    fed: bool = False  # whether feedback along rows too pays, by the outputs, where the alignment is triangular
    few: NDArray[np.int64] | None = None  # rows that stand for all, where there are many (rac.encode.allocate.few)

    @property
    def name(self) -> str:
        """Name of the alignment that is used: "identity" where the inputs are not known."""
        return self.alignment if self.layer else "identity"

    @property
    def by_outputs(self) -> bool:
        """Whether errors are fed back along rows too, by the second moment of the outputs."""
        return self.fed and self.alignment == "triangular"

    def second(self) -> NDArray[np.float64]:
        """(n, n) second moment of the inputs, which are known."""
        assert self.layer is not None  # noqa: S101
        return damped(self.layer.second, self.damp)

    def triangular(self) -> Triangular:
        """The recursion of the columns, whose inputs are known; of each expert's rows where there are experts."""
        assert self.layer is not None  # noqa: S101
        factors = self.layer.factors
        find = partial(self._found, "cpu" if factors is None else factors.device)
        if factors is None or not (key := input_of(self.layer)):
            return find()
        return factors.get(f"{self.damp!r} {key}", find)

    @_of_moments()
    def _found(self, device: str) -> Triangular:
        assert self.layer is not None  # noqa: S101
        if self.layer.experts:
            return blocks([one.second for one in self.layer.experts], self.damp)
        if device != "cpu":
            return triangular_on(self.layer.second, self.damp, device)
        return triangular(self.layer.second, self.damp)

    def columns(self) -> Triangular | None:
        """That recursion where errors of columns are fed back; None elsewhere."""
        fed = self.layer and not self.layer.transposed and self.alignment == "triangular"
        return self.triangular() if fed else None

    @_of_moments()
    def rows(self) -> Rows | None:
        """The recursion of rows: of a weight stored (in, out) or (experts, in, out), or that is fed so; else None."""
        if self.by_outputs and self.layer and (outer := self.layer.outer) is not None:
            return rows(outer, DRAWN)
        if self.layer is None or not self.layer.transposed:
            return None
        each = [rows(damped(one.second, self.damp), 1e-6) for one in self.layer.experts or (self.layer,)]
        if not self.layer.experts:
            return each[0]
        return Rows(np.concatenate([one.weight for one in each]), np.stack([one.feed for one in each]))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the tensors of a model are quantised."""

    aligned: Mapping[str, Aligned]  # by name; tensors that are not in it stay lossless
    states: int
    passes: int
    scale: float = 0.0  # log2 of the common factor of all units
    about: Mapping[str, Any] = field(default_factory=dict)  # what the file's provenance says of the recipe
    coder: Level = CODER  # how the integers are coded
    lossless: Level = LEVELS["default"]  # how tensors are coded that are no larger so
    unreached: tuple[str, ...] = ()  # tensors that the calibration did not reach, quantised from the weights alone
    parts: Mapping[str, str] = field(default_factory=dict)  # these to the part of the model that each is in
    why: Mapping[str, str] = field(default_factory=dict)  # what keeps the other tensors lossless, by name

    @property
    def effort(self) -> lossy.Effort:
        """How hard each matrix is searched."""
        return lossy.Effort(self.states, self.passes, self.coder)


def matrix_of(t: SourceTensor) -> NDArray[np.float32]:
    """The tensor as a float32 matrix (R, C); SourceError where it holds NaN or infinity."""
    w = _numbers(t)
    if not np.isfinite(w).all():
        raise SourceError(f"tensor {t.name!r} holds NaN or infinity; keep it lossless with --keep {t.name!r}")
    return w


def _numbers(t: SourceTensor) -> NDArray[np.float32]:
    w = from_words(t.read(0, t.nbytes).view(f"<u{DTYPES[t.dtype].itemsize}"), t.dtype)
    return w.reshape(matrix(t.dtype, t.shape, axis_of(t.shape)))


def quantisable(t: SourceTensor, keep: Sequence[str] = (), embeddings: bool = False) -> bool:
    """True for float matrices of some size whose name no pattern keeps, and that are no embeddings."""
    return not kept(t, keep, embeddings)


def kept(t: SourceTensor, keep: Sequence[str] = (), embeddings: bool = False) -> str:
    """Why a tensor is not quantised, as what it is; empty where it is."""
    if t.dtype not in DTYPES:
        return f"of {t.dtype}"
    if len(t.shape) < 2 or math.prod(t.shape) < SMALLEST or min(matrix(t.dtype, t.shape, axis_of(t.shape))) < 16:
        return f"vectors or small (below {SMALLEST:,} weights, or 16 rows or columns)"
    if any(t.matches(p) for p in keep):
        return KEPT
    if _matches(t.name, KEEP):
        return "norms, biases or routers by their name"
    return TABLES if not embeddings and is_table(t) else ""


def check_keep(tensors: Iterable[SourceTensor], keep: Sequence[str]) -> None:
    """Check that each pattern of what is to be kept is that of a tensor; SourceError."""
    every = list(tensors) if keep else []
    for pattern in keep:
        if not any(t.matches(pattern) for t in every):
            raise SourceError(f"no tensor matches the pattern {pattern!r} of what is to be kept")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tensor's own numbers, and those of its inputs, say of how it is quantised."""

    name: str
    why: str = ""  # what keeps it lossless
    aligned: Aligned | None = None  # its units, but for its place among all tensors; the layer is left out
    # half the log2 of what an error of one deviation costs: bits where all count in full, but for a constant
    need: float | None = None  # None: nothing is known of its inputs


Ask = tuple[SourceTensor, Layer | None]
"""A tensor, and what calibration found of its inputs."""
Look = Callable[[Sequence[Sequence[Ask]], Sample], Iterable[Seen]]
"""What looks at tensors, those of one input together, here or on many machines; in any order."""
INFINITE = "inputs or gradients"  # what holds NaN or infinity


def look_here(asked: Sequence[Sequence[Ask]], sample: Sample) -> Iterable[Seen]:
    """What tensors say, one after the other."""
    return (seen for some in asked for seen in look(some, sample))


@dataclass(frozen=True, slots=True)
class Looked:
    """What all tensors of a model said, in their order."""

    seen: Mapping[str, Seen]  # of those that can be quantised
    why: Mapping[str, str]  # what keeps the others lossless, by name
    tables: frozenset[str]


def looked(
    groups: Sequence[ties.Group],
    layers: Mapping[str, Layer],
    keep: Sequence[str],
    embeddings: bool = False,
    sample: Sample = Sample(),
    missing: Mapping[str, str] | None = None,
    by: Look = look_here,
) -> Looked:
    """What all tensors that can be quantised say, `missing` as `calibrated` has it; one that is kept is not read."""
    why = {g.tensor.name: _kept(g, keep, embeddings) for g in groups}
    asked = [(g.tensor, layers.get(g.tensor.name)) for g in groups if not why[g.tensor.name]]
    seen = {one.name: one for one in by(by_input(asked), sample)}
    for one in seen.values():
        if one.why == INFINITE:
            raise SourceError(_infinite(one.name, groups))
        part = (missing or {}).get(one.name)
        odd = "buffers" if part == "buffers" else TABLES if part == "embeddings" and not embeddings else ""
        why[one.name] = one.why or odd
    tables = frozenset(g.tensor.name for g in groups if is_table(g.tensor))
    return Looked({n: seen[n] for n, w in why.items() if not w}, {n: w for n, w in why.items() if w}, tables)


def by_input(asked: Iterable[Ask]) -> list[list[Ask]]:
    """Tensors of one input together, in the order of the first of them; each other one alone."""
    out: dict[str | int, list[Ask]] = {}
    for t, layer in asked:
        key = input_of(layer) if layer else ""
        out.setdefault(key or len(out), []).append((t, layer))
    return [*out.values()]


def input_of(layer: Layer) -> str:
    """What tells the inputs of a layer from all others; empty where nothing short does."""
    keys = [one.key for one in layer.experts or (layer,)]
    return " ".join(keys) if all(keys) else ""


def _kept(g: ties.Group, keep: Sequence[str], embeddings: bool) -> str:
    """What keeps a tensor lossless by its names, type or size; empty where nothing does."""
    if reason := kept(g.tensor, keep, embeddings):
        return reason
    return KEPT if any(_matches(name, keep) for name, _ in g.aliases) else ""


def look(asked: Sequence[Ask], sample: Sample) -> list[Seen]:
    """What tensors say."""
    return [_look(t, layer, sample) for t, layer in asked]


def _look(t: SourceTensor, layer: Layer | None, sample: Sample) -> Seen:
    even = _even_of(t)
    if isinstance(even, str):
        return Seen(t.name, even)
    shape = len(even.scales.rows), len(even.scales.cols)
    if layer is None or not _fits(layer, shape):
        return Seen(t.name, aligned=even)
    if not layer.finite:
        return Seen(t.name, INFINITE)
    fed = _fed(layer, shape[0]) if sample.rows and not even.zeros and not is_table(t) else None
    a = replace(even, layer=layer, damp=sample.damp, fed=fed is not None)
    if fed is not None:
        layer = replace(layer, sensitivity=np.square(fed.weight))
    by_row, by_col = _weights(a, layer, shape, sample.trust, LEAST_OF_TABLE if is_table(t) else LEAST)
    scales = lossy.Scales(exponents(by_row), exponents(by_col))
    square, energies = _squares(_numbers(t), scales)
    deviation = exact.middle(np.sqrt(np.maximum(square[square > 0], 1e-30)))
    scales.cols[square == 0] = trellis.DEAD  # what is fed to columns of nothing but zeros would bring them to life
    a = replace(a, base=deviation + _few(a.zeros), scales=scales, few=picked(energies), layer=None)
    return Seen(t.name, aligned=a, need=deviation + exact.middle(by_row) + exact.middle(by_col))


def _fits(layer: Layer, shape: tuple[int, int]) -> bool:
    """Whether a layer is that of a matrix (R, C), not of another."""
    inputs, outputs = shape[:: 1 if layer.transposed else -1]
    inputs //= max(1, len(layer.experts)) if layer.transposed else 1
    known = layer.sensitivity is None or layer.transposed or len(layer.sensitivity) == outputs
    return layer.inputs == inputs and known


@_of_moments()
def _fed(layer: Layer, outputs: int) -> Rows | None:
    """The recursion of the rows of a matrix by its outputs; None where it promises too little."""
    outer = None if layer.transposed or layer.experts else layer.outer
    if outer is None or len(outer) != outputs:
        return None
    found = rows(outer, DRAWN)
    return found if found.gain >= PAYS else None


def picked(energies: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """Rows that stand for all: of rows in the order of their energies the middle one of every SHARE; None: too few."""
    rows = len(energies)
    if 2 * (count := max(FEWEST, rows // SHARE)) > rows:
        return None
    # a row's rate follows its energy
    return np.sort(np.argsort(energies, kind="stable")[(2 * np.arange(count) + 1) * rows // (2 * count)])


def data_free(
    groups: Sequence[ties.Group], keep: Sequence[str], effort: str, embeddings: bool = False, by: Look = look_here
) -> Recipe:
    """A recipe from the weights alone: units by the energies of columns and rows."""
    of = looked(groups, {}, keep, embeddings, by=by)
    found = {name: seen.aligned for name, seen in of.seen.items() if seen.aligned}
    return Recipe(found, *EFFORTS[effort], about={"calibrate": "none", "effort": effort}, why=of.why)


def _even_of(t: SourceTensor) -> Aligned | str:
    """Units of a matrix by its energies, or what it is that it stays lossless."""
    w = _numbers(t)
    if not np.isfinite(w).all():
        return "with NaN or infinity"
    if not SMALL <= (high := max(float(w.max()), -float(w.min()))) <= LARGE and high:
        return f"with nothing above {SMALL:.0e}" if high < SMALL else f"with numbers above {LARGE:.0e}"
    return _even(t, w) or "all zeros"


def _even(t: SourceTensor, w: NDArray[np.float32]) -> Aligned | None:
    """Units by the energies of columns and rows (exponents 1 and 1/2: docs/lossy.md); None where all is zeros."""
    square = np.abs(w)
    zeros = _zeros(w)
    np.minimum(square, _farthest(square, zeros > 0), out=square)
    np.square(square, out=square)
    rms = math.sqrt(float(square.mean(dtype=np.float64)))
    if rms == 0:
        return None
    by_col = np.maximum(np.sqrt(square.mean(0, dtype=np.float64)), LEAST_ENERGY * rms)
    by_row = np.sqrt(np.maximum(np.sqrt(square.mean(1, dtype=np.float64)), LEAST_ENERGY * rms))
    scales = lossy.Scales(exponents(1 / by_row), exponents(1 / by_col))
    square /= np.square(trellis.power(scales.rows))[:, None]
    square /= np.square(trellis.power(scales.cols))
    finer = FINER if is_table(t) else 0.0
    base = 0.5 * float(exact.log2(square.mean(dtype=np.float64)))
    return Aligned(base + _few(zeros) - finer, scales, zeros=zeros, few=picked(square.mean(1, dtype=np.float64)))


def _zeros(w: NDArray[np.float32]) -> float:
    """Share of zeros, where it pays to keep them; columns of nothing else do not count: any quantiser keeps these."""
    by_col = np.count_nonzero(w, 0)
    share = 1 - int(by_col.sum()) / max(1, int(np.count_nonzero(by_col)) * len(w))
    return share if ZEROS <= share < 1 else 0.0


def _few(zeros: float) -> float:
    """log2 of the units of what zeros leave: a weight counts more where there are few (docs/lossy.md)."""
    return max(-FINER_FEW, 0.5 * float(exact.log2(1 - zeros)))


def _farthest(size: NDArray[np.float32], sparse: bool) -> float:
    """The magnitude beyond which a weight counts no more: single ones far out are no energy of their column."""
    median = float(np.median(size))
    if sparse or not median:
        size = size[size > 0]
        median = float(np.median(size)) if size.size else 0.0
    most = FAR * median
    if np.count_nonzero(size > most) <= FEW * size.size:
        return most
    last = size.size - 1 - int(FEW * size.size)
    return float(np.partition(size.reshape(-1), last)[last])


def calibrated(
    groups: Sequence[ties.Group],
    layers: Mapping[str, Layer],
    keep: Sequence[str],
    effort: str,
    embeddings: bool = False,
    sample: Sample = Sample(),
    missing: Mapping[str, str] | None = None,
) -> Recipe:
    """A recipe from what a calibration has found: triangular, water-filled, rows and tensors by their sensitivity.

    `missing` are tensors that were not reached, to the part of the model that each is in: buffers stay lossless, as do
    embeddings under any name unless `embeddings` asks for them.
    """
    return composed(looked(groups, layers, keep, embeddings, sample, missing), layers, effort, sample, missing)


def composed(
    of: Looked, layers: Mapping[str, Layer], effort: str, sample: Sample, missing: Mapping[str, str] | None = None
) -> Recipe:
    """The recipe of `calibrated` from what all tensors said."""
    found = {name: seen.aligned for name, seen in of.seen.items() if seen.aligned}
    needs = {name: seen.need for name, seen in of.seen.items() if seen.need is not None}
    sizes = {name: len(found[name].scales.rows) * len(found[name].scales.cols) for name in needs}
    asked = {name: (need, sizes[name]) for name, need in needs.items()}
    for name, more in _shared(asked, of.tables & needs.keys(), layers, sample).items():
        a = found[name]
        found[name] = replace(a, base=a.base - more, layer=layers[name], damp=sample.damp)
    parts = missing or {}
    unreached = tuple(n for n in found if n not in needs and n not in of.tables and parts.get(n) != "embeddings")
    about = {"calibrate": "text", "effort": effort}
    mine = {name: parts.get(name, "the rest") for name in unreached}
    return Recipe(found, *EFFORTS[effort], about=about, unreached=unreached, parts=mine, why=of.why)


def _shared(
    needs: Mapping[str, tuple[float, int]], tables: Collection[str], layers: Mapping[str, Layer], sample: Sample
) -> dict[str, float]:
    """Bits that each tensor gets beyond the mean of the layers, from what it needs and its weights.

    What errors of tables cost is as it was found, in full, where gradients have told it; that of a layer only half as
    far from the mean, since errors of one layer are damped by the next (docs/lossy.md).
    """
    own = {name: needs[name] for name in needs if name not in tables} or needs
    total = max(1, sum(n for _, n in own.values()))
    mean = math.fsum(need * n for need, n in own.values()) / total  # the same in any order of the tensors
    told = any(layers[name].sensitivity is not None for name in own if name not in tables)
    out = {}
    for name, (need, _) in needs.items():
        if name in tables:
            slope = layers[name].slope
            more = MORE if slope is None else 0.5 * float(exact.log2(slope))
            out[name] = min(MOST, max(-MOST, need - mean + more)) if told else FINER
        else:
            out[name] = min(SPREAD, max(-SPREAD, sample.strength * (need - mean)))
    return out


def _squares(w: NDArray[np.float32], scales: lossy.Scales) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(C,) and (R,): mean squares of columns and rows in units of the scales; of columns row after row is added."""
    total, by_row = np.zeros((0, w.shape[1])), np.empty(len(w))
    for some in lossy.pieces(w.shape):
        scaled = w[some].astype(np.float64) / trellis.power(scales.rows[some])[:, None] / trellis.power(scales.cols)
        scaled **= 2
        by_row[some] = scaled.mean(1)
        total = np.add.reduce(np.concatenate([total, scaled]), 0, keepdims=True)
    return total[0] / len(w), by_row


def _infinite(name: str, groups: Sequence[ties.Group]) -> str:
    """What is wrong with a calibration on numbers that are not finite: where they come from, and the way out."""
    floats = (g.tensor for g in groups if g.tensor.dtype in DTYPES)
    bad = [t.name for t in floats if not np.isfinite(_numbers(t)).all()]
    few = ", ".join(map(repr, bad[:3])) + (" ..." if len(bad) > 3 else "")
    why = f"so do the weights of {few}" if bad else "all weights are finite: the model overflows in float32"
    return f"the inputs or gradients of {name!r} hold NaN or infinity; {why}; --calibrate none packs without running it"


def _weights(
    a: Aligned, layer: Layer, shape: tuple[int, int], trust: float, least: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(R,) and (C,): the product of an element's two is the square root of what a unit error there costs, about."""
    each, below = layer.experts or (layer,), a.rows() if layer.transposed else None
    n = shape[below is not None] // (1 if below else len(each))
    outputs = [_trusted(one.sensitivity, n, trust, least) for one in each]
    if below is not None:  # what an output counts for is the same of all experts, but for a factor
        factor, shared = _common(np.stack(outputs)) if layer.experts else (np.ones(1), outputs[0])
        return below.weight * np.repeat(factor, shape[0] // len(each)), shared
    if not layer.experts:
        return outputs[0], a.triangular().by_column
    factor, shared = _common(a.triangular().by_column)
    return np.concatenate([one * f for one, f in zip(outputs, factor, strict=True)]), shared


def _common(each: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A factor (E,) of each row of weights (E, n), and the weights (n,) that all rows then have, about."""
    factor = exact.exp2(exact.log2(each).mean(1))
    return factor, np.sqrt(np.square(each / factor[:, None]).mean(0))


def _trusted(sensitivity: NDArray[np.float64] | None, n: int, trust: float, least: float) -> NDArray[np.float64]:
    """(n,) roots of the sensitivities of outputs; 1 where they are not known."""
    if sensitivity is None:
        return np.ones(n)
    out = np.sqrt(np.maximum(sensitivity, max(sensitivity.mean() * least, 1e-30)))
    middle = exact.middle(out)
    return exact.exp2(middle + trust * (exact.log2(out) - middle))


def exponents(weight: NDArray[np.float64]) -> NDArray[np.int8]:
    """Quarter octaves of steps inverse to the weights."""
    quarters = -exact.quarters(weight / exact.exp2(exact.middle(weight)))
    return np.clip(quarters, -trellis.MOST, trellis.MOST).astype(np.int8)
