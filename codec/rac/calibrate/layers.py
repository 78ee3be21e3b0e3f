"""What the inputs and outputs of a model's linear layers look like on a text.

The second moment E[x x^T] of the inputs of each layer, tokens weighted by how much the loss depends on them there, and
for each output i the sensitivity E[(dL/dy_i)^2], L the cross-entropy against labels drawn from the model's own
predictions (the true Fisher).

A model is run block by block, each over the whole text, what one made of it kept in a file for the next
(calibration_stream): the memory needed is that of one block, however large the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.folder import DamagedError, Folder, fed_model
from rac.calibrate.given import Given
from rac.calibrate.pooling import pooling
from rac.calibrate.text import SEED, Note
from rac.container.zstd import Digest
from rac.errors import MissingDependencyError, SourceError
from rac.linalg import exact
from rac.linalg.factors import Factors
from rac.linalg.saved import load
from rac.native import product

IDS = "ids.npy"  # the file of the tokens
_VERSION = 9  # of this code: counts up when it would find something else, so that no cache gives anything old


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What calibration found for one weight matrix."""

    moment: NDArray[np.float32] | Callable[[], NDArray[np.float32]]  # the second moment, or what reads it
    sensitivity: NDArray[np.float64] | None  # (out,) mean of squared gradients; None: no backward pass was made
    transposed: bool = False  # whether the weight is stored as (in, out), as GPT-2's are
    finite: bool = True  # False where NaN or infinity was among the inputs or gradients
    experts: Sequence[Layer] = ()  # for each expert of a weight (experts, out, in) or (experts, in, out)
    sketch: NDArray[np.float32] | None = None  # what the weight's rows are known by (rac.calibrate.sketch)
    slope: float | None = None  # measured cost of a table's errors, in times of the layers'; None: not known
    factors: Factors | None = None  # where the recursion of its inputs is kept once it is found; None: nowhere
    outputs: NDArray[np.float32] | Callable[[], NDArray[np.float32]] | None = None  # what `outer` is, or what reads it

    @property
    def key(self) -> str:
        """What tells the second moment from all others of a calibration; empty where nothing short does."""
        return _key(self.moment)

    @property
    def inputs(self) -> int:
        """How many inputs there are."""
        return self.moment.inputs if isinstance(self.moment, Low) else len(self.second)

    @property
    def second(self) -> NDArray[np.float32]:
        """(in, in), a mean over the text's tokens, which count by the length of their gradient where there is one.

        Layers that share an input share the file. Read when asked for; SourceError where it is damaged.
        """
        return self.moment() if callable(self.moment) else self.moment

    @property
    def outer(self) -> NDArray[np.float32] | None:
        """(out, out) second moment of the gradients at the outputs, less chance; SourceError where it is damaged."""
        return self.outputs() if callable(self.outputs) else self.outputs


@dataclass(frozen=True, slots=True, eq=False)
class Kron:
    """A second moment (n, n) of a convolution's patches as the product of those of its channels and of its places."""

    channels: NDArray[np.float32]
    places: NDArray[np.float32]

    def __call__(self) -> NDArray[np.float32]:
        """The product."""
        return np.kron(self.channels, self.places)


@dataclass(frozen=True, slots=True, eq=False)
class Low:
    """A second moment (n, n) as R^T R, a diagonal, and a share of one that others have too."""

    part: NDArray[np.float32] | Callable[[], NDArray[np.float32]]
    """(k + 1, n), or what reads it: R, and the diagonal."""
    shared: NDArray[np.float32] | Callable[[], NDArray[np.float32]] | None = None
    share: float = 0.0

    @property
    def key(self) -> str:
        """What tells it from all others of a calibration; empty where nothing short does."""
        own, other = _key(self.part), "-" if self.shared is None else _key(self.shared)
        return f"{own}+{other}*{self.share!r}" if own and other else ""

    @property
    def inputs(self) -> int:
        """How many inputs there are."""
        return int(self.read().shape[1])

    def read(self) -> NDArray[np.float32]:
        """R, and the diagonal."""
        return self.part() if callable(self.part) else self.part

    def common(self) -> NDArray[np.float32]:
        """(n, n) that others have too; SourceError where it is of other inputs."""
        assert self.shared is not None  # noqa: S101
        found = self.shared() if callable(self.shared) else self.shared
        if len(found) != self.inputs:
            raise SourceError(f"damaged calibration: a second moment of {len(found)} inputs for {self.inputs}")
        return found

    def __call__(self) -> NDArray[np.float32]:
        """The sum, of the bits that the processor's products have."""
        part = self.read()
        rows = np.ascontiguousarray(part[:-1])
        out = np.zeros((part.shape[1],) * 2, np.float32)
        product.add(out, np.ascontiguousarray(rows.T), rows)
        out[np.diag_indices_from(out)] += part[-1]
        if self.shared is not None:
            out += self.common() * np.float32(self.share)
        return out

    def times(self, factor: float, shared: NDArray[np.float32]) -> Low:
        """So many times it, of arrays, where what is shared is given as many times already."""
        part = np.array(self.read())
        part[:-1] *= np.float32(math.sqrt(factor))
        part[-1] *= np.float32(factor)
        return Low(part, None if self.shared is None else shared, self.share)


