"""How long to train. The schedule itself is transformers' warmup_stable_decay."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn


def schedule_options(max_steps: int, decay_steps: float, decay_type: str, min_lr_ratio: float) -> dict[str, Any]:
    """Keyword arguments of transformers' ``get_wsd_schedule`` for a run of ``max_steps`` steps."""
    steps = round(decay_steps * max_steps) if decay_steps < 1 else int(decay_steps)
    return {"num_decay_steps": steps, "decay_type": decay_type, "min_lr_ratio": min_lr_ratio}


def steps_in(minutes: float, model: nn.Module, batches: list[dict[str, torch.Tensor]], accumulation: int) -> int:
    """How many optimiser steps fit into ``minutes``, from timing some on a copy of the model.

    ``batches`` are micro-batches on the model's device; the first two warm up and are not counted. The model and the
    random state are left as they were.
    """
    trial = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(trial.parameters(), lr=0.0, fused=True)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for batch in batches[:2]:
            trial(**batch).loss.backward()
        backward = median(_timed(lambda b=b: trial(**b).loss.backward(), b) for b in batches[2:] or batches)
        update = median(_timed(optimizer.step, batches[0]) for _ in range(3))
    return max(1, int(minutes * 60 / (backward * accumulation + update)))


def _timed(work: Callable[[], Any], batch: dict[str, torch.Tensor]) -> float:
    on_gpu = next(iter(batch.values())).is_cuda
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
