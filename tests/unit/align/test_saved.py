"""Arrays that several threads read."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rac.linalg import saved


def test_one_thread_at_a_time_reads_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.ones((16, 16), np.float32))
    read, inside, most = np.load, 0, 0

    def slow(*args: Any, **how: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return read(*args, **how)

    monkeypatch.setattr(np, "load", slow)
    threads = [threading.Thread(target=saved.load, args=(tmp_path / "a.npy", "r")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        saved.load(tmp_path / "a.npy")
