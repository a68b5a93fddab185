"""The fields of a pretraining recipe: ours, and every field of transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..data.packing import PackedTokens
from ..recipe import described

# ruff: noqa: RUF009 - described makes dataclass fields

# Fields that say how a run is watched or where it is, not what it computes; they may change when it is resumed.
WATCHING = {
    *("output_dir", "report_to", "run_name", "project", "disable_tqdm", "logging_dir", "log_level", "save_steps"),
    *("save_total_limit", "save_strategy", "dataloader_num_workers", "sample_prompts", "sample_at", "sample_tokens"),
    *("use_cpu", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("data", "tokenizer", "local_rank", "resume_from_checkpoint"),
    "max_minutes",  # becomes steps once, when the run begins
    *("on_bad_step", "spike_factor"),  # a run that stopped at a bad step may go on with another answer to it
}
# How a step's rows are shared out, which may change when a run is resumed on other devices; their number may not.
SHARING = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_step", "auto_find_batch_size"),
    "parallelism_config",
    *("fsdp", "fsdp_config", "deepspeed", "ddp_backend", "ddp_bucket_cap_mb", "ddp_find_unused_parameters"),
}


@dataclass
class PretrainArguments(TrainingArguments):
    """A pretraining recipe. Defaults are the published recipe's where it has one; the rest is transformers'.

    Raises:
        ValueError: for a missing ``data`` or ``tokenizer``, or values out of range.
    """

    model: str = described(
        "size to start afresh (tiny, 20m, 60m, 160m, 320m; with experts 40m-moe, 180m-moe, 600m-moe, 1.6b-moe), or a "
        "model folder to start from",
        "20m",
    )
    data: str | None = described("folder that `doge prepare` wrote")
    tokenizer: str | None = described("folder that `doge tokenizer` wrote; the tokenizer the data was made with")
    output_dir: str | None = described("folder for checkpoints and the finished model")
    continue_from: str | None = described(
        "checkpoint-N folder of another run, from its stable stage, or a model folder: go on from there, on the same "
        "data or other, at the recipe's stable rate"
    )
    decay: bool = described("with continue_from: nothing but the decay, over all steps", False)
    rewarmup_steps: float = described(
        "steps of linear warmup where continue_from holds no optimiser; below 1, that share of all steps", 50
    )
    keep_window_size: int | None = described("keys a query keeps (w); null takes the model's own")
    local_window: int | None = described(
        "the last keys, which a query keeps whatever their score; null takes the model's own, 0 as published. Worth "
        "setting where rows are longer than keep_window_size"
    )
    score_lifetime: float | None = described(
        "tokens of age that a score higher by 1 makes up for in the window; null takes the model's own, for ever as "
        "published. Worth setting where rows are longer than keep_window_size"
    )
    router_aux_loss_coef: float | None = described(
        "what the balance loss of experts counts in the training loss; null takes the model's own"
    )
    tokens_per_step: int | None = described(
        "tokens an optimiser step sees over all devices; sets gradient accumulation"
    )
    max_minutes: float | None = described("train for so long: a few steps are timed and max_steps follows")
    decay_steps: float = described("steps of the final decay; below 1, that share of all steps", 0.2)
    decay_type: str = described("shape of the decay: linear, cosine or 1-sqrt", "1-sqrt")
    min_lr_ratio: float = described("learning rate before warmup and after decay, as a share of the peak", 0.0)
    on_bad_step: str = described(
        "gradients that are not finite, or a loss that jumps: stop (an older checkpoint is kept), skip (weights and "
        "moments stay as they were) or ignore",
        "stop",
    )
    spike_factor: float | None = described(
        "a loss jumps by so many standard deviations of the last steps over their mean; null looks for none", 6.0
    )
    auto_find_batch_size: bool = described(
        "take the largest micro-batch that divides tokens_per_step, is worth it and fits into the GPU's free memory "
        "(by the estimate printed at the start), in place of per_device_train_batch_size",
        False,
    )
    eval_rows: int = described("validation rows looked at during training, spread evenly over the split", 256)
    sample_prompts: list[str] = described("prompts completed during training, for the report", [])
    sample_at: list[float] = described("when to complete them, as shares of all steps", [0.02, 0.25, 1.0])
    sample_tokens: int = described("tokens of each completion", 48)

    learning_rate: float = described("peak learning rate (published: 8e-3 at 20M to 2e-3 at 320M)", 8e-3)
    lr_scheduler_type: str = described("warmup, stable, decay", "warmup_stable_decay")
    muon_learning_rate: float | None = described(
        "peak learning rate of Muon for the matrices in the layers; null trains everything with AdamW"
    )
    warmup_steps: float = described("steps of linear warmup; below 1, that share of all steps", 0.1)
    weight_decay: float = described("on matrices and embeddings only", 0.01)
    adam_beta2: float = described("AdamW's β₂", 0.95)
    seed: int = described("seed of the weights, the order of rows and dropout", 233)
    logging_steps: float = described("steps between lines of the training log", 10)
    logging_nan_inf_filter: bool = described("hide NaN losses from the log, at the price of a sync every step", False)
    save_steps: float = described("steps between checkpoints", 500)
    save_total_limit: int | None = described("checkpoints kept", 2)
    ddp_find_unused_parameters: bool | None = described(
        "no parameter is ever without a gradient, experts included", False
    )
    disable_tqdm: bool | None = described("the log prints the time left itself", True)
    remove_unused_columns: bool = described("rows hold just what the model takes", False)
    prediction_loss_only: bool = described("validation needs no logits", True)

    def __post_init__(self) -> None:
        for name in ("data", "tokenizer", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is not set, expected a folder")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"`max_minutes` is {self.max_minutes}, expected more than 0")
        if self.keep_window_size is not None and self.keep_window_size < 1:
            raise ValueError(f"`keep_window_size` is {self.keep_window_size}, expected at least 1")
        if self.local_window is not None and self.local_window < 0:
            raise ValueError(f"`local_window` is {self.local_window}, expected 0 or more")
        if self.score_lifetime is not None and not 1 <= self.score_lifetime <= 1e9:
            raise ValueError(f"`score_lifetime` is {self.score_lifetime}, expected 1 to 1e9 tokens")
        if self.router_aux_loss_coef is not None and self.router_aux_loss_coef < 0:
            raise ValueError(f"`router_aux_loss_coef` is {self.router_aux_loss_coef}, expected 0 or more")
        if self.auto_find_batch_size and not self.tokens_per_step:
            raise ValueError("`auto_find_batch_size` is set without `tokens_per_step`, expected the tokens of a step")
        if self.decay and not self.continue_from:
            raise ValueError("`decay` is set without `continue_from`, expected the checkpoint to decay")
        if self.rewarmup_steps < 0:
            raise ValueError(f"`rewarmup_steps` is {self.rewarmup_steps}, expected 0 or more")
        if self.on_bad_step not in ("stop", "skip", "ignore"):
            raise ValueError(f"`on_bad_step` is {self.on_bad_step!r}, expected stop, skip or ignore")
        if self.spike_factor is not None and self.spike_factor <= 0:
            raise ValueError(f"`spike_factor` is {self.spike_factor}, expected more than 0, or null")
        if self.decay_type not in ("linear", "cosine", "1-sqrt"):
            raise ValueError(f"`decay_type` is {self.decay_type!r}, expected linear, cosine or 1-sqrt")
        if self.max_steps < 1 and self.max_minutes is None and self.num_train_epochs <= 0:
            raise ValueError("none of `max_steps`, `max_minutes` and `num_train_epochs` says how long to train")
        super().__post_init__()
        copy_without_waiting(self)

    def accumulate(self, row_length: int) -> None:
        """Set gradient accumulation from ``tokens_per_step``.

        Raises:
            ValueError: if that is not a whole number of micro-batches over all devices.
        """
        if self.tokens_per_step is None:
            return
        micro_batch = row_length * self.train_batch_size * self.world_size
        if self.tokens_per_step % micro_batch:
            raise ValueError(
                f"`tokens_per_step` is {self.tokens_per_step:,}, expected a multiple of the {micro_batch:,} tokens "
                f"that {self.world_size} device(s) see at once"
            )
        self.gradient_accumulation_steps = self.tokens_per_step // micro_batch

    def settings(self, data: PackedTokens) -> dict[str, Any]:
        """What this run computes, as plain values: fields that differ from their defaults, and the data."""
        # Made for the same device: these arguments, too, set up the processes that the run is on.
        default = PretrainArguments(output_dir="-", data="-", tokenizer="-", use_cpu=self.use_cpu).to_dict()
        mine = {k: v for k, v in self.to_dict().items() if k not in WATCHING | SHARING and v != default[k]}
        hashes = {name: split["sha256"] for name, split in data.manifest["splits"].items()}
        return {**mine, "model": self.model, "rows_per_step": self.rows_per_step, "data_sha256": hashes}

    @property
    def rows_per_step(self) -> int:
        """Rows that an optimiser step sees over all devices."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


def copy_without_waiting(args: Any) -> None:
    """Otherwise every batch waits on the host until the GPU has done all it was asked to."""
    args.accelerator_config.non_blocking = args.dataloader_pin_memory and args.device.type == "cuda"
