"""A model's matrices in all bases, as a report: what `rac analyze` writes as JSON. docs/analyze.md has its keys."""

from __future__ import annotations

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
from rac.study.analyze import bits, measures
from rac.study.analyze.bases import ALIGNED, NAMES, SEED, TEXTS, Basis, Inputs, Matrix, Rotations, bases

VERSION = 1
"""Version of the report's keys."""
RATE = 4.0
TOKENS = 16384
LARGE = 1 << 22
"""Weights from which on matrices are measured in processes of their own."""
LEARNED = "Columns behind learned rotations, of inputs that the file has none for behind Hadamard; one step for all."
SAME = {"hadamard-feedback": "hadamard"}
"""Bases whose matrix is that of another."""
SPECTRUM = {"hadamard2": "hadamard", "hadamard-feedback": "hadamard", "triangular": "pca"}
"""Bases whose singular values are those of another."""
LEVELS = (
    "kurtosis",
    "kurtosis_rows",
    "outlier",
    "effective_rank",
    "stable_rank",
    "top1",
    "top10",
    "gini",
    "output_top10",
    "output_gini",
    "entropy",
    "entropy_columns",
    "bits",
    "estimate",
)
"""Figures of a basis that have means; `bits` and `estimate` by weights, the others by matrices."""
FINE = (2.7, 3.3)
"""Kurtosis of what counts as Gaussian: 3 +- 0.3."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix stands in a model."""

    block: str
    role: str
    gain: str | None
    add: float
    values: bool
    reads: bool


@dataclass(frozen=True, slots=True)
class _Job:
    """A matrix to measure."""

    tensor: SourceTensor
    place: _Place
    gain: measures.Array | None
    fit: Layer | None
    judge: Layer | None


