"""What tests share: matrices, models, layers, archives, servers and readers.

pytest puts `tests`, `tools` and `format_spec` on the path (pyproject.toml); `environment` does it for child processes.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """Variables for a process that imports what tests import."""
    folders = [str(ROOT / name) for name in ("tests", "tools", "format_spec")]
    given = [p for p in (os.environ.get("PYTHONPATH"),) if p]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders + given)} | more
