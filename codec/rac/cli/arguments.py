"""How commands and their arguments are stated."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

EFFORTS = ("fast", "default", "max")


def number(word: str, least: int, what: str) -> Callable[[str], int | None]:
    """Type of an argument that is `word`, which is None, or a number of at least `least`: `what` in the error."""

    def parse(given: str) -> int | None:
        if given != word and (not given.isdecimal() or int(given) < least):
            raise argparse.ArgumentTypeError(f"must be {word} or {what}")
        return None if given == word else int(given)

    return parse


def command(p: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], about: str) -> None:
    """Make a parser that of a command."""
    p.description = about
    p.set_defaults(run=run)


def argument(p: Any, stated: str, about: str, **how: Any) -> None:
    """Add an argument, stated as help shows it: "src IN.rac", "-j --jobs N"; an option without a value is a switch."""
    words = stated.split()
    names = [w for w in words if w.startswith("-")] or words[:1]
    if words[len(names) :]:
        how["metavar"] = words[-1]
    elif "choices" not in how:
        how["action"] = "store_true"
    p.add_argument(*names, help=about, **how)
