"""All named methods on one model, at several bits: files, their sizes, the time they took (`rac compare --recipes`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rac.encode.grouped import pack_grouped
from rac.encode.methods import RECIPES, Method, Note, make
from rac.encode.pack import pack

ALL = (*RECIPES, "aligned")


@dataclass(frozen=True, slots=True)
class Point:
    """A file that a recipe has made."""

    recipe: str
    bits: int
    path: str
    seconds: float
    """To make it."""
    coded: float
    """Bits of a quantised weight, entropy-coded, everything counted."""
    fixed: float | None
    """The same at the fixed rate of its integers; None: it has none."""
    size: int
    """Bytes of the file."""


def points(
    src: str, folder: str, recipes: Sequence[str], bits: Sequence[int], method: Method, note: Note | None = None,
    effort: str = "default", cache: str | None = None,
) -> Iterator[Point]:  # fmt: skip
    """Pack a model by each recipe at each number of bits.

    Args:
        src: Hugging Face folder of a causal language model.
        folder: Where the files go, as "recipe-bits.rac". Those that are there already are made again.
        recipes: Of ALL.
        bits: 2 to 8 each. The aligned recipe, whose bits can be any number, gets those of the first other recipe at
            the same bits, all counted, or these where there is none.
        method: Everything but name and bits.
        note: Called with (what, done, of).
        effort: Of the aligned recipe.
        cache: Folder of its calibrations.

    Raises:
        RacError: As `make` and `pack`.
    """
    if unknown := [r for r in recipes if r not in ALL]:
        raise ValueError(f"recipes are {', '.join(ALL)}, not {unknown[0]!r}")
    os.makedirs(folder, exist_ok=True)
    for b in bits:
        budget: float | None = None
        for name in sorted(recipes, key=lambda r: r == "aligned"):
            path, start = os.path.join(folder, f"{name}-{b}.rac"), time.monotonic()
            if name == "aligned":
                done = pack(
                    src, path, bits=budget or float(b), calibrate=method.text or "none", tokens=method.tokens,
                    effort=effort, cache=cache, force=True, note=note,
                )  # fmt: skip
                took, fixed = time.monotonic() - start, None
            else:
                made = make(src, replace(method, name=name, bits=b), note)
                done = pack_grouped(made.source, made.matrices, path, True, made.about, force=True)
                took = time.monotonic() - start
                plain = pack_grouped(made.source, made.matrices, f"{path}.fixed", False, made.about, force=True)
                os.unlink(f"{path}.fixed")
                fixed, budget = plain.quantised_bits, budget or done.quantised_bits
            yield Point(name, b, path, took, done.quantised_bits, fixed, done.stored)
