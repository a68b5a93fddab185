"""What happens around the steps of a training run: Ctrl-C, a log that survives it, lines to read, completions."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..artifacts import duration, write_text
from ..ops.linear_cross_entropy import IGNORED


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the step in progress, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}
        self._accelerator: Any = None

    def watch(self, accelerator: Any) -> None:
        """With several processes, all stop at the same step even if only one was told."""
        self._accelerator = accelerator if accelerator.num_processes > 1 else None

    def _on_signal(self, number: int, frame: Any) -> None:
        self.interrupted = True
        print("\ninterrupted: saving after this step (again to stop at once)", flush=True)
        signal.signal(number, self._previous.get(number, signal.SIG_DFL))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._accelerator is not None:
            if self.interrupted:
                self._accelerator.set_trigger()
            self.interrupted = self._accelerator.check_trigger()
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


class BalanceLoss:
    """The balance loss of experts since the last line of the log, summed where it is computed: no step waits for it.

    Micro-batches and processes weigh in by their share of a step's labelled tokens, as they do in the training loss,
    so that loss − coefficient · mean is the cross-entropy exactly.
    """

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None  # Σ share · balance loss and Σ share, float32

    def add(
        self, balance_loss: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None = None
    ) -> None:
        """Take in one micro-batch.

        Args:
            balance_loss: a scalar; one a replica under DataParallel.
            labels: (B, T), of which the first of a row is nobody's target.
            num_items: labelled tokens of the whole step; without it every micro-batch weighs the same.
        """
        labelled = (labels[:, 1:] != IGNORED).sum()
        share = labelled / (labelled.clamp(min=1) if num_items is None else torch.as_tensor(num_items).max())
        sums = torch.stack([share * balance_loss.detach().float().mean(), share])
        self.sums = sums if self.sums is None else self.sums.to(sums.device) + sums

    def take(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
        """The mean over all processes since the last call, and begin anew; None of a model without experts."""
        if self.sums is None:
            return None
        total, shares = gather(self.sums).view(-1, 2).sum(dim=0).tolist()
        self.sums = None
        return total / shares if shares else float("nan")


class LossSinceLastLog(TrainerCallback, ExportableState):
    """Carries the running loss between two lines of the log, and that of experts, through a checkpoint.

    The Trainer averages the loss over the steps since its last log line and forgets the sum when it stops; without
    this the first line after resuming would average fewer steps than the uninterrupted run's.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.gathered: dict[str, Any] = {}

    def gather(self) -> None:
        """Before a checkpoint, in every process: the mean loss of all and the balance loss of all, which it keeps."""
        accelerator, balance = self.trainer.accelerator, self.trainer.balance_loss.sums
        self.gathered = {"tr_loss": accelerator.reduce(self.trainer._tr_loss.clone(), "mean").item()}
        if balance is not None:
            self.gathered["balance"] = accelerator.reduce(balance.clone(), "mean").tolist()

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps; empty before the Trainer has begun to sum."""
        if not hasattr(self.trainer, "_tr_loss"):
            return {"args": {}, "attributes": {}}
        sums = {"tr_loss": self.trainer._tr_loss.item(), "last_logged": self.trainer._globalstep_last_logged}
        balance = self.trainer.balance_loss.sums
        sums["balance"] = None if balance is None else balance.tolist()
        # their total over the processes, however many go on from here
        if self.gathered.get("balance"):
            processes = self.trainer.accelerator.num_processes
            sums["balance_of_all"] = [x * processes for x in self.gathered["balance"]]
        return {"args": {}, "attributes": sums | {k: v for k, v in self.gathered.items() if k == "tr_loss"}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.last_log = (state.global_step, time.time())
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__, {})
        attributes = saved.get("attributes") if isinstance(saved, dict) else None
        if state.global_step and attributes:
            self.trainer._tr_loss.fill_(attributes["tr_loss"])
            self.trainer._globalstep_last_logged = attributes["last_logged"]
            if attributes.get("balance_of_all"):
                processes = self.trainer.accelerator.num_processes
                self.trainer.balance_loss.sums = torch.tensor(attributes["balance_of_all"]) / processes
            elif attributes.get("balance"):
                self.trainer.balance_loss.sums = torch.tensor(attributes["balance"])


class PrintLog(TrainerCallback):
    """One readable line a log entry, with the time left. The first step compiles, and counts until there are more."""

    def __init__(self) -> None:
        self._begun = (0, 0.0)
        self._first_step = 0.0  # seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun, self._first_step = (state.global_step, time.perf_counter()), 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._first_step:
            now = time.perf_counter()
            self._first_step = now - self._begun[1]
            self._begun = (state.global_step, now)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            if state.global_step == self._begun[0]:  # the look before the first step is not time spent on steps
                self._begun = (state.global_step, time.perf_counter())
            print(f"  {self.held_out(logs)}", flush=True)
        elif "loss" in logs:
            begun, since = self._begun
            steps = state.global_step - begun
            per_step = (time.perf_counter() - since) / steps if steps else self._first_step
            parts = [f"step {state.global_step:>6}/{state.max_steps}", f"loss {logs['loss']:.3f}", *self.parts(logs)]
            parts.append(f"{duration(per_step * (state.max_steps - state.global_step))} left")
            print("  ".join(parts), flush=True)

    def held_out(self, logs: dict[str, float]) -> str:
        """What a look at held-out rows gave."""
        bpb = logs.get("eval_bits_per_byte", float("nan"))
        return f"validation: loss {logs['eval_loss']:.3f}, {bpb:.3f} bits per byte"

    def parts(self, logs: dict[str, float]) -> list[str]:
        """What stands between the loss and the time left."""
        return [
            f"{logs['bits_per_byte']:.3f} bits/byte",
            *([f"balance {logs['balance_loss']:.3f}"] if "balance_loss" in logs else []),
            *([f"gradient {logs['grad_norm']:.2f}"] if "grad_norm" in logs else []),
            *([f"{logs['skipped_steps']} skipped"] if "skipped_steps" in logs else []),
            f"lr {logs['learning_rate']:.2e}",
            f"{logs['tokens_per_second']:,.0f} tok/s",
            *([f"{logs['mfu']:.1%} MFU"] if "mfu" in logs else []),
        ]


class CompletePrompts(TrainerCallback):
    """Completes the same prompts at a few points of training and keeps them in ``samples.jsonl``."""

    def __init__(self, tokenizer: Any, prompts: list[str], shares: list[float], max_new_tokens: int, path: Path):
        self.tokenizer, self.prompts, self.shares = tokenizer, prompts, shares
        self.max_new_tokens, self.path = max_new_tokens, path
        self.together = False  # whether all processes must generate, each holding a part of the weights

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        due = {max(1, round(share * state.max_steps)) for share in self.shares}
        first = state.is_world_process_zero
        if not self.prompts or not (first or self.together) or state.global_step not in due:
            return
        kept = []
        if self.path.exists():  # a resumed run says again what it had said after its checkpoint
            kept = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            kept = [row for row in kept if row["step"] < state.global_step]
        model.eval()
        # Sampling takes random numbers that training must not miss.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.inference_mode():
            for prompt in self.prompts:
                torch.manual_seed(args.seed)
                inputs = self.tokenizer(prompt, return_tensors="pt").to(model.device)
                ids = model.generate(
                    **inputs, max_new_tokens=self.max_new_tokens, do_sample=True, temperature=0.7, top_p=0.9
                )
                text = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                kept.append({"step": state.global_step, "prompt": prompt, "completion": text})
        model.train()
        if not first:
            return
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
