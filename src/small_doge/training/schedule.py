"""How long to train. The schedule itself is transformers' warmup_stable_decay."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn


def schedule_options(max_steps: int, decay_steps: float, decay_type: str, min_lr_ratio: float) -> dict[str, Any]:
    """Keyword arguments of transformers' ``get_wsd_schedule`` for a run of ``max_steps`` steps."""
    steps = round(decay_steps * max_steps) if decay_steps < 1 else int(decay_steps)
    return {"num_decay_steps": steps, "decay_type": decay_type, "min_lr_ratio": min_lr_ratio}


@dataclass(frozen=True)
class Schedule:
    """The three stages of a run, in steps."""

    warmup: int
    decay: int
    total: int

    def facts(self, step: int) -> dict[str, Any]:
        """Where a run is after ``step`` steps; stable means that the next one is at the peak rate."""
        last = self.total - self.decay
        stage = "warmup" if step < self.warmup else "decay" if step > last else "stable"
        return {"stage": stage, "step": step, "total": self.total, "stable_from": self.warmup, "stable_to": last}


def set_schedule(args: Any, max_steps: int, carried: bool | None = None) -> Schedule:
    """Set the warmup, stable and decay steps of a recipe for a run of ``max_steps``.

    Args:
        carried: of a run that continues another, whether its optimiser goes on; then there is no warmup, otherwise a
            short one. With ``args.decay`` all else is decay.
    """
    if carried is not None:
        args.warmup_steps = 0 if carried else args.rewarmup_steps
    warmup = min(int(args.get_warmup_steps(max_steps)), max_steps)
    args.warmup_steps = warmup
    decay_steps = max_steps - warmup if args.decay else args.decay_steps
    options = schedule_options(max_steps, decay_steps, args.decay_type, args.min_lr_ratio)
    args.lr_scheduler_kwargs = options
    return Schedule(warmup, min(options["num_decay_steps"], max_steps), max_steps)


def steps_in(
    minutes: float,
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    accumulation: int,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    bf16: bool = False,
    compiled: bool = False,
) -> int:
    """How many optimiser steps fit into ``minutes``, from timing some on a copy of the model, as training computes.

    ``batches`` are micro-batches on the model's device, at least three; the first two warm up and are not counted. The
    fastest quarter of the others counts: what else the machine does for a moment should not shorten the whole run. The
    model and the random state are left as they were.
    """
    trial = copy.deepcopy(model).train()
    optimizer = make_optimizer(trial)
    run: Any = torch.compile(trial) if compiled else trial

    def backward(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=bf16):
            loss = run(**batch, skip_logits=True).loss
        loss.backward()

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        per_batch = _usual([_timed(partial(backward, batch)) for batch in batches][2:])
        update = _usual([_timed(optimizer.step) for _ in range(5)][1:])
    return max(1, int(minutes * 60 / (per_batch * accumulation + update)))


def _usual(seconds: list[float]) -> float:
    """The lower quartile."""
    return sorted(seconds)[len(seconds) // 4]


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
