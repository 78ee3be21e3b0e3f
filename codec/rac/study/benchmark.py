"""All named methods on one model, at several bits and seeds: files, sizes, time (`rac compare --recipes`)."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rac.calibrate.text import Note
from rac.encode.pack import pack
from rac.methods.grouped import pack_grouped
from rac.methods.named import METHODS, Known, Method, make

ALL = (*METHODS, "aligned")
DRAW = ("quarot", "spinquant", "kurtail")  # recipes that the seed makes a difference to
LIST = "points.json"


@dataclass(frozen=True, slots=True)
class Point:
    """A file that a recipe has made."""

    recipe: str
    bits: int
    seed: int
    path: str
    seconds: float  # seconds to make the file, with what was learned once for all bits
    coded: float  # bits of a quantised weight, entropy-coded, everything counted
    fixed: float | None  # the same at the fixed rate of the integers; None: there is no such rate
    size: int  # bytes of the file


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made of a model."""

    recipes: Sequence[str]  # names from ALL
    bits: Sequence[int]
    """2 to 8 each. The aligned recipe, whose bits can be any number, gets those of the first other recipe at the same
    bits, all counted, or these where there is none."""
    method: Method  # everything but name, bits and seed
    seeds: Sequence[int] = (0,)  # recipes that draw come once for each, the others for the first
    effort: str = "default"  # effort of the aligned recipe
    reuse: bool = False  # take files of an earlier call with the same settings; otherwise all are made again


def points(src: str, folder: str, plan: Plan, note: Note | None = None) -> Iterator[Point]:
    """Pack a model, the Hugging Face folder `src` of a causal language model, by each recipe at each number of bits.

    Files go into `folder` as "recipe-bits.rac", with "-seed" behind for seeds other than the first; calibrations of
    the aligned recipe do too, and "points.json", the list of what was made with the settings that made it.
    """
    if unknown := [r for r in plan.recipes if r not in ALL]:
        raise ValueError(f"recipes are {', '.join(ALL)}, not {unknown[0]!r}")
    os.makedirs(folder, exist_ok=True)
    there = _read(folder)  # of other files the list is kept
    known: dict[int, Known] = {seed: {} for seed in plan.seeds}
    order = sorted(plan.recipes, key=lambda r: r == "aligned")
    for b in plan.bits:
        budget = float(b)
        for name, seed in [(n, s) for n in order for s in (plan.seeds if n in DRAW else plan.seeds[:1])]:
            file = f"{name}-{b}{f'-{seed}' if seed != plan.seeds[0] else ''}.rac"
            path, own = os.path.join(folder, file), replace(plan.method, name=name, bits=b, seed=seed)
            how = {"effort": plan.effort, "budget": budget} if name == "aligned" else {"effort": None, "budget": None}
            asked = {"model": os.path.realpath(src), **how, **asdict(own)}
            point = _same(there.get(file), asked, path) if plan.reuse else None
            if point is None:
                if name == "aligned":
                    point = _aligned(src, path, own, budget, plan.effort, note)
                else:
                    point = _method(src, path, own, known[seed], note)
                there[file] = {"asked": asked, "point": asdict(point)}
                with open(os.path.join(folder, LIST), "w", encoding="utf-8") as f:
                    json.dump(there, f, indent=1)
            if name == order[0] and seed == plan.seeds[0]:
                budget = point.coded
            yield point


def _aligned(src: str, path: str, method: Method, budget: float, effort: str, note: Note | None) -> Point:
    start = time.monotonic()
    text: dict[str, Any] = {"calibrate": method.text or "none", "tokens": method.tokens}
    done = pack(src, path, bits=budget, effort=effort, cache=os.path.dirname(path), force=True, note=note, **text)
    took = time.monotonic() - start
    coded = done.quantised_bits
    return Point("aligned", method.bits, method.seed, path, took, coded=coded, fixed=None, size=done.stored)


def _method(src: str, path: str, method: Method, known: Known, note: Note | None) -> Point:
    start = time.monotonic()
    made = make(src, method, note, known)
    done = pack_grouped(made.source, made.matrices, path, True, made.about, force=True)
    took = time.monotonic() - start + made.spared
    plain = pack_grouped(made.source, made.matrices, f"{path}.fixed", False, made.about, force=True).quantised_bits
    os.unlink(f"{path}.fixed")
    coded = done.quantised_bits
    return Point(method.name, method.bits, method.seed, path, took, coded=coded, fixed=plain, size=done.stored)


def _read(folder: str) -> dict[str, Any]:
    """The list of an earlier call, empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, LIST), encoding="utf-8") as f:
        found = json.load(f)
        return found if isinstance(found, dict) else {}
    return {}


def _same(listed: Any, asked: dict[str, Any], path: str) -> Point | None:
    """What an earlier call made, where it was asked for the same and its file is still there."""
    with contextlib.suppress(KeyError, TypeError, OSError):
        point = Point(**{**listed["point"], "path": path})
        if listed["asked"] == asked and os.path.getsize(path) == point.size:
            return point
    return None
