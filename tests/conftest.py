"""One thread a test process: two processes of two threads on two cores wait for each other more than they compute."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
