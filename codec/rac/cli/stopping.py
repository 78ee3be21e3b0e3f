"""Signals that ask a command to end: it ends as by Ctrl-C, and leaves nothing temporary."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal has asked the process to end; its number is the argument."""

    @property
    def code(self) -> int:
        """What a shell calls the end by this signal."""
        return 128 + int(self.args[0])


def _stop(number: int, _: object) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Let such signals interrupt meanwhile; those that are handled, or ignored as by `nohup`, stay as they are."""
    mine = []
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        mine = [s for s in _ASKING if signal.getsignal(s) is signal.SIG_DFL]
    try:
        for s in mine:
            signal.signal(s, _stop)
        yield
    finally:
        for s in mine:
            signal.signal(s, signal.SIG_DFL)
