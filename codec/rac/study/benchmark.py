"""All named methods on one model, at several bits and seeds: files, sizes, time (`rac compare --recipes`)."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rac.calibrate.layers import Note
from rac.encode.pack import pack
from rac.methods.grouped import pack_grouped
from rac.methods.named import METHODS, Known, Method, make

ALL = (*METHODS, "aligned")
DRAW = ("quarot", "spinquant", "kurtail")
"""Recipes that the seed makes a difference to."""
LIST = "points.json"


@dataclass(frozen=True, slots=True)
class Point:
    """A file that a recipe has made."""

    recipe: str
    bits: int
    seed: int
    path: str
    seconds: float
    """Seconds to make the file, with what was learned once for all bits."""
    coded: float
    """Bits of a quantised weight, entropy-coded, everything counted."""
    fixed: float | None
    """Bits of a quantised weight at the fixed rate of the integers, everything counted; None: there is no such rate."""
    size: int
    """Bytes of the file."""


def points(
    src: str,
    folder: str,
    recipes: Sequence[str],
    bits: Sequence[int],
    method: Method,
    note: Note | None = None,
    *,
    seeds: Sequence[int] = (0,),
    effort: str = "default",
    reuse: bool = False,
) -> Iterator[Point]:
    """Pack a model by each recipe at each number of bits.

    What was made is listed in "points.json" beside the files, with the settings that made it.

    Args:
        src: Hugging Face folder of a causal language model.
        folder: Where the files go, as "recipe-bits.rac", with "-seed" behind for seeds other than the first; and the
            calibrations of the aligned recipe.
        recipes: Names from ALL.
        bits: 2 to 8 each. The aligned recipe, whose bits can be any number, gets those of the first other recipe at
            the same bits, all counted, or these where there is none.
        method: Everything but name, bits and seed.
        note: Called with (what, done, of).
        seeds: Recipes that draw come once for each, the others for the first.
        effort: Effort of the aligned recipe.
        reuse: Take files that were made by an earlier call with the same settings; otherwise all are made again.

    Raises:
        RacError: As `make` and `pack`.
    """
    if unknown := [r for r in recipes if r not in ALL]:
        raise ValueError(f"recipes are {', '.join(ALL)}, not {unknown[0]!r}")
    os.makedirs(folder, exist_ok=True)
    there = _read(folder)  # of other files the list is kept
    known: dict[int, Known] = {seed: {} for seed in seeds}
    for b in bits:
        budget = float(b)
        order = sorted(recipes, key=lambda r: r == "aligned")
        for name, seed in [(n, s) for n in order for s in (seeds if n in DRAW else seeds[:1])]:
            path = os.path.join(folder, f"{name}-{b}{f'-{seed}' if seed != seeds[0] else ''}.rac")
            own = replace(method, name=name, bits=b, seed=seed)
            asked = {"model": os.path.realpath(src), "effort": effort, "budget": budget, **asdict(own)}
            if name != "aligned":
                asked |= {"effort": None, "budget": None}
            point = _same(there.get(os.path.basename(path)), asked, path) if reuse else None
            if point is None:
                if name == "aligned":
                    point = _aligned(src, path, own, budget, effort, folder, note)
                else:
                    point = _method(src, path, own, known[seed], note)
                there[os.path.basename(path)] = {"asked": asked, "point": asdict(point)}
                with open(os.path.join(folder, LIST), "w", encoding="utf-8") as f:
                    json.dump(there, f, indent=1)
            if name == order[0] and seed == seeds[0]:
                budget = point.coded
            yield point


def _aligned(src: str, path: str, method: Method, budget: float, effort: str, cache: str, note: Note | None) -> Point:
    start = time.monotonic()
    done = pack(
        src,
        path,
        bits=budget,
        calibrate=method.text or "none",
        tokens=method.tokens,
        effort=effort,
        cache=cache,
        force=True,
        note=note,
    )
    took = time.monotonic() - start
    return Point("aligned", method.bits, method.seed, path, took, done.quantised_bits, None, done.stored)


def _method(src: str, path: str, method: Method, known: Known, note: Note | None) -> Point:
    start = time.monotonic()
    made = make(src, method, note, known)
    done = pack_grouped(made.source, made.matrices, path, True, made.about, force=True)
    took = time.monotonic() - start + made.spared
    plain = pack_grouped(made.source, made.matrices, f"{path}.fixed", False, made.about, force=True)
    os.unlink(f"{path}.fixed")
    return Point(
        method.name, method.bits, method.seed, path, took, done.quantised_bits, plain.quantised_bits, done.stored
    )


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
