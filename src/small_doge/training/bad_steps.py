"""Steps that go wrong: gradients that are not finite, and a loss that jumps.

What a step leaves stays on its device until the next line of the log or checkpoint, so that no step waits for the host.
There the run stops before a checkpoint holds what came of it. Where it is to skip such steps, the decision is made on
the device: the optimiser is handed ``found_inf``, as a gradient scaler does, and leaves weights, moments and its count
of steps as they were, to the bit.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

WINDOW = 100  # steps that mean and deviation are taken of
ENOUGH = 30  # steps before there is anything to compare with
LEAST = 0.005  # a deviation is at least this share of the mean: a loss that hardly moves may move
IN_A_ROW = 10  # skipped steps after which nothing is to be hoped for


class BadSteps(TrainerCallback, ExportableState):
    """Watches each step of a trainer, and stops it or skips steps.

    Args:
        action: "stop", "skip" or "ignore".
        factor: how many standard deviations over the mean of the last steps a loss jumps; None for no such check. To
            stop, it is the mean loss since the last look that has to; to skip, that of the step alone.
    """

    def __init__(self, action: str = "stop", factor: float | None = None):
        self.action, self.factor = action, factor
        self.trainer: Any = None
        self.failure: str | None = None  # why the run was stopped, for a person
        self.logged = 0  # the step of the last line of the log
        self.skipped = 0  # since the last line of the log
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        self._limit: torch.Tensor | None = None
        self._before: torch.Tensor | None = None
        self._steps: list[torch.Tensor] = []  # (3,) gradient norm, loss, skipped: of the steps since the last look

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps."""
        return {"args": {}, "attributes": {"losses": list(self.losses), "skipped": self.skipped}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__, {})
        if state.global_step and isinstance(saved, dict) and saved.get("attributes"):
            self.losses.extend(saved["attributes"]["losses"])
            self.skipped = saved["attributes"]["skipped"]
        self.logged = self.trainer._globalstep_last_logged  # LossSinceLastLog comes before
        total = self.trainer._tr_loss
        self._limit = torch.full_like(total, self._threshold())
        self._before = total.clone()

    def step(self, norm: Any) -> None:
        """Take in a step whose gradients are there and not yet applied; nothing here waits for the device."""
        if self.action == "ignore" or self._before is None or self._limit is None:
            return
        total = self.trainer._tr_loss  # Σ of this process's losses since the last line of the log
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        norm = torch.as_tensor(norm, device=total.device).float().detach()
        loss = (total - self._before).float()
        # A gradient scaler (fp16) finds its scale by gradients that are not finite, and leaves their steps out itself.
        scaled = getattr(self.trainer.accelerator, "scaler", None) is not None
        bad = torch.zeros_like(norm, dtype=torch.bool) if scaled else ~torch.isfinite(norm)
        if self.action == "skip":
            loss = self._of_all(loss)
            bad = bad | (loss > self._limit)
            optimizer = self.trainer.optimizer  # accelerate's, around the real one
            getattr(optimizer, "optimizer", optimizer).found_inf = bad.float()
            total.copy_(torch.where(bad, self._before, total))
        self._before = total.clone()
        self._steps.append(torch.stack([norm, loss, bad.float()]))

    def at_log(self, logs: dict[str, float]) -> None:
        """At a line of the log: look, and take steps that were skipped out of its mean loss."""
        self.look()
        steps = self.trainer.state.global_step - self.logged
        self.logged += steps
        if self.skipped:
            logs["skipped_steps"] = self.skipped
            logs["loss"] = logs["loss"] * steps / (steps - self.skipped) if steps > self.skipped else math.nan
        self.skipped = 0
        self.trainer._tr_loss.zero_()  # the Trainer takes it from itself, and NaN would stay
        self._before = self.trainer._tr_loss.clone()

    def look(self) -> None:
        """Bring the steps since the last look to the host; afterwards ``failure`` says whether the run is over."""
        if not self._steps or self.failure:
            return
        found = torch.stack(self._steps)
        if self.action == "stop":
            found[:, 1] = self._of_all(found[:, 1])
        rows, last = found.tolist(), self.trainer.state.global_step
        self._steps = []
        good = []
        for i, (norm, loss, bad) in enumerate(rows):
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if not bad and math.isfinite(loss):
                good.append(loss)
            elif self.action == "stop":
                what = f"gradients whose norm is {norm}" if bad else f"a loss of {loss}"
                return self._stop(f"step {last - len(rows) + 1 + i:,} has {what}, expected finite numbers")
            self.skipped += bool(bad)
        if self._in_a_row >= IN_A_ROW:
            return self._stop(f"the {self._in_a_row} steps up to {last:,} were skipped one after the other")
        now, limit = sum(good) / max(1, len(good)), self._threshold()
        if self.action == "stop" and now > limit:
            return self._stop(
                f"the loss is {now:.3f} at step {last:,}, which is more than {self.factor:g} standard deviations over "
                f"the mean of {sum(self.losses) / len(self.losses):.3f} of the {len(self.losses)} steps before"
            )
        self.losses.extend(good)
        if self._limit is not None:
            self._limit.fill_(self._threshold())
        return None

    def _threshold(self) -> float:
        """The loss from which on it jumps."""
        if self.factor is None or len(self.losses) < ENOUGH:
            return math.inf
        mean = sum(self.losses) / len(self.losses)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in self.losses) / len(self.losses))
        return mean + self.factor * max(deviation, LEAST * abs(mean))

    def _of_all(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, so that they decide alike."""
        accelerator = self.trainer.accelerator
        return accelerator.reduce(x, "mean") if accelerator.num_processes > 1 else x

    def _stop(self, why: str) -> None:
        self.failure = why
        control = self.trainer.control
        control.should_training_stop = True
        control.should_save = control.should_evaluate = False