class Layers(dict[str, Layer]):
    """Weight names, as they are in the model's files, to what was found; layers that were never run are missing."""

    def __init__(
        self, layers: Mapping[str, Layer], tokens: int, digest: str, missing: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(layers)
        self.missing = dict(missing or {})
        """Float matrices of the files that were not reached, to the part of the model that each is in."""
        self.tokens = tokens
        """Tokens really used; batches, where a module was run on these."""
        self.digest = digest
        """Digest of model, text, settings and this code, or of what was found: 32 hexadecimal digits."""
        self.ids: Callable[[], NDArray[Any]] | None = None
        """Reads the token ids (count, context) that a text gave, or the model has written; None: there are none."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all into one file, for `rac pack --calibration`; a file there is replaced. Or OutputError."""
        from rac.calibrate.file import save  # which reads Layers

        save(self, path)


def calibrate(
    path: str | os.PathLike[str],
    text: str | NDArray[np.int64] | None,
    *,
    tokens: int = 40960,
    context: int = 1024,
    fisher: bool = True,
    outer: bool = False,
    note: Note | None = None,
    cache: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Layers:
    """Run the model in a Hugging Face folder `path` over a text, or its token ids (n,); None: over text of its own.

    A model gets a forward and, for the sensitivities (`fisher`), a backward pass: a language model from its
    predictions, an encoder from the embedding that its folder says it pools (`modules.json`), else from all that comes
    out. An encoder-decoder model reads each sequence twice, and is run as a whole, like others that are no chain of
    blocks (`note` says so, and how much memory that needs). Of a model that sees or hears too, what reads text is run.
    `context` is the longest sequence, less where the model has positions for fewer tokens; `outer` keeps second moments
    of gradients at outputs too, of layers with at most twice as many as inputs.

    The work folder holds 4 bytes for each token, block and number of the hidden state (2.8 GB for SmolLM2 135M and
    40,960 tokens), at the end 4 * in^2 bytes for each layer input. In a folder `cache` the result is kept under its
    digest, and one that was interrupted goes on after the last finished block. The weights of a `Given` take the place
    of those in the files. Blocks run on a `device` of torch; the rest, and models that are no chain, on the CPU.

    OutputError where the cache cannot be written, SourceError where there is no model, tokenizer or part that reads
    text, the text is too short, or a model that is not causal has none.
    """
    if not os.path.isdir(path):
        raise SourceError("calibration needs a Hugging Face model folder", file=os.fspath(path))
    if tokens < 1 or context < 1:
        raise ValueError("tokens and context must be at least 1")
    given = path if isinstance(path, Given) else None
    settings: dict[str, Any] = {"version": _VERSION, "tokens": tokens, "context": context, "fisher": fisher}
    settings |= {"seed": SEED, "given": given and given.about, "device": device, "pooling": pooling(path)}
    settings |= {"outer": True} if outer else {}
    folder = Folder(cache, digest := _digest(Path(path), text, settings))
    tell = note or (lambda *_: None)
    if folder.state.get("finished"):  # nothing to write: a cache that is read-only serves too
        with contextlib.suppress(DamagedError):
            return layers_of(folder, digest)
    try:
        from rac.calibrate import passes
    except ImportError as e:
        why = "calibration needs torch and transformers: pip install rac-codec[calibrate]"
        raise MissingDependencyError(why) from e
    with folder.alone(lambda: tell("another process is calibrating the same: waiting for it", 0, 0)):
        for again in (False, True):
            try:
                if not folder.state.get("finished"):
                    asked = passes.Asked(os.fspath(path), tokens, context, fisher, given, device, outer)
                    passes.find(asked, text, folder, tell)
                return layers_of(folder, digest)
            except DamagedError:
                if again:
                    raise
                tell("a file of the calibration cache is damaged: starting again", 0, 0)
                folder.clear()
    raise AssertionError


def joined(found: Sequence[Mapping[str, Layer]]) -> dict[str, Layer]:
    """What calibrations on several texts come to together: each counts alike, of those that reached a layer."""
    names = dict.fromkeys(name for layers in found for name in layers)
    return {name: _mean([layers[name] for layers in found if name in layers]) for name in names}


def _mean(layers: Sequence[Layer]) -> Layer:
    known = [layer.sensitivity for layer in layers if layer.sensitivity is not None]
    sensitivity = np.mean(known, 0) if known else None
    experts = [_mean(each) for each in zip(*(layer.experts for layer in layers if layer.experts), strict=True)]
    finite = all(layer.finite for layer in layers)
    slopes = [layer.slope for layer in layers if layer.slope is not None]
    slope = float(exact.exp2(exact.middle(slopes))) if slopes else None
    second = functools.partial(_mean_of, layers, "second")
    outer = functools.partial(_mean_of, layers, "outer") if all(one.outputs is not None for one in layers) else None
    return Layer(second, sensitivity, layers[0].transposed, finite, experts, slope=slope, outputs=outer)


def _key(moment: Any) -> str:
    if isinstance(moment, functools.partial):  # of a mean, or in another process
        each = [one.key for one in moment.args[0]] if moment.func is _mean_of else [moment.args[0]]
        return " ".join(each) if all(each) else ""
    return str(getattr(moment, "key", ""))


def _mean_of(layers: Sequence[Layer], what: str) -> NDArray[np.float32]:
    total = np.array(getattr(layers[0], what))
    for layer in layers[1:]:
        total += getattr(layer, what)
    total /= np.float32(len(layers))
    return total


def _digest(path: Path, text: str | NDArray[np.int64] | None, settings: dict[str, Any]) -> str:
    """Digest, in hexadecimal, of all that decides about the result: text and tokenizer stand for the tokens."""
    h = Digest()
    about = "own" if text is None else "text" if isinstance(text, str) else "ids"
    h.update(json.dumps({**settings, "text": about}, sort_keys=True).encode())
    if text is not None:
        h.update(text.encode() if isinstance(text, str) else np.ascontiguousarray(text, "<i8").tobytes())
    return fed_model(h, path).value().hex()


def layers_of(folder: Folder, digest: str) -> Layers:
    """What the state of a finished calibration says, its arrays read when they are asked for."""
    every = folder.state["layers"].items()
    found = {name: _layer(folder, entry) for name, entry in every if "second" in entry}
    out = Layers(found, folder.state["tokens"], digest, folder.state.get("missing"))
    out.ids = _Stored(folder, IDS) if IDS in folder else None
    return out


def _layer(folder: Folder, entry: Mapping[str, Any]) -> Layer:
    given = entry.get("sensitivity")
    rows = slice(*entry.get("rows", [None]))  # of the expert's matrix, where the file's is a part of it
    sensitivity = np.array(folder.array(given)[rows]) if given else None
    experts = [_layer(folder, one) for one in entry.get("experts", ())]
    moment: Any = _Stored(folder, entry["second"])
    if "low" in entry:  # the share of what is in another file
        other, share = entry["low"]
        moment = Low(moment, _Stored(folder, other) if other else None, share)
    outputs: Any = _Stored(folder, entry["outer"]) if "outer" in entry else None
    if outputs is not None and "rows" in entry:
        outputs = functools.partial(_part_of, outputs, rows)
    known = {"slope": entry.get("slope"), "outputs": outputs}
    return Layer(moment, sensitivity, entry["transposed"], entry["finite"], experts, **known)


class _Stored:
    """Reads an array of the folder, which it keeps from being removed."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name

    @property
    def key(self) -> str:
        """The file."""
        return os.fspath(self._folder.path / self._name)

    def __call__(self) -> NDArray[np.float32]:
        return self._folder.array(self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which reads the same file while this one keeps the folder."""
        self._folder.check(self._name)
        return functools.partial, (_mapped, self.key)


def _part_of(read: Callable[[], NDArray[np.float32]], rows: slice) -> NDArray[np.float32]:
    return read()[rows, rows]


def _mapped(path: str) -> NDArray[np.float32]:
    """A file that another process has checked."""
    try:
        found: NDArray[np.float32] = load(path, "r")
    except (OSError, ValueError, EOFError) as e:
        raise SourceError(f"the calibration's file is gone or damaged: {e}", file=path) from e
    return found
