"""Taking up another run's checkpoint: on the same data or new, at the recipe's stable rate, or decaying at once.

What a checkpoint carries goes on: weights, the optimiser's moments, random state, and on the same data the place in it,
so that continuing with the recipe it came from gives the very steps that the run itself would have taken. Schedule and
rates are the recipe's. A plain model folder has no moments; fresh ones make the first steps of AdamW as large as they
can be, whence a short warmup.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import artifacts
from ..errors import UserError
from ..models import SIZES, DogeForCausalLM, config_for, load_model
from .checkpoints import MARKER, checkpoint_name, require_whole
from .devices import WEIGHTS_SHARDED, read_shards, sharding
from .optimizer import optimizer_name

_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_EXPERTS = ("num_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Start:
    """Where a run takes up another one."""

    folder: str
    step: int | None = None  # None of a folder that does not say
    optimizer: bool = False  # whether the moments go on
    rows_seen: int = 0  # of this run's data, in its order
    why_fresh: str = "it has none"  # for a person, where they do not

    def words(self) -> str:
        """One line for a person."""
        at = "" if self.step is None else f" at step {self.step:,}"
        moments = "with its optimiser" if self.optimizer else f"with a fresh optimiser ({self.why_fresh})"
        rows = f", after its {self.rows_seen:,} rows of this data" if self.rows_seen else ""
        return f"continuing {self.folder}{at} {moments}{rows}"


def find(args: Any, data: Any) -> Start:
    """Look at ``args.continue_from`` and say what goes on from there.

    Raises:
        UserError: if it is no checkpoint and no model, was cut short, has left or not yet reached its stable stage, was
            fine-tuned, or is of another architecture or vocabulary than recipe and data ask for.
    """
    folder = Path(args.continue_from)
    record: dict[str, Any] = {}
    if (folder / MARKER).is_file():
        require_whole(folder, "choose another checkpoint")
        record = artifacts.read_json(folder / MARKER)
    elif (folder / "trainer_state.json").is_file() and not (folder / artifacts.STAGE_FILE).is_file():
        raise UserError(
            f"checkpoint {folder} has no {MARKER}: its run was stopped while it was written; choose another"
        )
    elif (folder / artifacts.STAGE_FILE).is_file():
        record = artifacts.read_json(folder / artifacts.STAGE_FILE)
        if record.get("stage") != "pretrain":
            raise UserError(f"{folder} holds a {record.get('stage')} run, expected a pretrained model or a checkpoint")
    elif found := sorted(p.name for p in folder.glob(f"{checkpoint_name(0)[:-1]}*")):
        raise UserError(f"{folder} is the folder of a run, expected one of its checkpoints: {', '.join(found)}")
    _require_stable(folder, record)
    _require_fit(args, folder, data)

    seen = record.get("data", {})
    same = seen.get("sha256") == data.manifest["splits"]["train"]["sha256"] and seen.get("seed") == order_seed(args)
    carried, why = _optimizer_fits(args, folder, record)
    rows_seen = seen.get("rows_seen", 0) if same else 0
    return Start(str(folder), record.get("step"), carried, rows_seen, why)


def open_model(args: Any, start: Start, checkpoint: Path | None = None) -> DogeForCausalLM:
    """The model to go on with, from weights in one file or sharded; or in the run's own ``checkpoint``."""
    folder = Path(checkpoint or start.folder)
    if (folder / WEIGHTS_SHARDED).is_dir():
        model: Any = DogeForCausalLM(AutoConfig.from_pretrained(folder))
        read_shards(model, folder / WEIGHTS_SHARDED)
    else:
        model = load_model(folder.as_posix())
    return set_windows(model, args)


def windows(args: Any) -> dict[str, float]:
    """The fields of a model's window that a recipe sets."""
    asked = {name: getattr(args, name) for name in ("keep_window_size", "local_window", "score_lifetime")}
    return {name: value for name, value in asked.items() if value is not None}


def set_windows(model: DogeForCausalLM, args: Any) -> DogeForCausalLM:
    """The model with the windows of the recipe; no weight depends on them."""
    for name, value in windows(args).items():
        setattr(model.config, name, value)
    return model


def order_seed(args: Any) -> int:
    """What the order of rows follows from."""
    return int(args.seed if args.data_seed is None else args.data_seed)


