"""One thread a test process: two processes of two threads on two cores wait for each other more than they compute.

Without a GPU, Triton interprets its kernels; it has to know before it is imported.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Files whose tests share what takes long to make: with `--dist loadgroup` one process runs them all, and first.
TOGETHER = (
    "test_demo.py",
    "test_devices.py",
    "test_experts.py",
    "test_harness.py",
    "test_continuing.py",
    "test_grpo.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
