"""What commands have in common: how arguments are stated, sizes for people, lines of progress on standard error."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

EFFORTS = ("fast", "default", "max")
PICKLES = "take .pt, .pth and .bin files: torch.load(weights_only=True) reads them"
QUIET, NORMAL, VERBOSE = range(3)
PLAIN_SECONDS = 30.0  # between two lines of progress where standard error is no terminal; a tenth with --verbose


class _Volume:
    """How much the commands of this process say."""

    level = NORMAL
    json = False  # standard output is one JSON value
    piped = False  # standard output is the archive


def set_volume(args: argparse.Namespace) -> None:
    """Take --quiet, --verbose and --json, where a command has them."""
    _Volume.level = QUIET if args.quiet else VERBOSE if args.verbose else NORMAL
    _Volume.json = getattr(args, "json", False) is True
    _Volume.piped = getattr(args, "output", None) == "-"


def loud() -> bool:
    """Whether remarks are wanted: --quiet was not given."""
    return _Volume.level > QUIET


def say(text: str) -> None:
    """Print a result for people: nothing with --quiet or --json, to standard error where the archive goes to output."""
    if _Volume.level > QUIET and not _Volume.json:
        print(text, file=sys.stderr if _Volume.piped else sys.stdout)


def tell(value: Any) -> None:
    """Print a result for programs, where --json was given."""
    if _Volume.json:
        what = json.dumps(value, indent=1, ensure_ascii=False, default=_plain)
        print(what, file=sys.stderr if _Volume.piped else sys.stdout)


def _plain(value: Any) -> Any:
    """What JSON has no word for."""
    return value.hex() if isinstance(value, bytes) else str(value)


def detail(text: str) -> None:
    """Print what only --verbose asks for, to standard error."""
    if _Volume.level == VERBOSE:
        print(text, file=sys.stderr)


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
    p.set_defaults(run=run, parser=p)
    argument(p, "-q --quiet", "no progress, no summary: errors and warnings alone")
    argument(p, "-v --verbose", "progress in plain lines where standard error is no terminal, and details")


def argument(p: Any, stated: str, about: str, **how: Any) -> None:
    """Add an argument, stated as help shows it: "src IN.rac", "-j --jobs N"; an option without a value is a switch."""
    words = stated.split()
    names = [w for w in words if w.startswith("-")] or words[:1]
    if words[len(names) :]:
        how["metavar"] = words[-1]
    elif "choices" not in how:
        how["action"] = "store_true"
    p.add_argument(*names, help=about, **how)


def size(n: float) -> str:
    """Bytes for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def fitted(names: Iterable[str], beside: int, least: int = 12) -> list[str]:
    """Names for a column of a table that has `beside` more characters: on a terminal cut in front to fit its width."""
    every = list(names)
    if not sys.stdout.isatty():
        return every
    most = max(least, shutil.get_terminal_size().columns - beside)
    return [n if len(n) <= most else "…" + n[1 - most :] for n in every]


class _Line:
    """A line that is written over on terminals; elsewhere plain lines, far apart, of what takes long."""

    END = "\n"  # leaves the last line

    def __init__(self) -> None:
        self._terminal, self._drawn = sys.stderr.isatty(), False
        self._on = _Volume.level > QUIET
        self._start = self._shown = time.monotonic()
        self._every = 0.1 if self._terminal else PLAIN_SECONDS / (10 if _Volume.level == VERBOSE else 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            sys.stderr.write(self.END)
            sys.stderr.flush()

    def _draw(self, now: float, line: str) -> None:
        self._shown = now
        if self._terminal:
            self._drawn = True
            line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
        else:
            line += "\n"
        sys.stderr.write(line)
        sys.stderr.flush()


class Progress(_Line):
    """Counts bytes. Shows itself after half a second."""

    END = "\r\x1b[K"  # wipes the line

    def __init__(self, what: str, total: int) -> None:
        super().__init__()
        self._what, self._total, self._done = what, max(1, total), 0

    def line(self, text: str) -> None:
        """A line that stays, above the one that moves."""
        if self._on and (self._terminal or _Volume.level == VERBOSE):
            sys.stderr.write(("\r\x1b[K" if self._drawn else "") + text + "\n")

    def __call__(self, name: str, n: int) -> None:
        """`n` more bytes are done; `name` is what they belong to."""
        self._done += n
        now = time.monotonic()
        if not self._on or now - self._start < 0.5 or now - self._shown < self._every:
            return
        rate = self._done / (now - self._start)
        left = (self._total - self._done) / rate if rate else 0
        share = min(1.0, self._done / self._total)
        bar = f"{self._what} [{'#' * int(20 * share):<20}] {share:4.0%}"
        self._draw(now, f"{bar} {size(self._done)}  {size(rate)}/s  ETA {clock(left)}  {name}")


class Steps(_Line):
    """A line for each step of a long preparation: what, how much of it, time left."""

    def __init__(self) -> None:
        super().__init__()
        self._what, self._first = "", 0

    def __call__(self, what: str, done: int, of: int) -> None:
        """`done` of `of` parts of step `what` are done; 0 of 0: a remark."""
        now = time.monotonic()
        if not of and self._on:
            self._remark(what)
            return
        if not self._on or (not self._terminal and now - self._shown < self._every):
            return
        if what != self._what:
            if self._what and self._terminal:
                sys.stderr.write("\n")
            self._what, self._start, self._first = what, now, done
        elif now - self._shown < self._every and done < of:
            return
        new = done - self._first
        left = f"  ETA {clock((now - self._start) / new * (of - done))}" if new > 0 and done < of else ""
        self._draw(now, f"{what}  {done:,} of {of:,}{left or f'  in {clock(now - self._start)}'}")

    def _remark(self, what: str) -> None:
        """A whole line that stays, at once: it may be the only one that is said of a choice."""
        sys.stderr.write(("\n" if self._what and self._terminal else "") + what + "\n")
        sys.stderr.flush()
        self._what, self._drawn = "", False


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some."""
    s = max(0, round(seconds))
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"