def checkpoint_facts(args: Any, run: Any, step: int, data: Any) -> dict[str, Any]:
    """What a checkpoint says of itself beside its files, for :func:`find`.

    Args:
        run: has the ``settings``, ``schedule`` and ``start`` of the run.
    """
    start: Start | None = run.start
    return {
        "step": step,
        "schedule": run.schedule.facts(step),
        "data": {
            "sha256": data.manifest["splits"]["train"]["sha256"],
            "rows_seen": (start.rows_seen if start else 0) + step * args.rows_per_step,
            "seed": order_seed(args),
        },
        "optimizer": optimizer_name(args),
        "sharding": sharding(args),
        "processes": args.world_size,
        "recipe": run.settings,
    }


class Continuing:
    """What goes before ``Trainer`` in the order of inheritance: the optimiser of ``self.start`` goes on."""

    start: Start | None = None
    optimizer: Any
    lr_scheduler: Any

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[misc]
        if self.start is not None and self.start.optimizer and resume_from_checkpoint is None:
            # moments from the checkpoint; rates, decay and schedule from the recipe
            options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            schedule = self.lr_scheduler.state_dict()
            self._load_optimizer_and_scheduler(self.start.folder)  # type: ignore[attr-defined]
            for group, mine in zip(self.optimizer.param_groups, options, strict=True):
                group.update(mine)
            self.lr_scheduler.load_state_dict(schedule)
        return prepared


class CarryRandomState(TrainerCallback):
    """The random state of the checkpoint, from the first step on, as resuming does it: data came before."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        start = self.trainer.start
        if state.global_step == 0 and start is not None and os.path.isdir(start.folder):
            self.trainer._load_rng_state(start.folder)


def _require_stable(folder: Path, record: dict[str, Any]) -> None:
    schedule = record.get("schedule")
    if schedule is None or schedule["stage"] == "stable":
        return
    step, first, last = schedule["step"], schedule["stable_from"], schedule["stable_to"]
    how = f"past its stable stage (it decays after step {last:,})" if step > last else "still warming up"
    raise UserError(
        f"checkpoint {folder} is at step {step:,}, {how}, expected one of its run from steps {first:,} to {last:,}; "
        f"`--model {folder}` starts anew from its weights, with a warmup"
    )


def _require_fit(args: Any, folder: Path, data: Any) -> None:
    """That what recipe and data ask for is what the folder, or a model of that name on the Hub, holds."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, expected a checkpoint-N folder or a model folder")
    if not folder.is_dir() and (folder.is_absolute() or len(folder.parts) != 2):
        raise UserError(f"checkpoint {folder} does not exist, expected a checkpoint-N folder or a model folder")
    try:
        there: Any = AutoConfig.from_pretrained(folder.as_posix())
    except OSError:
        raise UserError(f"checkpoint {folder} is neither a folder here nor a model on the Hub") from None
    if there.model_type != "doge":
        raise UserError(f"checkpoint {folder} is of type {there.model_type!r}, expected 'doge'")
    vocab_size = data.manifest["vocab_size"]
    if there.vocab_size != vocab_size:
        raise UserError(
            f"checkpoint {folder} has a vocabulary of {there.vocab_size:,} and the data {args.data} one of "
            f"{vocab_size:,}; expected the same tokenizer for both"
        )
    named = args.model.lower() in SIZES
    asked: Any = config_for(args.model) if named else AutoConfig.from_pretrained(args.model)
    for name in (*_SHAPE, "is_moe", *(_EXPERTS if there.is_moe and asked.is_moe else ())):
        found, expected = getattr(there, name), getattr(asked, name)
        if found != expected:
            raise UserError(
                f"checkpoint {folder} has {name} {found}, expected {expected} as in `model: {args.model}`; name the "
                f"recipe of its size"
            )


def _optimizer_fits(args: Any, folder: Path, record: dict[str, Any]) -> tuple[bool, str]:
    """Whether moments are there that this run can read; and if not, why."""
    files = {"whole": "optimizer.pt", "fsdp full": "optimizer.bin", "fsdp sharded": "optimizer_0"}
    kind = sharding(args)
    there = [name for name in files.values() if (folder / name).exists()]
    if not there:
        return False, "it has none"
    if files.get(kind) not in there:
        return False, f"its own is {record.get('sharding')}, this run is {kind}"
    if record.get("optimizer") != optimizer_name(args):
        return False, f"its own is {record.get('optimizer')}, the recipe says {optimizer_name(args)}"
    return True, ""
