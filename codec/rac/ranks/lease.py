"""Who is alive: every rank renews one small file, and others hold a rank dead whose file has not changed for a while.

Each looks at its own clock alone: how long a file stayed as it is since it was first seen so. Clocks of machines may
differ by any amount. A claim of the dead is no claim; a rank that was held dead and goes on makes the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rac.errors import RacError
from rac.ranks.store import Store

LEASE = 60.0  # seconds without a sign of life after which a rank counts as dead
BEATS = 5  # signs of life in that time


def parsed(data: bytes | None) -> dict[str, Any]:
    """A small JSON file; what is missing, cut off or no map says nothing."""
    with contextlib.suppress(ValueError):
        found = json.loads(data or b"")
        if isinstance(found, dict):
            return found
    return {}


@dataclass(slots=True)
class Heart:
    """This rank, and the file that says that it is alive. Open it by `with`."""

    store: Store
    rank: int | None
    """Its number; None: it finishes the pack."""
    lease: float = LEASE
    about: dict[str, Any] = field(default_factory=dict)
    """What the file says beside: for people."""
    owner: str = ""
    _beat: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        of = "finish" if self.rank is None else f"{self.rank:05d}"
        self.owner = f"{of}-{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"

    @property
    def name(self) -> str:
        """Name of the file."""
        return file_of(self.owner)

    def beat(self, ended: bool = False) -> None:
        """Renew the file."""
        self._beat += 1
        told = {"owner": self.owner, "rank": self.rank, "beat": self._beat, "lease": self.lease, "at": time.time()}
        self.store.put(self.name, json.dumps({**self.about, **told, "ended": ended}).encode())

    def _run(self) -> None:
        while not self._stop.wait(self.lease / BEATS):
            with contextlib.suppress(RacError):  # a full disk: whoever has work to write says so
                self.beat()

    def __enter__(self) -> Heart:
        self.beat()
        self._thread = threading.Thread(target=self._run, name="rac-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        with contextlib.suppress(RacError):
            self.beat(ended=True)


def file_of(owner: str) -> str:
    """Name of the file of an owner: one for each rank, one for each that finishes."""
    rank = owner.partition("-")[0]
    return f"ranks/{owner if rank == 'finish' else rank}.json"


@dataclass(slots=True)
class Watch:
    """What this process has seen of others, by its own clock."""

    store: Store
    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def alive(self, owner: str, lease: float) -> bool:
        """Whether the owner of a claim may still be at work on it."""
        found = parsed(self.store.get(file_of(owner)))
        if found.get("owner", owner) != owner or found.get("ended"):  # it was started again, or has stopped
            return False
        now, sign = self.clock(), found.get("beat")
        last, since = self._seen.get(owner, (None, now))
        if owner not in self._seen or sign not in (None, last):
            since = now
        self._seen[owner] = (last if sign is None else sign), since
        return now - since <= lease
