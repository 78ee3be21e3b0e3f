"""`python -m rac.cli`."""

import sys

from rac.cli import main

sys.exit(main())
