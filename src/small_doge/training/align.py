"""What `sft`, `dpo` and `grpo` share: the run around TRL's trainers, and what those need from us.

TRL takes any model whose config has ``output_router_logits`` and a ``router_aux_loss_coef`` other than 0 for a mixture
like Mixtral, asks it for router logits and computes Mixtral's balance loss from them. A dense Doge has both fields and
no such logits; one with experts routes over two axes and has a balance loss of its own. :class:`AlignTrainer` shows
TRL a coefficient of 0, gives the config its value back, and adds our balance loss.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from .. import artifacts
from ..data.corpora import Document, split_of
from ..data.rendering import require_chat
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..models import load_model
from .align_arguments import settings_of
from .align_trainer import AlignState, PrintAlignLog
from .callbacks import LossSinceLastLog, SaveOnInterrupt
from .checkpoints import checkpoint_name, newest
from .pretrain import RUN_FILE

ENCODED = "encoded"  # what training reads, kept in the run's folder until it is finished


@dataclass(frozen=True)
class Stage:
    """What tells one stage from the other."""

    name: str
    # (recipe, tokenizer) → training rows, held-out rows, facts for the record, and "words" for a person; the fact
    # "steps" is how many there are, where rows do not say
    encode: Callable[[Any, Any], tuple[Any, Any, dict[str, Any]]]
    # (model, recipe, **options of a Trainer) → the trainer
    trainer: Callable[..., Any]
    # held-out figures to show and to keep: name in the log → words
    figures: dict[str, str]


def align(args: Any, stage: Stage) -> Path:
    """Train the model of ``args.model`` on the data of a stage; returns the folder it is in.

    Called again with the same recipe it continues from the newest checkpoint, or returns at once when it is done.

    Raises:
        UserError: if the model, its chat template or the data are missing or unfit, the output folder holds another
            run, a checkpoint is cut short, or the disk is too small.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    output_dir, started = Path(args.output_dir), time.perf_counter()
    # TRL asks for checkpointing of activations by the name that transformers gives up.
    warnings.filterwarnings("ignore", r".*gradient_checkpointing. is deprecated", FutureWarning)
    set_seed(args.seed)
    model, tokenizer = open_model(args)
    settings = settings_of(args)
    run = _begun(output_dir, stage.name, settings)
    if run is None:
        print(f"{output_dir} holds this run already, finished")
        return output_dir
    _accumulate(args)
    checkpoint = newest(output_dir)
    parameters = sum(p.numel() for p in model.parameters())
    artifacts.require_space(output_dir, 16 * parameters * ((args.save_total_limit or 1) + 1), "this run")
    PartialState().wait_for_everyone()  # none writes into the folder before every process has looked at it

    train, held_out, facts = _encoded(args, stage, tokenizer, run)
    max_steps = args.max_steps = facts.get("steps") or _max_steps(args, len(train))
    if args.report_to in ("none", [], None) and importlib.util.find_spec("tensorboard"):
        args.report_to = ["tensorboard"]
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type == "cuda"
    disable_progress_bar()

    interrupt, losses, state = SaveOnInterrupt(), LossSinceLastLog(), AlignState()
    trainer = stage.trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[interrupt, losses, state, PrintAlignLog(stage.figures)],
    )
    trainer.remove_callback(PrinterCallback)
    losses.trainer = state.trainer = trainer
    interrupt.watch(trainer.accelerator)
    if args.lora_r is not None and trainer.is_fsdp_enabled:
        raise UserError("`lora_r` is set under FSDP, expected one device or DDP: adapters are merged at the end")
    facts |= _announce(args, trainer, facts, facts.pop("words"), max_steps, checkpoint)

    # Not `trainer.evaluate()` before `trainer.train()`: that prepares the model as one that is only looked at, and
    # processes would then train apart, each on its own gradients.
    args.eval_on_start = not checkpoint
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.interrupted and trainer.state.global_step < max_steps:
        run["seconds"] += time.perf_counter() - started
        _write_run(args, output_dir, run)
        if args.process_index == 0:
            print(f"saved {checkpoint_name(trainer.state.global_step)} in {output_dir}; the same command continues")
        raise KeyboardInterrupt
    looked_at = [row for row in trainer.state.log_history if "eval_loss" in row]
    at_the_end = looked_at[-1]["step"] == max_steps
    before, after = (
        _figures(row, stage) for row in (looked_at[0], looked_at[-1] if at_the_end else trainer.evaluate())
    )
    _save(trainer, tokenizer, output_dir)
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        seconds = run["seconds"] + time.perf_counter() - started
        artifacts.finish(output_dir, stage.name, settings, seconds, **facts, before=before, after=after)
        shutil.rmtree(output_dir / ENCODED, ignore_errors=True)
        for name, words in stage.figures.items():
            print(f"{words}: {before[name]:.3f} before, {after[name]:.3f} after")
        print(f"wrote {output_dir} in {artifacts.duration(seconds)}")
    return output_dir


def open_model(args: Any) -> tuple[Any, Any]:
    """The model to train and its tokenizer, whose chat template and vocabulary fit.

    Raises:
        UserError: if either is missing or they do not fit together, or ``require_chat`` refuses the chat template.
    """
    model: Any = load_model(args.model)
    tokenizer: Any = load_tokenizer(args.model)
    require_chat(tokenizer, prompts=True)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {args.model} has {len(tokenizer):,} entries and its model {model.config.vocab_size:,}"
        )
    if args.router_aux_loss_coef is not None:
        if not model.config.is_moe:
            raise UserError(f"router_aux_loss_coef is {args.router_aux_loss_coef}, and {args.model} has no experts")
        model.config.router_aux_loss_coef = args.router_aux_loss_coef
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {args.model} has no pad token, expected one that `doge tokenizer` wrote")
    return model, tokenizer


