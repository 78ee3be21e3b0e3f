"""The first thing that a worker process does. Imports nothing that loads numpy, which reads the environment once."""

from __future__ import annotations

import os
import signal


def begin() -> None:
    """Ctrl-C is the first process's to handle, and there is a core for one thread of the BLAS."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
