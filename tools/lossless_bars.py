"""Speeds that RAC set itself, as ratios to peers of the same run, for tools/bench_lossless.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Speed = Callable[[str, str], float | None]  # row, "pack" or "unpack": MB/s, None where it was not measured
MODELS = {"8b": "8B-shaped", "smollm2": "SmolLM2", "minilm": "MiniLM BF16"}
NOT_FASTEST = ("rac", "blosc2", "zstd-3")  # peers that `fast` need not pass: they shrink less, or not tensors


@dataclass(frozen=True)
class Bar:
    """A row is to reach `must` times the speed of a peer, and `aim` if it can."""

    row: str
    what: str
    peer: str
    must: float
    aim: float


_DEFAULT = {"8b": (1.3, 2.0), "smollm2": (1.0, 1.5), "minilm": (0.9, 1.2)}
_NARROW = {"8b": (0.8, 1.0), "smollm2": (0.7, 1.0), "minilm": (0.6, 1.0)}  # RAC_CPU=avx2


def model(path: str) -> str | None:
    """Which of the three models a file is, by its name; None: another, or not of 16 bits."""
    lower = path.lower()
    return None if "f32" in lower else next((key for key in MODELS if key in lower), None)


def bars(path: str, cpu: str) -> Iterator[Bar]:
    """The bars of a file under an instruction set ("": that of the machine), whichever rows were measured."""
    if (key := model(path)) is None:
        return
    at = f"@{cpu}" if cpu else ""
    table = _NARROW if cpu == "avx2" else _DEFAULT
    yield Bar(f"rac-default{at}", "unpack", "zipnn", *table[key])
    if cpu == "avx2":
        return
    yield Bar(f"rac-fast{at}", "unpack", "zipnn", 1.2, 1.2)
    yield Bar(f"rac-max{at}", "unpack", "pcodec-12", 1.0, 1.5)
    yield Bar(f"rac-default{at}", "pack", "zipnn", 0.5, 0.8)


def verdicts(path: str, rows: Mapping[str, None], threads: int, speed: Speed) -> Iterator[str]:
    """A line for each bar of a file whose two rows were measured with so many threads."""
    for cpu in sorted({row.partition("@")[2] for row in rows if row.startswith("rac")}):
        found = list(bars(path, cpu))
        fast = f"rac-fast@{cpu}" if cpu else "rac-fast"
        if found and cpu != "avx2" and speed(fast, "unpack"):
            others = [r for r in rows if not r.startswith(NOT_FASTEST) and r != "zipnn"]
            found += [Bar(fast, "unpack", peer, 1.0, 1.0) for peer in others]
        for bar in found:
            ours, peer = speed(bar.row, bar.what), speed(bar.peer, bar.what)
            if not ours or not peer:
                continue
            ratio = ours / peer
            state = "aim met" if ratio >= bar.aim else "met" if ratio >= bar.must else "MISSED"
            yield f"| {MODELS[model(path) or '']} | {bar.what} {bar.row} | {bar.peer} | {threads}T | {ratio:.2f} | " + (
                f"{bar.must:.1f} | {bar.aim:.1f} | {state} |"
            )