def analyze(
    path: str | os.PathLike[str],
    text: str | None = None,
    *,
    tokens: int = TOKENS,
    layers: str = "*",
    rotations: Sequence[Rotations] = (),
    rate: float = RATE,
    seen: bool = False,
    cache: str | None = None,
    jobs: int | None = None,
    note: Note | None = None,
) -> dict[str, Any]:
    """Measure every large matrix of a model in every basis.

    With a text the model reads `tokens` of it, half of them to find the bases and half to judge their errors by.

    Args:
        path: What can be packed; with `text` a Hugging Face model folder.
        text: A text; None: errors of weights count alike, and there are no aligned bases.
        tokens: Most tokens of the text to use.
        layers: Pattern (fnmatch) of the names of matrices.
        rotations: Learned ones.
        rate: Bits per weight of the original basis, about, whose error is that of all.
        seen: Find the bases on all tokens, and judge by the same: what is learned by heart counts then.
        cache: Where calibrations are kept; None: nowhere.
        jobs: Matrices at a time; None: one for each core, at most 8.
        note: Progress.

    Returns:
        The report, of numbers, texts, lists and maps; figures that there are not (of a matrix of zeros) are None.

    Raises:
        SourceError: No model, no matrix to measure, a text that is too short, NaN or infinity.
        MissingDependencyError: As of `calibrate`.
    """
    start, tell = time.monotonic(), note or (lambda *_: None)
    if tokens < 2 or not 1 <= rate <= 7:
        raise ValueError("tokens must be at least 2, and bits within 1 and 7")
    source = open_source(path)
    every = [t for t in source.tensors if quantisable(t)]
    wanted = [t for t in every if fnmatchcase(t.name, layers)]
    if not wanted:
        why = f"none of its {len(every)} matrices matches {layers!r}" if every else "holds no large matrix of floats"
        raise SourceError(why, file=os.fspath(path))
    fit: Mapping[str, Layer] = {}
    judge: Mapping[str, Layer] = {}
    read = 0
    if text is not None:
        each: dict[str, Any] = {"fisher": False, "cache": cache, "note": tell}
        if seen:
            fit = judge = all_of = calibrate(path, text, tokens=tokens, **each)
            read = all_of.tokens
        else:
            middle = len(text) // 2
            one, two = (calibrate(path, t, tokens=tokens // 2, **each) for t in (text[:middle], text[middle:]))
            fit, judge, read = one, two, one.tokens + two.tokens
    calibrated = time.monotonic()
    rules, places = _rules(source), {t.name: _place(t.name, _rules(source)) for t in wanted}
    by_name = {t.name: t for t in source.tensors}
    gains: dict[str | None, measures.Array] = {
        p.gain: _gain(by_name[p.gain], p.add) for p in places.values() if p.gain in by_name
    }
    groups: dict[Any, list[_Job]] = {}
    for t in wanted:
        layer, other, place = fit.get(t.name), judge.get(t.name), places[t.name]
        key = t.name if layer is None else (_digest(layer), place.gain)
        groups.setdefault(key, []).append(_Job(t, place, gains.get(place.gain), layer, other))
    work = [(_need(jobs_), (jobs_, tuple(rotations), rate)) for jobs_ in groups.values()]
    total, done, found = sum(math.prod(t.shape) for t in wanted), 0, []
    tell("measuring weights", 0, total)
    jobs = max(1, jobs or min(os.cpu_count() or 1, workers.THREADS))
    # Processes have one BLAS thread each; those of one process wait for each other in loops, which took 4 times as long
    pool = workers.start(jobs, jobs > 1 and total >= LARGE)
    try:
        for some in workers.run(pool, _group, work, room()):
            found += some
            done += sum(math.prod(one["shape"]) for one in some)
            tell("measuring weights", done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    order = {t.name: (int(places[t.name].block or -1), i) for i, t in enumerate(wanted)}  # files sort 10 before 2
    found.sort(key=lambda one: order[one["name"]])
    about: dict[str, Any] = {
        "version": VERSION,
        "model": os.path.basename(os.path.normpath(os.fspath(path))),
        "matrices": len(found),
        "of": len(every),
        "layers": layers,
        "weights": total,
        "tokens": read,
        "second_moment": "text" if text is not None else "identity",
        "unreached": _unreached(found) if read else [],
        "seen": seen,
        "damp": DAMP,
        "rate": rate,
        "states": bits.STATES,
        "seed": SEED,
        "fused": rules is not None,
        "seconds": {"calibration": round(calibrated - start, 1), "all": 0.0},
    }
    report = summary(about, found, [r.name for r in rotations])
    about["seconds"]["all"] = round(time.monotonic() - start, 1)
    return report


def _unreached(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [one["name"] for one in found if not one["inputs"]]


def _rules(source: Source) -> Rules | None:
    """Rules of the architecture that the folder's config.json states; None where it states none that is known."""
    for a in source.attachments:
        if a.name == "config.json":
            try:
                return RULES.get(json.loads(a.read()).get("model_type"))
            except (ValueError, AttributeError):
                return None
    return None


def _place(name: str, rules: Rules | None) -> _Place:
    numbers = re.search(r"(?:^|\.)(\d+)\.", name)
    block = numbers[1] if numbers else ""
    role = re.sub(r"(?<![^.])\d+(?![^.])", "*", name).removesuffix(".weight").rpartition("*.")[2]
    if rules is None or not numbers:
        return _Place(block, role, None, 0.0, False, False)
    prefix = name[: numbers.end()]
    path = name.removeprefix(prefix).removesuffix(".weight")
    norms = [(rules.attention_in, rules.attention_norm), (rules.mlp_in, rules.mlp_norm)]
    norm = next((n for into, n in norms if path in into), None)
    gain = f"{prefix}{norm}.weight" if norm else None
    return _Place(block, role, gain, rules.unit, path == rules.attention_out, norm is not None)


def _gain(t: SourceTensor, add: float) -> measures.Array:
    return np.asarray(to_framework(t.read(0, t.nbytes), t.dtype, t.shape, "np")).astype(np.float64) + add


def _digest(layer: Layer) -> bytes:
    """XXH3-128 of the second moment: matrices of one input are measured together."""
    return zstd.digest(np.ascontiguousarray(layer.second).reshape(-1).view(np.uint8).data)


def _need(jobs: Sequence[_Job]) -> int:
    """About the bytes that measuring matrices of one input takes."""
    return max(64 * math.prod(j.tensor.shape) + 100 * j.tensor.shape[-1] ** 2 for j in jobs)


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
    place = job.place
    made = bases(Matrix(w, inputs, place.block, place.values, place.reads), rotations) if w.any() else []
    out: dict[str, Any] = {}
    ref = bits.reference(made[0], rate) if made else None
    for b in made:
        assert ref is not None  # noqa: S101
        at, mine = bits.equal(b, ref, made[0]), _measures(b, out)
        mine |= {
            "bits": at.bits,
            "measured": at.measured,
            "off": at.off,
            "basis_entries": b.entries,
            "estimate": mine["entropy_columns"] + math.log2(mine["rms"]) - at.scale - 1,
        }
        out[b.id] = {key: _plain(v) for key, v in mine.items()}
    snr = 10 * math.log10(made[0].output(w) / ref.error) if ref and ref.error > 0 else None
    return {
        "name": job.tensor.name,
        "input": first,
        "block": place.block,
        "role": place.role,
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
    blocks: dict[str, list[dict[str, Any]]] = {}
    for one in whole:
        blocks.setdefault(one["block"], []).append(one)
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
        "gaussian": {
            key: {
                m: sum(_fine(one["bases"][key][m]) for one in whole if key in one["bases"])
                for m in ("kurtosis", "kurtosis_rows")
            }
            for key in used
        },
        "counts": [_count(known, blocks, a, r) for a in ALIGNED for r in rotated if known],
        "histograms": shown,
        "edges": measures.EDGES.tolist(),
        "tensors": found,
    }


def _fine(x: float | None) -> bool:
    return x is not None and FINE[0] <= x <= FINE[1]


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
    have = [one for one in known if a in one["bases"] and r in one["bases"]]
    more = {one["name"]: _plain(one["bases"][a]["bits"] - one["bases"][r]["bits"]) for one in have}
    by_block = {
        b: _plain(float(np.average([more[n["name"]] for n in mine], weights=[math.prod(n["shape"]) for n in mine])))
        for b, ones in blocks.items()
        if (mine := [one for one in ones if one["name"] in more])
    }
    return {
        "aligned": a,
        "rotated": r,
        "fewer": sum(v < 0 for v in more.values()),
        "matrices": len(more),
        "blocks_fewer": sum(v < 0 for v in by_block.values()),
        "blocks": len(by_block),
        "not": {name: v for name, v in more.items() if v >= 0},
    }


def _shown(ones: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of three matrices: of the least, the middle and the largest kurtosis as they are."""
    order = sorted((one["bases"]["original"]["kurtosis"] or 0.0, one["name"]) for one in ones)
    return list(dict.fromkeys(order[i][1] for i in (0, len(order) // 2, -1))) if order else []
