"""`python -m rac`."""

import sys

from rac.cli import main

sys.exit(main())
