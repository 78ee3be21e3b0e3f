"""The named methods of rotation and rounding, from a Hugging Face folder to a .rac file (docs/methods/).

Each is a transform that leaves what the model computes as it is (methods/transforms), and then GPTQ or rounding to
nearest on grids of groups (methods/layerwise). Ours, which has its own budget, is `rac.encode.pack.pack`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.builtin import AUTO
from rac.calibrate.evaluate import load_original
from rac.calibrate.given import Given
from rac.calibrate.text import Note
from rac.encode.allocate.budget import read_text
from rac.encode.options import silent
from rac.encode.pack import Summary
from rac.encode.sources import Source, open_source
from rac.errors import OutputError, SourceError
from rac.methods import transforms
from rac.methods.grouped import pack_grouped
from rac.methods.layerwise import calibration_ids, quantise_gptq, quantise_rtn
from rac.methods.matrices import Files
from rac.methods.rotations import Rotations, Simulated, attached, fuse, kurtail, spinquant
from rac.methods.smoothquant import smoothquant
from rac.models.predictions import quiet
from rac.stages.groups import Grouped

Known = dict[str, tuple[Rotations, float]]
"""Rotations that were learned before, by method, and the seconds it took: they do not depend on the bits of weights."""
LEARNED = 512
"""Tokens of a sequence that rotations are learned on."""
CHECKED = 256
"""Tokens on which a transformed model must compute what the original does."""


@dataclass(frozen=True, slots=True)
class Method:
    """What is asked for."""

    name: str
    """One of METHODS."""
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
    """Optimiser steps of the methods that learn: SpinQuant and KurTail."""
    dtype: str = "BF16"
    """What a reader gets, and what tensors that are not quantised are stored in where the model was transformed."""

    def __post_init__(self) -> None:
        if self.text in ("self", AUTO):
            raise ValueError(f"named methods calibrate on one text file, not on {self.text!r}")


@dataclass(frozen=True, slots=True)
class Made:
    """What a method has made of a model."""

    source: Source
    matrices: dict[str, Grouped]
    about: dict[str, Any]
    """For the provenance."""
    spared: float = 0
    """Seconds that learning took an earlier time, and none now."""


@dataclass(slots=True)
class _Run:
    """A model on its way."""

    method: Method
    ids: NDArray[np.int64]
    note: Note
    known: Known


def make(src: str | os.PathLike[str], method: Method, note: Note | None = None, known: Known | None = None) -> Made:
    """Transform and round the model of a Hugging Face folder by a named method.

    Embeddings and output layer, norms and biases stay as they are, as in the papers. The folder is that of a causal
    language model, with weights and tokenizer. `note` is called with (what, done, of) as it goes; `known` is what was
    learned on this model with all of `method` but its bits, and takes in what is learned now.

    SourceError where there is no such model, no text where one is needed, or a text that is too short; TransformError
    where the method does not fit the architecture, or would change what the model computes; RacError where what was
    learned has diverged, and others.
    """
    path = os.fspath(src)
    if method.name not in METHODS:
        raise ValueError(f"recipe must be one of {', '.join(METHODS)}, not {method.name!r}")
    if method.text is None and method.name not in WITHOUT_TEXT:
        raise SourceError(f"{method.name} calibrates on a text: give --calibrate FILE", file=path)
    if not os.path.isdir(path):
        raise SourceError(
            f"{method.name} takes the folder of a causal language model; download a repository", file=path
        )
    tell = note or silent
    tell("loading", 0, 1)
    import transformers

    from rac.calibrate.experts import Stored  # needs torch

    source = open_source(path, dequantise=True)
    given = Given.of(path, source.every) if source.dequantised else None
    with quiet(transformers):
        _, model, _ = load_original(given or path)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # one expert after the other, so that its inputs can be seen
    if method.text is None:  # some tokens to compare the transformed model on
        words = model.get_input_embeddings().num_embeddings
        ids = np.random.default_rng(0).integers(0, words, (1, CHECKED))
    else:
        ids = calibration_ids(path, read_text(method.text), method.tokens)
    known = {} if known is None else known
    spared = known[method.name][1] if method.name in known else 0.0
    run = _Run(method, ids, tell, known)
    about = {"recipe": method.name, "bits": method.bits, "group": method.group or "row", "symmetric": method.symmetric}
    change, by_gptq = METHODS[method.name]
    files = Files.of(model, Stored(given.parts if given else Path(path))) if change is None else None
    p = None if change is None else _transformed(run, model, change)
    exact = by_gptq and method.text is not None
    rounded = partial(quantise_gptq, model, ids) if exact else partial(quantise_rtn, model)
    matrices = rounded(method.bits, method.group, symmetric=method.symmetric, note=tell)
    if files is not None:
        matrices = files.apply(matrices)
    if p is not None:
        source = transforms.source(p, path, method.dtype)
        about |= p.about
    if method.name in known:
        source = attached(source, known[method.name][0])
    if method.text is not None and method.name != "rtn":
        about |= {"tokens": int(ids.size), "seed": method.seed}
    return Made(source, matrices, about, spared)


def pack_method(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: Method,
    *,
    level: str = "default",
    jobs: int | None = None,
    force: bool = False,
    note: Note | None = None,
) -> Summary:
    """`make`, and a .rac file of it; `level` is that of what stays lossless. Errors are those of both."""
    if os.path.isfile(out) and not force:  # said before the long work, not after it
        raise OutputError("exists already; give --force to replace it", file=os.fspath(out))
    m = make(src, method, note)
    return pack_grouped(m.source, m.matrices, out, method.entropy, m.about, level=level, jobs=jobs, force=force)


def _transformed(run: _Run, model: Any, change: Change) -> transforms.Parts:
    """Change the model, and see that it still computes the same; TransformError where it does not."""
    import torch

    tokens = torch.from_numpy(run.ids[0, :CHECKED])
    p = transforms.parts(model)
    before = transforms.logits(model, tokens)
    change(run, p)
    run.note("comparing with the original", 0, 1)
    transforms.require_same(before, p, tokens)
    return p


def _smoothquant(run: _Run, p: transforms.Parts) -> None:
    """Migration by the best alpha."""
    import torch

    run.note("looking for alpha", 0, 1)
    smoothquant(p, torch.from_numpy(run.ids[:4]).split(1), bits=run.method.bits, group=run.method.group)


def _learned(learn: Callable[..., Rotations], run: _Run, p: transforms.Parts, **how: Any) -> None:
    """Rotations that are learned, R4 as in QuaRot; the rotations travel in the file."""
    transforms.fuse_norms(p)
    m, start = run.method, time.monotonic()
    if m.name not in run.known:  # on shorter sequences, some of which what learns holds out
        context = min(LEARNED, max(2, run.ids.size // 8))
        ids = run.ids.reshape(-1)[: run.ids.size // context * context].reshape(-1, context)
        found = learn(p, ids, steps=m.steps, seed=m.seed, note=run.note, **how)
        run.known[m.name] = found, time.monotonic() - start
    fuse(p, run.known[m.name][0])
    p.about["keys"] = m.seed  # of R3, which changes no weight: a simulated cache rotates its keys by it


def _spinquant(run: _Run, p: transforms.Parts) -> None:
    _learned(spinquant, run, p, how=Simulated(run.method.activations, run.method.activations))


Change = Callable[[_Run, transforms.Parts], None]
METHODS: dict[str, tuple[Change | None, bool]] = {
    "rtn": (None, False),
    "gptq": (None, True),  # 2210.17323
    "smoothquant": (_smoothquant, False),  # 2211.10438
    "quarot": (lambda run, p: transforms.quarot(p, run.method.seed), True),  # 2404.00456
    "spinquant": (_spinquant, True),  # 2405.16406
    "kurtail": (partial(_learned, kurtail), True),  # 2503.01483
}
"""What is done to the model first, and whether GPTQ rounds then; nearest values do without a text. arXiv numbers."""
WITHOUT_TEXT = ("rtn", "quarot")
