"""`rac load`."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterable
from typing import Any

HELP = """\
Load every tensor, as a program would, and say how long what took.

Three stages run side by side: reading (with checksums), copying to the device where there is one, and decoding. Each
line gives the bytes of a stage, the time in which it was at work at all, and the rate in that time; decoding counts
dense bytes. --bench loads three times and shows the fastest. --timeline draws which stage was at work when."""
STAGES = ("read", "copy", "decode")
Event = tuple[str, float, float, int, int]
"""Stage, start, end (seconds from the beginning), bytes, number of the thread."""


def add(commands: Any) -> None:
    """Add the command."""
    p = commands.add_parser(
        "load",
        help="load all tensors and time it",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("src", metavar="IN.rac", help="the archive, one shard of a set, or a URL")
    p.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("-j", "--jobs", type=int, metavar="N", help="threads that decode (default: one per core, at most 8)")
    p.add_argument("--ring", default="256MB", metavar="SIZE", help="memory beside the tensors (default: 256MB)")
    p.add_argument("--bench", action="store_true", help="three times, and the fastest of them")
    p.add_argument("--timeline", metavar="FILE.svg", help="draw it")
    p.set_defaults(run=run)


class _Trace:
    """Takes down what is done when."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.events: list[Event] = []
        self._lanes: dict[int, int] = {}

    def __call__(self, stage: str, start: float, end: float, size: int) -> None:
        """From any thread."""
        lane = self._lanes.setdefault(threading.get_ident(), len(self._lanes))
        self.events.append((stage, start - self.begin, end - self.begin, size, lane))


def run(args: argparse.Namespace) -> int:
    """Load, and print the timeline."""
    import rac
    from rac.cli.progress import Progress, parse_size, size
    from rac.decode.unpack import tensor_bytes

    try:
        ring = parse_size(args.ring)
    except argparse.ArgumentTypeError as e:
        raise ValueError(str(e)) from None
    framework = "np" if args.device == "cpu" else "pt"
    best: tuple[float, _Trace] | None = None
    for _ in range(3 if args.bench else 1):
        trace = _Trace()
        with rac.open(args.src, framework, args.device, args.jobs, ring=ring, trace=trace) as f:
            stored = sum(a.access.size for a in f.archives)
            dense = sum(tensor_bytes(e) for a in f.archives for e in a.index.entries)
            with Progress("loading", dense) as progress:
                tensors = f.load(lambda t, p=progress: p(t.name, t.nbytes))  # type: ignore[misc]
            if framework == "pt":
                _wait(args.device)
            seconds, decoder, names = time.monotonic() - trace.begin, f.decoder, len(tensors)
            del tensors
        if best is None or seconds < best[0]:
            best = seconds, trace
    assert best is not None  # noqa: S101
    seconds, trace = best
    print(
        f"{args.src}: {names} tensors, {size(stored)} -> {size(dense)} in {seconds:.3f} s, "
        f"{dense / seconds / 1e9:.2f} GB/s"
    )
    print(f"  decoder  {decoder}")
    for stage in STAGES:
        mine = [e for e in trace.events if e[0] == stage]
        if mine:
            busy, total = busy_time(mine), sum(e[3] for e in mine)
            print(f"  {stage:<7} {size(total):>9} in {busy:6.3f} s  {total / max(busy, 1e-9) / 1e9:6.2f} GB/s")
    print(f"  memory   {size(_peak())} at most" + _device_peak(args.device))
    if args.timeline:
        _draw(args.timeline, trace.events, seconds, f"{args.src}: {decoder}")
        print(f"  timeline {args.timeline}")
    return 0


def busy_time(events: Iterable[Event]) -> float:
    """Seconds in which at least one of the events goes on."""
    total, end = 0.0, 0.0
    for _, a, b, _, _ in sorted(events, key=lambda e: e[1]):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def _wait(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _peak() -> int:
    """Most bytes that the process has had in memory."""
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_peak(device: str) -> str:
    from rac.cli.progress import size

    if device.split(":")[0] != "cuda":
        return ""
    import torch

    return f", {size(torch.cuda.max_memory_allocated(device))} on {device}"


COLOURS = {"read": "#4477aa", "copy": "#ccbb44", "decode": "#ee6677"}


def _draw(path: str, events: list[Event], seconds: float, title: str) -> None:
    """A bar for each event, a line for each thread of a stage; OutputError where it cannot be written."""
    from html import escape

    from rac.container.output import write_whole

    rows: dict[tuple[str, int], int] = {}
    for stage in STAGES:
        for lane in sorted({e[4] for e in events if e[0] == stage}):
            rows[stage, lane] = len(rows)
    width, left, row, top = 900, 80, 18, 34
    scale, height = (width - left - 20) / seconds, top + row * len(rows) + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/><text x="8" y="18">{escape(title)}</text>',
    ]
    for (stage, _), y in rows.items():
        out.append(f'<text x="8" y="{top + row * y + 12}">{stage}</text>')
    for stage, a, b, size, lane in events:
        out.append(
            f'<rect x="{left + a * scale:.2f}" y="{top + row * rows[stage, lane] + 2}" height="{row - 4}" '
            f'width="{max(0.3, (b - a) * scale):.2f}" fill="{COLOURS[stage]}"><title>{size} bytes</title></rect>'
        )
    for i in range(6):
        x = left + (width - left - 20) * i / 5
        out.append(f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle">{seconds * i / 5 * 1000:.0f} ms</text>')
    write_whole(path, "\n".join([*out, "</svg>\n"]))
