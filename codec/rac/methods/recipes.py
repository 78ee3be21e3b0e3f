"""The named methods of rotation and rounding, from a Hugging Face folder to a .rac file (docs/methods/).

Each is a transform that leaves what the model computes as it is (encode/transforms), and then GPTQ or rounding to
nearest on grids of groups (encode/layerwise). Ours, which has its own budget, is `rac.encode.pack.pack`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.evaluate import load_original
from rac.encode.allocate.budget import read_text
from rac.encode.encoded import Fidelity
from rac.encode.options import Progress
from rac.encode.pack import Summary
from rac.encode.sources import Source, open_source
from rac.errors import OutputError, SourceError
from rac.methods.grouped import pack_grouped
from rac.models.predictions import quiet
from rac.stages.groups import Grouped

if TYPE_CHECKING:
    from rac.methods.rotations.result import Rotations
    from rac.methods.transforms import Parts

Note = Callable[[str, int, int], None]
Known = dict[str, "tuple[Rotations, float]"]
"""Rotations that were learned before, by recipe, and the seconds it took: they do not depend on the bits of weights."""
LEARNED = 512
"""Tokens of a sequence that rotations are learned on."""
CHECKED = 256
"""Tokens on which a transformed model must compute what the original does."""


@dataclass(frozen=True, slots=True)
class Method:
    """What is asked for."""

    name: str
    """Name of the recipe, one of RECIPES."""
    bits: int = 4
    group: int | None = 128
    """Columns that share a scale; None: a row."""
    entropy: bool = True
    """Entropy-code the integers; False: at their fixed rate."""
    text: str | None = None
    """File to calibrate on; "rtn" and "quarot", which rounds to nearest then, need none."""
    tokens: int = 40960
    """Most tokens of the text to calibrate on."""
    activations: int = 4
    """Bits of activations and cache that SpinQuant learns for; SmoothQuant looks for its alpha with 8."""
    seed: int = 0
    """Seed of Hadamard matrices, and of what is drawn."""
    symmetric: bool = False
    """Grids about zero."""
    steps: int = 100
    """Optimiser steps of the recipes that learn: SpinQuant and KurTail."""
    dtype: str = "BF16"
    """What a reader gets, and what tensors that are not quantised are stored in where the model was transformed."""


@dataclass(slots=True)
class _Run:
    """A model on its way."""

    method: Method
    model: Any
    ids: NDArray[np.int64]
    note: Note
    known: Known
    parts: Parts | None = None
    attach: Callable[[Source], Source] | None = None
    spared: float = 0


@dataclass(frozen=True, slots=True)
class Made:
    """What a method has made of a model."""

    source: Source
    matrices: dict[str, Grouped]
    about: dict[str, Any]
    """For the provenance."""
    spared: float = 0
    """Seconds that learning took an earlier time, and none now."""


def make(src: str | os.PathLike[str], method: Method, note: Note | None = None, known: Known | None = None) -> Made:
    """Transform and round the model of a Hugging Face folder by a named method.

    Embeddings and output layer, norms and biases stay as they are, as in the papers.

    Args:
        src: The folder of a causal language model, with weights and tokenizer.
        method: What is asked for.
        note: Called with (what, done, of) as it goes.
        known: What was learned on this model with all of `method` but its bits; takes in what is learned now.

    Raises:
        SourceError: No such model, no text where one is needed, or a text that is too short.
        TransformError: The method does not fit the architecture, or would change what the model computes.
        RacError: What was learned has diverged, and others.
    """
    path = os.fspath(src)
    if method.name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {method.name!r}")
    if method.text is None and method.name not in WITHOUT_TEXT:
        raise SourceError(f"{method.name} calibrates on a text: give --calibrate FILE", file=path)
    tell = note or (lambda *_: None)
    tell("loading", 0, 1)
    import transformers

    with quiet(transformers):
        _, model, _ = load_original(path)
    words = model.get_input_embeddings().num_embeddings
    run = _Run(method, model, _ids(words, method, path), tell, {} if known is None else known)
    about = {"recipe": method.name, "bits": method.bits, "group": method.group or "row", "symmetric": method.symmetric}
    found = RECIPES[method.name](run)
    source = open_source(path)
    if run.parts is not None:
        from rac.methods import transforms

        source = transforms.source(run.parts, path, method.dtype)
        about |= run.parts.about
    if run.attach:
        source = run.attach(source)
    if method.text is not None and method.name != "rtn":
        about |= {"tokens": int(run.ids.size), "seed": method.seed}
    return Made(source, found, about, run.spared)


def pack_method(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: Method,
    *,
    level: str = "default",
    jobs: int | None = None,
    force: bool = False,
    note: Note | None = None,
    progress: Progress | None = None,
    layer: Callable[[Fidelity], None] | None = None,
) -> Summary:
    """`make`, and a .rac file of it.

    Args:
        src: The folder.
        out: The .rac file.
        method: What is asked for.
        level: Effort level of what stays lossless.
        jobs: Threads that pack.
        force: Replace a file that exists.
        note: Called with (what, done, of) as it goes.
        progress: Called after every tensor that was written.
        layer: Called after each quantised tensor.

    Raises:
        RacError: As `make`; OutputError where the file exists or cannot be written.
    """
    if os.path.isfile(out) and not force:  # said before the long work, not after it
        raise OutputError("exists already; give --force to replace it", file=os.fspath(out))
    m = make(src, method, note)
    return pack_grouped(
        m.source,
        m.matrices,
        out,
        method.entropy,
        m.about,
        level=level,
        jobs=jobs,
        force=force,
        progress=progress,
        layer=layer,
    )


def _ids(words: int, method: Method, path: str) -> NDArray[np.int64]:
    """(count, context) token ids of the text; without one, some tokens to compare the transformed model on."""
    from rac.methods.layerwise import calibration_ids

    if method.text is None:
        return np.random.default_rng(0).integers(0, words, (1, CHECKED))
    return calibration_ids(path, read_text(method.text), method.tokens)


def _transformed(run: _Run, change: Callable[[Parts], None]) -> None:
    """Change the model, and see that it still computes the same; TransformError where it does not."""
    import torch

    from rac.methods import transforms

    tokens = torch.from_numpy(run.ids[0, :CHECKED])
    run.parts = p = transforms.parts(run.model)
    before = transforms.logits(run.model, tokens)
    change(p)
    run.note("comparing with the original", 0, 1)
    transforms.require_same(before, p, tokens)


def _rtn(run: _Run) -> dict[str, Grouped]:
    from rac.methods.layerwise import quantise_rtn

    m = run.method
    return quantise_rtn(run.model, m.bits, m.group, symmetric=m.symmetric, note=run.note)


def _gptq(run: _Run) -> dict[str, Grouped]:
    from rac.methods.layerwise import quantise_gptq

    m = run.method
    return quantise_gptq(run.model, run.ids, m.bits, m.group, symmetric=m.symmetric, note=run.note)


def _smoothquant(run: _Run) -> dict[str, Grouped]:
    """2211.10438: migration by the best alpha, then rounding to nearest."""
    import torch

    from rac.methods.smoothquant import smoothquant

    some = torch.from_numpy(run.ids[:4]).split(1)

    def change(p: Parts) -> None:
        run.note("looking for alpha", 0, 1)
        smoothquant(p, some, bits=run.method.bits, group=run.method.group)

    _transformed(run, change)
    return _rtn(run)


def _quarot(run: _Run) -> dict[str, Grouped]:
    """2404.00456: Hadamard matrices, then GPTQ; without a text, rounding to nearest."""
    from rac.methods import transforms

    _transformed(run, lambda p: transforms.quarot(p, run.method.seed))
    return _rtn(run) if run.method.text is None else _gptq(run)


def _short(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The text in shorter sequences, some of which what learns holds out."""
    context = min(LEARNED, max(2, ids.size // 8))
    return ids.reshape(-1)[: ids.size // context * context].reshape(-1, context)


def _learned(run: _Run, learn: Callable[[Parts], Rotations]) -> dict[str, Grouped]:
    """Rotations that are learned, R4 as in QuaRot, then GPTQ; the rotations travel in the file."""
    from rac.methods import transforms
    from rac.methods.rotations.result import attached, fuse

    def change(p: Parts) -> None:
        transforms.fuse_norms(p)
        name, start = run.method.name, time.monotonic()
        if name in run.known:
            found, run.spared = run.known[name]
        else:
            found = learn(p)
            run.known[name] = found, time.monotonic() - start
        fuse(p, found)
        p.about["keys"] = run.method.seed  # of R3, which changes no weight: a simulated cache rotates its keys by it
        run.attach = lambda source: attached(source, found)

    _transformed(run, change)
    return _gptq(run)


def _spinquant(run: _Run) -> dict[str, Grouped]:
    """2405.16406."""
    from rac.methods.rotations.simulate import Simulated
    from rac.methods.rotations.spinquant import spinquant

    m = run.method
    how = replace(Simulated(), activations=m.activations, cache=m.activations)
    return _learned(run, lambda p: spinquant(p, _short(run.ids), steps=m.steps, how=how, seed=m.seed, note=run.note))


def _kurtail(run: _Run) -> dict[str, Grouped]:
    """2503.01483."""
    from rac.methods.rotations.kurtail import kurtail

    m = run.method
    return _learned(run, lambda p: kurtail(p, _short(run.ids), steps=m.steps, seed=m.seed, note=run.note))


RECIPES: dict[str, Callable[[_Run], dict[str, Grouped]]] = {
    "rtn": _rtn,
    "gptq": _gptq,
    "smoothquant": _smoothquant,
    "quarot": _quarot,
    "spinquant": _spinquant,
    "kurtail": _kurtail,
}
WITHOUT_TEXT = ("rtn", "quarot")