def two_sides(args: Any, read: Callable[..., Any], text: Callable[[dict[str, Any]], str]) -> tuple[Any, Any, dict]:
    """Training and held-out examples of a recipe, and how many were dropped or cut, by reason.

    Where the recipe names no ``eval_data`` the held-out ones are told apart by a hash of a ``text`` of each: examples
    of the same text are on the same side, whatever their order and whatever stands around them.

    Args:
        read: ``read_conversations`` or ``read_preferences``.
        text: what an example is known by, such as the question it asks.
    """
    dataset, dropped = read(args.data, "train")
    if args.eval_data is not None:
        held_out, _ = read(args.eval_data, "test")
    else:
        sides: dict[str, list[int]] = {"train": [], "validation": []}
        for i, row in enumerate(dataset):
            sides[split_of(Document(str(i), text(row), ""), args.validation_fraction)].append(i)
        for side, there in sides.items():
            if not there:
                raise UserError(
                    f"of {len(dataset):,} examples none is left for the {side} side at validation_fraction "
                    f"{args.validation_fraction}, expected some: change that, or name `eval_data`"
                )
        dataset, held_out = dataset.select(sides["train"]), dataset.select(sides["validation"])
    rows = min(args.eval_rows, len(held_out))
    return dataset, held_out.select([i * len(held_out) // rows for i in range(rows)]), dropped


def _begun(output_dir: Path, stage: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of the run in a folder: the seconds spent so far; None if it is finished."""
    if (output_dir / artifacts.STAGE_FILE).exists() or not (output_dir / RUN_FILE).exists():
        finished = artifacts.is_finished(output_dir, stage, settings)
        return None if finished else {"stage": stage, "settings": settings, "seconds": 0.0}
    there = artifacts.read_json(output_dir / RUN_FILE)
    if there.get("stage") != stage:
        raise UserError(f"output folder {output_dir} holds another stage's run, expected an empty folder or {stage}")
    artifacts.require_same_settings(output_dir, there["settings"], settings)
    return there


def _write_run(args: Any, output_dir: Path, run: dict[str, Any]) -> None:
    if args.process_index == 0:
        artifacts.write_json(output_dir / RUN_FILE, run)


def _encoded(args: Any, stage: Stage, tokenizer: Any, run: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Training rows, held-out rows and facts, from the run's folder or, the first time, from the data itself.

    A resumed run so reads the very rows it began with, and TRL keeps the reference's log-probabilities beside them.
    """
    from datasets import disable_progress_bars, enable_progress_bars, load_from_disk

    output_dir = Path(args.output_dir)
    folder = output_dir / ENCODED
    with args.main_process_first(local=False, desc="encoding"):
        if not folder.exists():
            train, held_out, facts = stage.encode(args, tokenizer)
            output_dir.mkdir(parents=True, exist_ok=True)
            _write_run(args, output_dir, run)
            disable_progress_bars()
            with artifacts.staged(folder) as partial:
                train.save_to_disk(str(partial / "train"))
                held_out.save_to_disk(str(partial / "held_out"))
                artifacts.write_json(partial / "facts.json", facts)
            enable_progress_bars()
    sides = [load_from_disk(str(folder / side)) for side in ("train", "held_out")]
    return sides[0], sides[1], artifacts.read_json(folder / "facts.json")


def _accumulate(args: Any) -> None:
    """Set gradient accumulation from ``tokens_per_step``, an example counting as ``max_length`` tokens."""
    if args.tokens_per_step is None:
        return
    micro_batch = args.max_length * args.train_batch_size * args.world_size
    if args.tokens_per_step % micro_batch:
        raise UserError(
            f"`tokens_per_step` is {args.tokens_per_step:,}, expected a multiple of the {micro_batch:,} tokens that "
            f"{args.world_size} device(s) see at once"
        )
    args.gradient_accumulation_steps = args.tokens_per_step // micro_batch


def _max_steps(args: Any, rows: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = math.ceil(rows / (args.train_batch_size * args.world_size * args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def _announce(
    args: Any, trainer: Any, facts: dict[str, Any], data: str, max_steps: int, checkpoint: Path | None
) -> dict[str, Any]:
    """Print, before the first step, what is about to happen; returns it for the record."""
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    parameters, trained = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.process_index == 0:
        some = "" if trained == parameters else f" ({trained:,} of them trained)"
        print(f"{parameters:,} parameters{some} on {args.device}, {data}", flush=True)
        if facts["dropped"]:
            print("; ".join(f"{reason} {count:,}" for reason, count in facts["dropped"].items()), flush=True)
        print(f"{max_steps:,} steps of {rows:,} rows of up to {args.max_length:,} tokens", flush=True)
        if checkpoint:
            print(f"continuing from {checkpoint}", flush=True)
    return {
        "parameters": parameters,
        "trained_parameters": trained,
        "steps": max_steps,
        "rows_per_step": rows,
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
        "threads": torch.get_num_threads(),
    }


def _figures(metrics: dict[str, float], stage: Stage) -> dict[str, float]:
    return {name: metrics[name] for name in stage.figures}


def _save(trainer: Any, tokenizer: Any, output_dir: Path) -> None:
    """Write the trained model. A LoRA adapter is merged, so that every stage opens the folder like any other.

    Its own weights, before merging, stay in the last checkpoint.
    """
    if not hasattr(trainer.model, "merge_and_unload"):
        trainer.save_model()
    elif trainer.args.should_save:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)


def prompt_text(row: Any) -> str:
    """The prompt of a row as one text: all rows of one prompt are held out, or none is."""
    return "\n".join(f"{m['role']}: {m['content']}" for m in row["prompt"])
