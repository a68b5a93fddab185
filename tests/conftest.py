"""One thread a test process: two processes of two threads on two cores wait for each other more than they compute.

Without a GPU, Triton interprets its kernels; it has to know before it is imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
