"""TRL's trainers with our balance loss, sealed checkpoints, exact held-out figures and a log that survives Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import UserError
from .align_arguments import peft_config
from .callbacks import BalanceLoss, PrintLog
from .checkpoints import checkpoint_name, seal
from .optimizer import decayed_parameters


def _labels_alone(device: torch.device) -> bool:
    """Whether TRL scores the labelled positions of a batch alone, in place of its own answer, which is no on a CPU.

    It scores all of them for devices that compile for every shape. Of a batch of short pairs a quarter is labelled, and
    on a CPU scores are half of a step's time.
    """
    return device.type in ("cpu", "cuda", "xpu")


class AlignTrainer:
    """What goes before ``SFTTrainer``, ``DPOTrainer`` and ``GRPOTrainer`` in the order of inheritance.

    A subclass has its loss in training, with the balance loss of experts in it (:meth:`training_loss`), and says what
    of a held-out example is summed (:meth:`examples`) into figures (:meth:`held_out_figures`): TRL averages batches,
    whatever they hold.
    """

    model: Any
    args: Any
    accelerator: Any
    state: Any
    _metrics: dict[str, Any]
    _total_train_tokens: int

    def __init__(self, model: Any, args: Any, **options: Any):
        from trl.trainer import utils

        if hasattr(utils, "_use_triton"):  # TRL's own name for the question; its kernels ask elsewhere
            utils._use_triton = _labels_alone
        config, coefficient = model.config, args.router_aux_loss_coef
        told = (config.router_aux_loss_coef, config.output_router_logits)
        args.router_aux_loss_coef = 0.0  # so that TRL adds no balance loss of another model; it writes it to the config
        args.use_cache = config.use_cache  # the Trainer writes that to the config too; TRL's forward uses none anyway
        try:
            super().__init__(model=model, args=args, peft_config=peft_config(args), **options)  # type: ignore[call-arg]
        except ValueError as error:
            if args.lora_r is not None and "target modules" in str(error).lower():
                raise UserError(
                    f"`lora_target_modules` is {args.lora_target_modules}, expected names of matrices of the model"
                ) from error
            raise
        finally:
            config.router_aux_loss_coef, config.output_router_logits = told
            args.router_aux_loss_coef = coefficient
        self.balance_loss = BalanceLoss()
        self.last_log = (0, 0.0)  # step and time; LossSinceLastLog sets them when training begins
        self.tokens_at_last_log = 0
        self._sums: torch.Tensor | None = None
        self._uncounted: torch.Tensor | None = None

    def training_loss(self, model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """The loss of a micro-batch; what the balance loss was is for ``self.balance_loss``."""
        raise NotImplementedError

    def examples(self, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """(B, n) terms of each held-out example of a batch, from what TRL's forward returned."""
        raise NotImplementedError

    def held_out_figures(self, sums: list[float]) -> dict[str, float]:
        """Figures of all held-out examples from the sums of :meth:`examples`."""
        raise NotImplementedError

    def watch_aux_loss(self, model: Any) -> None:
        """Before ``super().__init__``: keep the balance loss of experts, which TRL's forward does not pass on."""
        self._aux_loss: torch.Tensor | None = None
        if model.config.is_moe:
            model.base_model.register_forward_hook(self._keep_aux_loss)

    def _keep_aux_loss(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._aux_loss = output.aux_loss if module.training else None

    def with_balance_loss(self, loss: torch.Tensor, labels: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """A loss, and ``share`` of the balance loss of the forward pass before it, which is noted for the log."""
        aux_loss, self._aux_loss = self._aux_loss, None
        if aux_loss is None:
            return loss
        self.balance_loss.add(aux_loss, labels)
        return loss + share * self.model.config.router_aux_loss_coef * aux_loss

    def count_tokens(self, attention_mask: torch.Tensor) -> None:
        """Count a micro-batch's tokens, mask (B, T), on its device: reading them at once would wait for it."""
        tokens = attention_mask.sum()
        self._uncounted = tokens if self._uncounted is None else self._uncounted + tokens

    def counted_tokens(self) -> int:
        """Tokens trained on so far in all processes, which call this together."""
        if self._uncounted is not None:
            self._total_train_tokens += int(self.accelerator.gather(self._uncounted).sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            self._uncounted = None
        return self._total_train_tokens

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            kept = Kept(model)
            loss = super().compute_loss(kept, inputs)  # type: ignore[misc]
            # without the examples that make up the last batch where processes must have equal ones
            sums = self.accelerator.gather_for_metrics(self.examples(kept.output, inputs).double()).sum(dim=0)
            self._sums = sums if self._sums is None else self._sums + sums
            return loss
        return self.training_loss(model, inputs, num_items_in_batch)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._sums = None
        self.counted_tokens()  # TRL logs them with held-out figures too
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        assert self._sums is not None
        figures = self.held_out_figures(self._sums.tolist())
        output.metrics.update({f"eval_{name}": value for name, value in figures.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens/s, padding not counted, and the balance loss to TRL's entries."""
        if "loss" in logs:
            tokens = self.counted_tokens() - self.tokens_at_last_log
            logs["tokens_per_second"] = tokens / max(time.time() - self.last_log[1], 1e-9)
            balance_loss = self.balance_loss.take(self.accelerator.gather)
            if balance_loss is not None:
                logs["balance_loss"] = balance_loss
        super().log(logs, start_time)  # type: ignore[misc]
        self.tokens_at_last_log = self._total_train_tokens
        self.last_log = (self.state.global_step, time.time())  # so that evaluation is not counted as training time

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return decayed_parameters(model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.counted_tokens()  # here, where every process comes along: AlignState is asked in the first alone
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(Path(str(self.args.output_dir), checkpoint_name(self.state.global_step)))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's README would stand in every run's folder; ours comes from what was measured."""

    def _send_telemetry(self) -> None:
        """A run tells nobody that it runs."""


class Kept:
    """A model that keeps what it returned last, for figures that TRL does not make of it."""

    def __init__(self, model: Any):
        self.model, self.output = model, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.model(*args, **kwargs)
        return self.output


class AlignState(TrainerCallback, ExportableState):
    """Carries what TRL averages between two lines of the log through a checkpoint, and its count of tokens."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps; empty before there is a trainer."""
        if self.trainer is None:
            return {"args": {}, "attributes": {}}
        metrics = {name: list(values) for name, values in self.trainer._metrics["train"].items()}
        tokens = (self.trainer._total_train_tokens, self.trainer.tokens_at_last_log)
        return {"args": {}, "attributes": {"metrics": metrics, "tokens": tokens}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__, {})
        attributes = saved.get("attributes") if isinstance(saved, dict) else None
        if state.global_step and attributes:
            self.trainer._metrics["train"].update(attributes["metrics"])
            self.trainer._total_train_tokens, self.trainer.tokens_at_last_log = attributes["tokens"]


class PrintAlignLog(PrintLog):
    """One readable line a log entry, with the time left."""

    # what TRL logs → how it is shown
    SHOWN = {  # noqa: RUF012
        "mean_token_accuracy": "token accuracy {:.3f}",
        "reward": "reward {:.3f}",
        "reward_std": "±{:.3f}",
        "kl": "KL {:.4f}",
        "completions/mean_length": "{:.1f} tokens",
        "completions/ended": "{:.0%} end",
        "rewards/accuracies": "reward accuracy {:.3f}",
        "rewards/margins": "margin {:.3f}",
        "balance_loss": "balance {:.3f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tok/s",
    }

    def __init__(self, figures: dict[str, str]) -> None:
        super().__init__()
        self.figures = figures

    def held_out(self, logs: dict[str, float]) -> str:
        return ", ".join(f"{words} {logs[name]:.3f}" for name, words in self.figures.items())

    def parts(self, logs: dict[str, float]) -> list[str]:
        return [words.format(logs[name]) for name, words in self.SHOWN.items() if name in logs]
