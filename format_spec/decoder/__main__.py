"""python format_spec/decoder/__main__.py FILE.rac [--json]."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from decoder.cli import main

if __name__ == "__main__":
    sys.exit(main())
