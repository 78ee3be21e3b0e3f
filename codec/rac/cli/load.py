"""`rac load`."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterable
from html import escape
from typing import NamedTuple

import rac
from rac.cli.archives import dense
from rac.cli.terminal import Progress, argument, command, say, size, tell
from rac.container.access import NoRangesError
from rac.container.output import write_whole
from rac.machine import parse_size
from rac.system import peak_memory

HELP = """\
Load every tensor, as a program would, and say how long what took.

Three stages run side by side: reading (with checksums), copying to the device where there is one, and decoding. Each
line gives the bytes of a stage, the time in which it was at work at all, and the rate in that time; decoding counts
dense bytes. --bench loads three times and shows the fastest. --timeline draws which stage was at work when."""
COLOURS = {"read": "#4477aa", "copy": "#ccbb44", "decode": "#ee6677"}  # by stage


class Event(NamedTuple):
    """Something that was done; `start` and `end` are seconds from the beginning."""

    stage: str
    start: float
    end: float
    size: int
    lane: int  # number of the thread


def add(p: argparse.ArgumentParser) -> None:
    """Add the command."""
    command(p, run, HELP)
    argument(p, "src IN.rac", "the archive, one shard of a set, a URL, or - for standard input")
    argument(p, "--device DEVICE", "cpu (default), cuda, cuda:1, ...", default="cpu")
    argument(p, "-j --jobs N", "threads that decode (default: one per core, at most 8)", type=int)
    argument(p, "--ring SIZE", "memory beside the tensors (default: 256MB)", default="256MB")
    argument(p, "--bench", "three times, and the fastest of them")
    argument(p, "--timeline FILE.svg", "draw it")
    argument(p, "--json", "for programs")


class _Trace:
    """Takes down what is done when."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.events: list[Event] = []
        self._lanes: dict[int, int] = {}

    def __call__(self, stage: str, start: float, end: float, size: int) -> None:
        """From any thread."""
        lane = self._lanes.setdefault(threading.get_ident(), len(self._lanes))
        self.events.append(Event(stage, start - self.begin, end - self.begin, size, lane))


def _forward(args: argparse.Namespace) -> int:
    """Load from standard input, or from a server without ranges, as it comes."""
    if args.bench or args.timeline:
        raise ValueError(f"{args.src} can be read forward once only, without --bench and --timeline")
    source, start = sys.stdin.buffer if args.src == "-" else args.src, time.monotonic()
    with rac.stream(source, args.device, threads=args.jobs, ring=parse_size(args.ring)) as arriving:
        tensors = dict(arriving)
        seconds, total = time.monotonic() - start, sum(t.nbytes for t in tensors.values())
    say(f"{args.src}: {len(tensors)} tensors, {size(total)} in {seconds:.3f} s, {total / seconds / 1e9:.2f} GB/s")
    say(f"  decoder  {arriving.decoder}")
    about = {"file": args.src, "tensors": len(tensors), "bytes": total, "decoder": arriving.decoder}
    tell(about | {"seconds": seconds})
    return 0


def run(args: argparse.Namespace) -> int:
    """Load, and print the timeline."""
    try:
        return _forward(args) if args.src == "-" else _at_random(args)
    except NoRangesError:
        return _forward(args)


def _at_random(args: argparse.Namespace) -> int:
    ring, framework = parse_size(args.ring), "np" if args.device == "cpu" else "pt"
    on_gpu, found = args.device.split(":")[0] == "cuda", []
    for _ in range(3 if args.bench else 1):
        trace = _Trace()
        with rac.open(args.src, framework, args.device, args.jobs, ring=ring, trace=trace) as f:
            stored, total = sum(a.access.size for a in f.archives), dense(f.archives)
            with Progress("loading", total) as progress:
                tensors = f.load(lambda t, p=progress: p(t.name, t.nbytes))  # type: ignore[misc]
            if on_gpu:
                from torch import cuda

                cuda.synchronize(args.device)
            found.append((time.monotonic() - trace.begin, trace.events))
            decoder, names = f.decoder, len(tensors)
            del tensors
    seconds, events = min(found, key=lambda one: one[0])
    rate = f"in {seconds:.3f} s, {total / seconds / 1e9:.2f} GB/s"
    say(f"{args.src}: {names} tensors, {size(stored)} -> {size(total)} {rate}")
    say(f"  decoder  {decoder}")
    stages: dict[str, dict[str, float]] = {}
    for stage in COLOURS:
        if mine := [e for e in events if e.stage == stage]:
            busy, n = busy_time(mine), sum(e.size for e in mine)
            stages[stage] = {"bytes": n, "seconds": busy}
            say(f"  {stage:<7} {size(n):>9} in {busy:6.3f} s  {n / max(busy, 1e-9) / 1e9:6.2f} GB/s")
    peak = peak_memory()
    there = f", {size(cuda.max_memory_allocated(args.device))} on {args.device}" if on_gpu else ""
    if peak or there:
        say(f"  memory   {size(peak)} at most{there}")
    if args.timeline:
        _draw(args.timeline, events, seconds, f"{args.src}: {decoder}")
        say(f"  timeline {args.timeline}")
    about = {"file": args.src, "tensors": names, "stored": stored, "bytes": total, "decoder": decoder}
    tell(about | {"seconds": seconds, "stages": stages, "peak": peak})
    return 0


def busy_time(events: Iterable[Event]) -> float:
    """Seconds in which at least one of the events goes on."""
    total, end = 0.0, 0.0
    for _, a, b, _, _ in sorted(events, key=lambda e: e[1]):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def _draw(path: str, events: list[Event], seconds: float, title: str) -> None:
    """A bar for each event, a line for each thread of a stage; OutputError where it cannot be written."""
    lanes = sorted({(list(COLOURS).index(e.stage), e.lane) for e in events})
    rows = {(list(COLOURS)[stage], lane): i for i, (stage, lane) in enumerate(lanes)}
    width, left, row, top = 900, 80, 18, 34
    scale, height = (width - left - 20) / seconds, top + row * len(rows) + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/><text x="8" y="18">{escape(title)}</text>',
    ]
    out += [f'<text x="8" y="{top + row * y + 12}">{stage}</text>' for (stage, _), y in rows.items()]
    for stage, a, b, n, lane in events:
        out.append(
            f'<rect x="{left + a * scale:.2f}" y="{top + row * rows[stage, lane] + 2}" height="{row - 4}" '
            f'width="{max(0.3, (b - a) * scale):.2f}" fill="{COLOURS[stage]}"><title>{n} bytes</title></rect>'
        )
    for i in range(6):
        x = left + (width - left - 20) * i / 5
        out.append(f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle">{seconds * i / 5 * 1000:.0f} ms</text>')
    write_whole(path, "\n".join([*out, "</svg>\n"]))
