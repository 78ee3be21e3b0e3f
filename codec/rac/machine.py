"""What this machine offers to work with: cores and memory."""

from __future__ import annotations

import os
import re


def threads_of(threads: int | None, most: int | None = 8) -> int:
    """Number of threads: what is asked for, or one per core up to `most`; ValueError below 1."""
    if threads is not None and threads < 1:
        raise ValueError("threads must be at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or min(most or cores, cores)


def memory() -> int:
    """Bytes of the machine's memory; 16 GiB where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 16 << 30


def room() -> int:
    """Bytes that work on matrices may take: a quarter of the machine's memory."""
    return memory() // 4


def parse_size(text: str) -> int:
    """Bytes of a size such as "500MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size such as 500MB or 2GiB")
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
