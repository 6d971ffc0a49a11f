"""Settings of the whole test suite."""

import os

# Tests run in one process a core, and most of what they compute is tiny: more threads would be in each other's way.
# Set here because torch reads it when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
