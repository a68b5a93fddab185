"""Pretraining: transformers' Trainer on packed tokens, resumable to the bit."""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Subset
from transformers import PrinterCallback, Trainer, set_seed
from transformers.utils.logging import disable_progress_bar

from .. import artifacts
from ..data.packing import PackedTokens, collate
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..models import SIZES, DogeForCausalLM, config_for, load_model
from .arguments import PretrainArguments
from .callbacks import BalanceLoss, CompletePrompts, LossSinceLastLog, PrintLog, SaveOnInterrupt
from .checkpoints import checkpoint_name, newest, seal
from .estimates import flops_per_token, peak_flops, training_bytes
from .optimizer import decayed_parameters, make_optimizer
from .schedule import schedule_options, steps_in

RUN_FILE = "run.json"


def pretrain(args: PretrainArguments) -> Path:
    """Train a model on packed tokens; returns the folder it is in.

    Called again with the same recipe it continues from the newest checkpoint, or returns at once when it is done.

    Raises:
        UserError: if the data, the tokenizer or the model are missing or do not fit together, the output folder holds
            another run, a checkpoint is cut short, or the disk is too small.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    assert args.data
    assert args.tokenizer
    assert args.output_dir
    output_dir, started = Path(args.output_dir), time.perf_counter()
    data = PackedTokens(args.data, "train")
    validation = PackedTokens(args.data, "validation")
    tokenizer = load_tokenizer(args.tokenizer)
    model = _model(args, data, tokenizer)
    row_length = data.manifest["row_length"]
    try:
        args.accumulate(row_length)
    except ValueError as error:
        raise UserError(str(error)) from error

    settings = args.settings(data)
    run = _begun(output_dir, settings)
    if run is None:
        print(f"{output_dir} holds this run already, finished")
        return output_dir
    checkpoint = newest(output_dir)
    parameters = sum(p.numel() for p in model.parameters())
    artifacts.require_space(output_dir, 16 * parameters * ((args.save_total_limit or 1) + 1), "this run")
    torch.nn.Module.to(model, args.device)
    # What the first process knows holds for all; none writes into the folder before every one has looked at it.
    max_steps = args.max_steps = broadcast_object_list([run["max_steps"] or _max_steps(args, model, data)])[0]
    args.lr_scheduler_kwargs = schedule_options(max_steps, args.decay_steps, args.decay_type, args.min_lr_ratio)
    if args.report_to in ("none", [], None) and importlib.util.find_spec("tensorboard"):
        args.report_to = ["tensorboard"]

    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type == "cuda"
    disable_progress_bar()  # transformers' own, over files written in an instant

    run |= {"settings": settings, "max_steps": max_steps}
    if args.process_index == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(output_dir / RUN_FILE, run)
    interrupt, losses = SaveOnInterrupt(), LossSinceLastLog()
    samples = CompletePrompts(
        tokenizer, args.sample_prompts, args.sample_at, args.sample_tokens, output_dir / "samples.jsonl"
    )
    facts = _announce(args, model, data, max_steps, checkpoint)
    trainer = PretrainTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=_spread(validation, args.eval_rows),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[interrupt, losses, samples, PrintLog()],
        run=_Run(
            tokens_per_step=facts["tokens_per_step"],
            bytes_per_token=data.bytes_per_token(),
            eval_bytes_per_token=validation.bytes_per_token(),
            flops_per_token=flops_per_token(model.config, row_length),
            peak_flops=peak_flops(args.device, args.bf16),
        ),
    )
    trainer.remove_callback(PrinterCallback)
    losses.trainer = trainer
    interrupt.watch(trainer.accelerator)

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.interrupted and trainer.state.global_step < max_steps:
        if args.process_index == 0:
            run["seconds"] += time.perf_counter() - started
            artifacts.write_json(output_dir / RUN_FILE, run)
            print(f"saved {checkpoint_name(trainer.state.global_step)} in {output_dir}; the same command continues")
        raise KeyboardInterrupt
    at_the_end = [row for row in trainer.state.log_history if row["step"] == max_steps and "eval_loss" in row]
    metrics = at_the_end[-1] if at_the_end else trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        facts |= {"eval_loss": metrics["eval_loss"], "eval_bits_per_byte": metrics["eval_bits_per_byte"]}
        seconds = run["seconds"] + time.perf_counter() - started
        artifacts.finish(output_dir, "pretrain", settings, seconds, **facts)
        print(f"wrote {output_dir} in {artifacts.duration(seconds)}")
    return output_dir


@dataclass(frozen=True)
class _Run:
    """What turns losses and seconds into figures a person compares."""

    tokens_per_step: int
    bytes_per_token: float
    eval_bytes_per_token: float
    flops_per_token: float
    peak_flops: float | None


class PretrainTrainer(Trainer):
    """transformers' Trainer with our parameter groups, sealed checkpoints and a log in bits per byte."""

    def __init__(self, *args: Any, run: _Run, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run = run
        self.last_log = (0, 0.0)  # step and time; LossSinceLastLog sets them when training begins
        self.balance_loss = BalanceLoss()

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return decayed_parameters(model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        args: Any = self.args
        target: Any = model or self.model
        if self.optimizer is None and args.muon_learning_rate:
            self.optimizer = make_optimizer(target, args)
        return super().create_optimizer(model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, {**inputs, "skip_logits": True}, True, num_items_in_batch)
        loss, outputs = found
        if model.training and outputs.get("aux_loss") is not None:
            self.balance_loss.add(outputs["aux_loss"], inputs["labels"], num_items_in_batch)
        return found if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add bits per byte, tokens/s and model FLOP utilisation to the Trainer's own entries.

        Of a model with experts also the balance loss, which is in the loss but not in bits per byte.
        """
        now = time.time()
        if "loss" in logs:
            step, since = self.last_log
            rate = self.run.tokens_per_step * (self.state.global_step - step) / max(now - since, 1e-9)
            model: Any = self.model
            cross_entropy, balance_loss = logs["loss"], self.balance_loss.take(self.accelerator.gather)
            if balance_loss is not None:
                logs["balance_loss"] = balance_loss
                cross_entropy -= model.config.router_aux_loss_coef * balance_loss
            logs["bits_per_byte"] = cross_entropy / math.log(2) / self.run.bytes_per_token
            logs["tokens_per_second"] = rate
            if self.run.peak_flops:
                logs["mfu"] = rate * self.run.flops_per_token / self.run.peak_flops / self.args.world_size
        super().log(logs, start_time)
        self.last_log = (self.state.global_step, time.time())  # so that validation is not counted as training time

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().evaluation_loop(*args, **kwargs)
        loss = output.metrics["eval_loss"]
        output.metrics["eval_bits_per_byte"] = loss / math.log(2) / self.run.eval_bytes_per_token
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(Path(str(self.args.output_dir), checkpoint_name(self.state.global_step)))


def _model(args: Any, data: PackedTokens, tokenizer: Any) -> DogeForCausalLM:
    """The model to train, with the balance loss counting for what the recipe says."""
    model = _fresh_or_from_a_folder(args, data, tokenizer)
    if args.router_aux_loss_coef is not None:
        if not model.config.is_moe:
            raise UserError(f"router_aux_loss_coef is {args.router_aux_loss_coef}, and {args.model} has no experts")
        model.config.router_aux_loss_coef = args.router_aux_loss_coef
    return model


def _fresh_or_from_a_folder(args: Any, data: PackedTokens, tokenizer: Any) -> DogeForCausalLM:
    """A fresh model of a size, or the one in a folder, fitting the vocabulary of the data."""
    vocab_size = data.manifest["vocab_size"]
    data.check_tokenizer(args.tokenizer)
    set_seed(args.seed)
    if args.model.lower() in SIZES:
        row_length = data.manifest["row_length"]
        options: dict[str, Any] = {"keep_window_size": args.keep_window_size} if args.keep_window_size else {}
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = config_for(args.model, vocab_size=vocab_size, **special, **options)
        config.max_position_embeddings = max(config.max_position_embeddings, row_length)
        return DogeForCausalLM(config)
    model = load_model(args.model)
    if model.config.vocab_size != vocab_size:
        raise UserError(
            f"model {args.model} has a vocabulary of {model.config.vocab_size:,} and the data {args.data} one of "
            f"{vocab_size:,}; expected the same tokenizer for both"
        )
    return model


def _begun(output_dir: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of the run in a folder: its steps and the seconds spent so far; None if it is finished."""
    if (output_dir / artifacts.STAGE_FILE).exists() or not (output_dir / RUN_FILE).exists():
        finished = artifacts.is_finished(output_dir, "pretrain", settings)
        return None if finished else {"settings": settings, "max_steps": None, "seconds": 0.0}
    there = artifacts.read_json(output_dir / RUN_FILE)
    artifacts.require_same_settings(output_dir, there["settings"], settings)
    return there


def _max_steps(args: PretrainArguments, model: DogeForCausalLM, data: PackedTokens) -> int:
    rows = args.train_batch_size
    if args.max_minutes is not None:
        some = [collate([data[(i * rows + j) % len(data)] for j in range(rows)]) for i in range(18)]
        batches = [{name: x.to(args.device) for name, x in batch.items()} for batch in some]
        optimizer = partial(make_optimizer, args=args)
        fits = steps_in(args.max_minutes, model, batches, args.gradient_accumulation_steps, optimizer)
        return min(fits, args.max_steps) if args.max_steps > 0 else fits
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = math.ceil(len(data) / (rows * args.world_size * args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def _announce(
    args: PretrainArguments, model: DogeForCausalLM, data: PackedTokens, max_steps: int, checkpoint: Path | None
) -> dict[str, Any]:
    """Print, before the first step, what is about to happen; returns it for the record."""
    row_length, parameters = data.manifest["row_length"], sum(p.numel() for p in model.parameters())
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = rows * row_length * max_steps
    epochs = tokens / (len(data) * row_length)
    memory = training_bytes(model.config, parameters, args.train_batch_size, row_length, args.bf16)
    if args.process_index == 0:
        print(
            f"{parameters:,} parameters, {max_steps:,} steps of {rows * row_length:,} tokens = {tokens:,} tokens "
            f"({epochs:.2f} epochs), about {memory / 2**20:,.0f} MiB on {args.device}",
            flush=True,
        )
        if checkpoint:
            print(f"continuing from {checkpoint}", flush=True)
    return {
        "parameters": parameters,
        "steps": max_steps,
        "tokens_per_step": rows * row_length,
        "tokens": tokens,
        "epochs": round(epochs, 3),
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
        "threads": torch.get_num_threads(),
        "estimated_bytes": memory,
    }


def _spread(data: PackedTokens, rows: int) -> PackedTokens | Subset:
    """At most ``rows`` rows, evenly spread over the split."""
    if rows >= len(data):
        return data
    return Subset(data, [i * len(data) // rows for i in range(rows)])
