"""Before anything is imported: one thread for each library's sums. Tests are small, and xdist has a worker per core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
