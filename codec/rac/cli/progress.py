"""A progress line on standard error: share, throughput, time left. Quiet where nobody watches."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType


def size(n: float) -> str:
    """Bytes for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def parse_size(text: str) -> int:
    """Bytes of a size such as "500MB", "2GiB" or a plain number."""
    import argparse
    import re

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GiB")
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


class Progress:
    """Counts bytes. Shows itself after half a second, on terminals only."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(1, total), 0
        self._start = self._shown = time.monotonic()
        self._on = sys.stderr.isatty()
        self._drawn = False

    def __enter__(self) -> Progress:
        """Start the clock."""
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        """Wipe the line."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def line(self, text: str) -> None:
        """A line that stays, above the one that moves."""
        if self._on:
            sys.stderr.write(("\r\x1b[K" if self._drawn else "") + text + "\n")

    def __call__(self, name: str, n: int) -> None:
        """`n` more bytes are done; `name` is what they belong to."""
        self._done += n
        now = time.monotonic()
        if not self._on or now - self._start < 0.5 or now - self._shown < 0.1:
            return
        self._shown, self._drawn = now, True
        rate = self._done / (now - self._start)
        left = (self._total - self._done) / rate if rate else 0
        share = min(1.0, self._done / self._total)
        bar = "#" * int(20 * share)
        line = f"{self._what} [{bar:<20}] {share:4.0%} {size(self._done)}  {size(rate)}/s  ETA {_clock(left)}  {name}"
        sys.stderr.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()


class Steps:
    """A line for the steps of a long preparation: what, how much of it, time left. On terminals only."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._what, self._start, self._shown, self._first = "", 0.0, 0.0, 0

    def __enter__(self) -> Steps:
        """Nothing is shown yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        """Leave the last line."""
        if self._on and self._what:
            sys.stderr.write("\n")

    def __call__(self, what: str, done: int, of: int) -> None:
        """`done` of `of` parts of step `what` are done; 0 of 0: a remark."""
        if not self._on:
            return
        now = time.monotonic()
        if what != self._what:
            if self._what:
                sys.stderr.write("\n")
            self._what, self._start, self._first = what, now, done
        elif now - self._shown < 0.1 and done < of:
            return
        self._shown, line = now, what
        if of:
            new = done - self._first
            left = f"  ETA {_clock((now - self._start) / new * (of - done))}" if new > 0 and done < of else ""
            line += f"  {done:,} of {of:,}{left or f'  in {_clock(now - self._start)}'}"
        sys.stderr.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    s = max(0, round(seconds))
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"
