"""A model's matrices in all bases, as a report: what `rac analyze` writes as JSON. docs/analyze.md has its keys."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.given import Given
from rac.calibrate.layers import Layer, calibrate
from rac.calibrate.text import Note
from rac.container import zstd
from rac.encode import workers
from rac.encode.align.recipe import DAMP, matrix_of, quantisable
from rac.encode.sources import Source, SourceTensor, open_source
from rac.errors import SourceError
from rac.frameworks import to_framework
from rac.machine import room
from rac.methods.transforms.rules import RULES, Rules
from rac.study import grouped
from rac.study import role as role_of
from rac.study.analyze import bits, measures
from rac.study.analyze.bases import ALIGNED, NAMES, SEED, TEXTS, Basis, Inputs, Matrix, Rotations, bases

Layers = Mapping[str, Layer]
VERSION = 1  # version of the report's keys
LARGE = 1 << 22  # weights from which on matrices are measured in processes of their own
LEARNED = "Columns behind learned rotations, of inputs that the file has none for behind Hadamard; one step for all."
SAME = {"hadamard-feedback": "hadamard"}  # bases whose matrix is that of another
SPECTRUM = {"hadamard2": "hadamard", "hadamard-feedback": "hadamard", "triangular": "pca"}
"""Bases whose singular values are those of another."""
LEVELS = (*(key for key, *_ in measures.FIGURES), "top1")
"""Figures of a basis that have means; `bits` and `estimate` by weights, the others by matrices."""
FINE = (2.7, 3.3)  # kurtosis of what counts as Gaussian: 3 +- 0.3


@dataclass(frozen=True, slots=True)
class _Job:
    """A matrix to measure, and where it stands in the model."""

    tensor: SourceTensor
    block: str
    role: str
    norm: str | None  # name of the gain in front of its inputs
    gain: measures.Array | None
    values: bool
    reads: bool
    fit: Layer | None
    judge: Layer | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured, and how."""

    tokens: int = 16384  # most tokens of the text to use
    layers: str = "*"  # pattern (fnmatch) of the names of matrices
    rotations: tuple[Rotations, ...] = ()  # learned ones
    rate: float = 4.0  # bits per weight of the original basis, about, whose error is that of all
    seen: bool = False  # find the bases on all tokens, and judge by the same: what is learned by heart counts then
    cache: str | None = None  # where calibrations are kept; None: nowhere
    jobs: int | None = None  # matrices at a time; None: one for each core, at most 8


def analyze(
    path: str | os.PathLike[str], text: str | None = None, asked: Asked | None = None, note: Note | None = None
) -> dict[str, Any]:
    """Measure every large matrix of a model in every basis.

    With a text `path` is a Hugging Face model folder, and the model reads some of the text, half of it to find the
    bases and half to judge their errors by. Without one errors of weights count alike, and there are no aligned bases.
    The report is of numbers, texts, lists and maps; figures that there are not (of a matrix of zeros) are None.
    SourceError where there is no model, no matrix to measure, a text that is too short, NaN or infinity.
    """
    start, tell, asked = time.monotonic(), note or (lambda *_: None), asked or Asked()
    if asked.tokens < 2 or not 1 <= asked.rate <= 7:
        raise ValueError("tokens must be at least 2, and bits within 1 and 7")
    source = open_source(path, dequantise=True)
    every = [t for t in source.tensors if quantisable(t)]
    wanted = [t for t in every if fnmatchcase(t.name, asked.layers)]
    if not wanted:
        why = f"none of its {len(every)} matrices matches {asked.layers!r}"
        raise SourceError(why if every else "holds no large matrix of floats", file=os.fspath(path))
    fit, judge, read = ({}, {}, 0) if text is None else _calibrated(_model(path, source), text, asked, tell)
    calibrated = time.monotonic()
    rules, named = _rules(source), {t.name: t for t in source.tensors}
    found = _measured([_job(t, named, rules, fit, judge) for t in wanted], asked, tell)
    about: dict[str, Any] = {
        "version": VERSION,
        "model": os.path.basename(os.path.normpath(os.fspath(path))),
        "matrices": len(found),
        "of": len(every),
        "layers": asked.layers,
        "weights": sum(math.prod(t.shape) for t in wanted),
        "tokens": read,
        "second_moment": "text" if text is not None else "identity",
        "unreached": [one["name"] for one in found if not one["inputs"]] if read else [],
        "seen": asked.seen,
        "damp": DAMP,
        "rate": asked.rate,
        "states": bits.STATES,
        "seed": SEED,
        "fused": rules is not None,
        "seconds": {"calibration": round(calibrated - start, 1), "all": 0.0},
    }
    report = summary(about, found, [r.name for r in asked.rotations])
    about["seconds"]["all"] = round(time.monotonic() - start, 1)
    return report


