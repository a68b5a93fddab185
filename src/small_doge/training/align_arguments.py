"""The fields that the recipes of `sft` and `dpo` share, beside those of TRL's SFTConfig and DPOConfig."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import artifacts
from ..recipe import described
from .arguments import WATCHING, copy_without_waiting

# ruff: noqa: RUF009 - described makes dataclass fields

NEEDS_TRL = 'this stage needs TRL 1.16, which runs on Python 3.11 or newer: `pip install "small-doge[align]"`'

# Fields of TRL that say how data are read or where the model is, beside those of a pretraining run.
ALSO_WATCHING = {"model", "dataset_num_proc", "precompute_ref_batch_size"}


@dataclass
class AlignArguments:
    """Our fields, and those of TRL and transformers that have another default here. Goes before a TRL config.

    Raises:
        ValueError: for a missing ``model``, ``data`` or ``output_dir``, or values out of range.
    """

    model: str | None = described("model folder to start from, with its tokenizer")
    data: Any = described("what to learn from: a path, a Hub data set as a mapping, or a list of these with weights")
    eval_data: Any = described("held-out data; null holds out a part of `data`")
    validation_fraction: float = described("share of `data` held out where there is no `eval_data`", 0.01)
    eval_rows: int = described("held-out examples looked at, spread evenly", 512)
    output_dir: str | None = described("folder for checkpoints and the finished model")
    tokens_per_step: int | None = described(
        "tokens an optimiser step sees over all devices, an example counting as `max_length`; sets accumulation"
    )
    min_lr_ratio: float = described("learning rate at the end, as a share of the peak", 0.1)
    lora_r: int | None = described("rank of LoRA adapters, merged into the weights at the end; null trains all weights")
    lora_alpha: float = described("LoRA's α: adapters count α / r", 16)
    lora_dropout: float = described("dropout before LoRA's adapters", 0.0)
    lora_target_modules: list[str] = described(
        "names of the matrices that get adapters",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )

    num_train_epochs: float = described("times every example is seen", 2.0)
    # The one of transformers' two that warms up from peak / warmup steps: no step is spent at a rate of 0, and none
    # before the peak at more than its share. warmup_stable_decay would begin at min_lr_ratio · peak.
    lr_scheduler_type: str = described("warmup and cosine", "cosine_warmup_with_min_lr")
    warmup_steps: float = described("steps of linear warmup; below 1, that share of all steps", 0.1)
    weight_decay: float = described("on matrices and embeddings only", 0.01)
    seed: int = described("seed of the order of examples and of dropout", 233)
    bf16: bool | None = described("mixed precision in bfloat16; null where a GPU has it", None)
    gradient_checkpointing: bool = described("compute activations twice to save memory", False)
    eval_strategy: str = described("when to look at held-out examples: no, steps or epoch", "steps")
    eval_steps: float | None = described("steps between looks; below 1, that share of all steps", 0.1)
    logging_steps: float = described("steps between lines of the training log", 10)
    logging_nan_inf_filter: bool = described("hide NaN losses from the log, at the price of a sync every step", False)
    save_steps: float = described("steps between checkpoints", 500)
    save_total_limit: int | None = described("checkpoints kept", 2)
    ddp_find_unused_parameters: bool | None = described(
        "no parameter is ever without a gradient, experts included", False
    )
    disable_tqdm: bool | None = described("the log prints the time left itself", True)
    prediction_loss_only: bool = described("held-out figures need no logits", True)

    def __post_init__(self) -> None:
        for name in ("model", "data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is not set, expected {'data' if name == 'data' else 'a folder'}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` is {self.validation_fraction}, expected 0 to less than 1")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"`min_lr_ratio` is {self.min_lr_ratio}, expected 0 to 1")
        if self.eval_rows < 1:
            raise ValueError(f"`eval_rows` is {self.eval_rows}, expected at least 1")
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"`lora_r` is {self.lora_r}, expected at least 1, or null for all weights")
        mine: Any = self
        if mine.max_length is None or mine.max_length < 2:
            raise ValueError(f"`max_length` is {mine.max_length}, expected at least 2")
        if mine.router_aux_loss_coef is not None and mine.router_aux_loss_coef < 0:
            raise ValueError(f"`router_aux_loss_coef` is {mine.router_aux_loss_coef}, expected 0 or more")
        if mine.max_steps < 1 and mine.num_train_epochs <= 0:
            raise ValueError("neither `max_steps` nor `num_train_epochs` says how long to train")
        if self.bf16 is None:
            usable = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 = usable and not (mine.use_cpu or mine.fp16)
        if self.lr_scheduler_type in ("cosine_warmup_with_min_lr", "cosine_with_min_lr"):
            mine.lr_scheduler_kwargs = {"min_lr_rate": self.min_lr_ratio, **(mine.lr_scheduler_kwargs or {})}
        with warnings.catch_warnings():  # its parents give the field another name, and warn of any value under this one
            warnings.filterwarnings("ignore", r".gradient_checkpointing. is deprecated", FutureWarning)
            super().__post_init__()  # type: ignore[misc]  # of the TRL config that comes after
        copy_without_waiting(self)


def settings_of(args: Any) -> dict[str, Any]:
    """What a run computes, as plain values: fields that differ from their defaults, the data and the model's weights.

    The model is named by a hash of its weights: a folder that moved is the same, one that was trained again is not.
    """
    # Making arguments sets up devices for the whole process, so these are made for the same ones.
    same = {"use_cpu": args.use_cpu, "ddp_backend": args.ddp_backend}
    default = type(args)(model="-", data="-", output_dir="-", **same).to_dict()
    watching = (WATCHING | ALSO_WATCHING) - {"data"}
    mine = {k: v for k, v in args.to_dict().items() if k not in watching and v != default[k]}
    weights = sorted(Path(args.model).glob("*.safetensors"))
    return {**mine, "bf16": args.bf16, "model_sha256": artifacts.sha256(*weights) if weights else args.model}


def peft_config(args: Any) -> Any:
    """A LoRA configuration of peft, or None for a recipe that trains all weights."""
    if args.lora_r is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        from ..errors import UserError

        raise UserError('LoRA needs peft, install it with `pip install "small-doge[lora]"`') from None
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_target_modules),
        task_type="CAUSAL_LM",
    )