def _model(path: str | os.PathLike[str], source: Source) -> str | Given:
    """What a calibration runs."""
    return Given.of(os.fspath(path), source.every) if source.dequantised else os.fspath(path)


def _calibrated(path: Any, text: str, asked: Asked, note: Note) -> tuple[Layers, Layers, int]:
    """Layers to find the bases by, layers to judge them by, and the tokens that were read."""

    def read(part: str, tokens: int) -> Any:
        return calibrate(path, part, tokens=tokens, fisher=False, cache=asked.cache, note=note)

    if asked.seen:
        every = read(text, asked.tokens)
        return every, every, every.tokens
    middle = len(text) // 2
    one, two = (read(part, asked.tokens // 2) for part in (text[:middle], text[middle:]))
    return one, two, one.tokens + two.tokens


def _job(t: SourceTensor, named: Mapping[str, SourceTensor], rules: Rules | None, fit: Layers, judge: Layers) -> _Job:
    numbers = re.search(r"(?:^|\.)(\d+)\.", t.name)
    block = numbers[1] if numbers else ""
    role = role_of(t.name).removesuffix(".weight").rpartition("*.")[2]
    norm, gain, values = None, None, False
    if rules is not None and numbers:
        path = t.name[numbers.end() :].removesuffix(".weight")
        norms = ((rules.attention_in, rules.attention_norm), (rules.mlp_in, rules.mlp_norm))
        norm = next((f"{t.name[: numbers.end()]}{norm}.weight" for into, norm in norms if norm and path in into), None)
        values = path == rules.attention_out
        if of := named.get(norm or ""):
            gain = to_framework(of.read(0, of.nbytes), of.dtype, of.shape, "np").astype(np.float64) + rules.unit
    return _Job(t, block, role, norm, gain, values, norm is not None, fit.get(t.name), judge.get(t.name))


def _measured(jobs: Sequence[_Job], asked: Asked, tell: Note) -> list[dict[str, Any]]:
    """The figures of all matrices in the order of the blocks; those of one input are measured together."""

    def of_input(job: _Job) -> Any:
        if job.fit is None:
            return job.tensor.name
        return zstd.digest(np.ascontiguousarray(job.fit.second).reshape(-1).view(np.uint8).data), job.norm

    work = []
    for some in grouped(jobs, of_input).values():
        need = max(64 * math.prod(j.tensor.shape) + 100 * j.tensor.shape[-1] ** 2 for j in some)  # bytes, about
        work.append((need, (some, asked.rotations, asked.rate)))
    total, done = sum(math.prod(job.tensor.shape) for job in jobs), 0
    found: dict[str, dict[str, Any]] = {}
    tell("measuring weights", 0, total)
    threads = max(1, asked.jobs or min(os.cpu_count() or 1, workers.THREADS))
    # Processes have one BLAS thread each; those of one process wait for each other in loops, which took 4 times as long
    pool = workers.start(threads, threads > 1 and total >= LARGE)
    try:
        for ones in workers.run(pool, _group, work, room()):
            found |= {one["name"]: one for one in ones}
            done += sum(math.prod(one["shape"]) for one in ones)
            tell("measuring weights", done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    in_order = sorted(jobs, key=lambda job: int(job.block or -1))  # files sort 10 before 2
    return [found[job.tensor.name] for job in in_order]


def _rules(source: Source) -> Rules | None:
    """Rules of the architecture that the folder's config.json states; None where it states none that is known."""
    with contextlib.suppress(ValueError, AttributeError, StopIteration):
        config = next(a for a in source.attachments if a.name == "config.json")
        return RULES.get(json.loads(config.read()).get("model_type"))
    return None


def _group(jobs: Sequence[_Job], rotations: tuple[Rotations, ...], rate: float) -> list[dict[str, Any]]:
    """All of the matrices of one input."""
    out, inputs = [], None
    for j in jobs:
        w = matrix_of(j.tensor)
        if j.fit is not None and j.fit.transposed and not j.fit.experts:
            w = np.ascontiguousarray(w.T)
        if inputs is None or inputs.width != w.shape[1]:
            width = w.shape[1]
            known = [x.second for x in (j.fit, j.judge) if x is not None and x.finite and len(x.second) == width]
            fit, judge = known if len(known) == 2 else (None, None)
            gain = j.gain if j.gain is not None and len(j.gain) == width else None
            inputs = Inputs(width, fit, judge, gain, DAMP)
        out.append(_tensor(j, jobs[0].tensor.name, w, inputs, rotations, rate))
    return out


def _tensor(
    job: _Job, first: str, w: NDArray[np.float32], inputs: Inputs, rotations: tuple[Rotations, ...], rate: float
) -> dict[str, Any]:
    """All of one matrix; `first` of its input names that."""
    made = bases(Matrix(w, inputs, job.block, job.values, job.reads), rotations) if w.any() else []
    out: dict[str, Any] = {}
    ref = bits.reference(made[0], rate) if made else None
    for b in made:
        assert ref is not None  # noqa: S101
        at, mine = bits.equal(b, ref, made[0]), _measures(b, out)
        mine |= {"bits": at.bits, "measured": at.measured, "off": at.off, "basis_entries": b.entries}
        mine["estimate"] = mine["entropy_columns"] + math.log2(mine["rms"]) - at.scale - 1
        out[b.id] = {key: _plain(v) for key, v in mine.items()}
    snr = 10 * math.log10(made[0].output(w) / ref.error) if ref and ref.error > 0 else None
    return {
        "name": job.tensor.name,
        "input": first,
        "block": job.block,
        "role": job.role,
        "shape": list(w.shape),
        "inputs": inputs.fit is not None,
        "gain": inputs.gain is not None,
        "snr": _plain(snr),
        "bases": out,
    }


def _measures(b: Basis, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a basis that do not need a coder; `known` has those of the bases before it."""
    if b.id in SAME:
        return dict(known[SAME[b.id]])
    v = b.coded
    energy, shares = measures.energies(v), b.shares()
    out = {
        "rms": measures.rms(v),
        "kurtosis": measures.kurtosis(v),
        "kurtosis_rows": measures.row_kurtosis(v),
        "outlier": measures.outlier_ratio(v),
        "top1": measures.top_share(energy, 0.01),
        "top10": measures.top_share(energy, 0.1),
        "curve": measures.curve(energy),
        "gini": measures.gini(energy),
        "output_top10": measures.top_share(shares, 0.1),
        "output_curve": measures.curve(shares),
        "output_gini": measures.gini(shares),
        "entropy": float(measures.entropy(v.reshape(1, -1))[0]),
        "entropy_columns": float(np.nanmean(measures.entropy(np.ascontiguousarray(v.T)))),
        "histogram": measures.histogram(v),
    }
    if b.id in SPECTRUM:
        same = known[SPECTRUM[b.id]]
        return out | {key: same[key] for key in ("effective_rank", "stable_rank")}
    values = measures.singular_values(v if b.whitened is None else b.whitened)
    return out | {"effective_rank": measures.effective_rank(values), "stable_rank": measures.stable_rank(values)}


def _plain(x: Any) -> Any:
    """For JSON: six digits, None for what is no number."""
    if isinstance(x, np.ndarray):
        return [_plain(v) for v in x.tolist()]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x


def summary(about: dict[str, Any], found: list[dict[str, Any]], learned: Sequence[str]) -> dict[str, Any]:
    """The report: means of blocks and of the model, counts, and the figures of each matrix."""
    whole = [one for one in found if one["bases"]]
    names = {**NAMES, **{name: f"learned: {name}" for name in learned}}
    used = [key for key in names if any(key in one["bases"] for one in whole)]
    blocks = grouped(whole, lambda one: str(one["block"]))
    rotated = [key for key in used if key not in ("original", *ALIGNED)]
    known = [one for one in whole if one["inputs"]]
    shown = _shown(whole)
    for one in found:
        for key, b in one["bases"].items():
            if one["name"] not in shown or key in SAME:
                b.pop("histogram", None)
    return {
        "about": about,
        "bases": [{"id": key, "name": names[key], "text": TEXTS.get(key, LEARNED)} for key in used],
        "model": {key: _means(whole, key) for key in used},
        "blocks": [{"block": b, "bases": {key: _means(ones, key) for key in used}} for b, ones in blocks.items()],
        "gaussian": {key: {m: _fine(whole, key, m) for m in ("kurtosis", "kurtosis_rows")} for key in used},
        "counts": [_count(known, blocks, a, r) for a in ALIGNED for r in rotated if known],
        "histograms": shown,
        "edges": measures.EDGES.tolist(),
        "tensors": found,
    }


def _fine(ones: Sequence[Mapping[str, Any]], key: str, figure: str) -> int:
    """Matrices whose kurtosis in a basis is that of a Gaussian."""
    found = [one["bases"][key][figure] for one in ones if key in one["bases"]]
    return sum(x is not None and FINE[0] <= x <= FINE[1] for x in found)


def _means(ones: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Means of a basis over the matrices that have it."""
    have = [(one["bases"][key], math.prod(one["shape"])) for one in ones if key in one["bases"]]
    out: dict[str, Any] = {}
    for level in LEVELS:
        pairs = [(b[level], n if level in ("bits", "estimate") else 1) for b, n in have if b[level] is not None]
        out[level] = _plain(sum(x * n for x, n in pairs) / sum(n for _, n in pairs)) if pairs else None
    for level in ("curve", "output_curve"):
        out[level] = _plain(np.mean([b[level] for b, _ in have], 0)) if have else None
    out["matrices"] = len(have)
    return out


def _count(
    known: Sequence[Mapping[str, Any]], blocks: Mapping[str, Sequence[Mapping[str, Any]]], a: str, r: str
) -> dict[str, Any]:
    """Where aligned coordinates take fewer bits than rotated ones."""
    have = [(one["name"], one["bases"]) for one in known if a in one["bases"] and r in one["bases"]]
    more = {name: _plain(found[a]["bits"] - found[r]["bits"]) for name, found in have}
    means = [
        _plain(float(np.average([more[n["name"]] for n in mine], weights=[math.prod(n["shape"]) for n in mine])))
        for ones in blocks.values()
        if (mine := [one for one in ones if one["name"] in more])
    ]
    fewer = {"fewer": sum(v < 0 for v in more.values()), "matrices": len(more)}
    by_block = {"blocks_fewer": sum(v < 0 for v in means), "blocks": len(means)}
    worse = {name: v for name, v in more.items() if v >= 0}
    return {"aligned": a, "rotated": r, **fewer, **by_block, "not": worse}


def _shown(ones: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of three matrices: of the least, the middle and the largest kurtosis as they are."""
    order = sorted((one["bases"]["original"]["kurtosis"] or 0.0, one["name"]) for one in ones)
    return list(dict.fromkeys(order[i][1] for i in (0, len(order) // 2, -1))) if order else []
