"""Pretraining: transformers' Trainer on packed tokens, resumable to the bit."""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Subset
from transformers import PrinterCallback, Trainer
from transformers.utils.logging import disable_progress_bar

from .. import artifacts
from ..data.packing import PackedTokens, collate
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..models import DogeForCausalLM
from ..ops.products import has_products, lacks_quack
from .arguments import PretrainArguments
from .bad_steps import BadSteps
from .callbacks import BalanceLoss, CompletePrompts, LossSinceLastLog, PrintLog, SaveOnInterrupt
from .checkpoints import checkpoint_name, newest, seal
from .continuing import (
    CarryRandomState,
    Continuing,
    Start,
    checkpoint_facts,
    find,
    order_seed,
)
from .devices import Sharded, require_optimizer, require_same_sharding
from .estimates import flops_per_token, largest_micro_batch, peak_flops, training_bytes
from .model import model_of
from .optimizer import decayed_parameters, make_optimizer
from .order import StepOrder
from .schedule import Schedule, set_schedule, steps_in
from .watching import attention_statistics, require_reporters

RUN_FILE = "run.json"
OUTGROWN = 8  # windows in a row: with 4 a model learns without ageing, with 16 and 32 it does not (docs/studies)


def pretrain(args: PretrainArguments) -> Path:
    """Train a model on packed tokens; returns the folder it is in.

    Called again with the same recipe it continues from the newest checkpoint, or returns at once when it is done.

    Raises:
        UserError: if the data, the tokenizer or the model are missing or do not fit together, the output folder holds
            another run, a checkpoint is cut short or is not one to continue from, or the disk is too small.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    assert args.data
    assert args.tokenizer
    assert args.output_dir
    output_dir, started = Path(args.output_dir), time.perf_counter()
    data = PackedTokens(args.data, "train", check=False)
    validation = PackedTokens(args.data, "validation")
    tokenizer = load_tokenizer(args.tokenizer)
    row_length = data.manifest["row_length"]
    finding, args.auto_find_batch_size = args.auto_find_batch_size, False  # the Trainer's own would change the step
    if finding:
        args.per_device_train_batch_size = 1
    _accumulate(args, row_length)

    settings = args.settings(data)
    run = _begun(output_dir, settings)
    if run is None:
        print(f"{output_dir} holds this run already, finished")
        return output_dir
    if args.local_process_index == 0:
        data.verify()
    require_optimizer(args)
    require_reporters(args)
    checkpoint = newest(output_dir)
    if checkpoint:
        require_same_sharding(args, checkpoint)
    start = Start(**run["start"]) if run.get("start") else find(args, data) if args.continue_from else None
    model = model_of(args, data, tokenizer, start, checkpoint)
    parameters = sum(p.numel() for p in model.parameters())
    artifacts.require_space(output_dir, 16 * parameters * ((args.save_total_limit or 1) + 1), "this run")
    torch.nn.Module.to(model, args.device)
    if finding:
        free = torch.cuda.mem_get_info(args.device)[0] if args.device.type == "cuda" else None
        rows, bf16, compiled = args.gradient_accumulation_steps, args.bf16, args.torch_compile
        products = bf16 and has_products(args.device)
        fits = largest_micro_batch(model.config, parameters, rows, row_length, bf16, compiled, free, products)
        args.per_device_train_batch_size = broadcast_object_list([fits])[0]
        _accumulate(args, row_length)
    # What the first process knows holds for all; none writes into the folder before every one has looked at it.
    max_steps = args.max_steps = broadcast_object_list([run["max_steps"] or _max_steps(args, model, data)])[0]
    schedule = set_schedule(args, max_steps, None if start is None else start.optimizer)
    if args.report_to in ("none", [], None) and importlib.util.find_spec("tensorboard"):
        args.report_to = ["tensorboard"]

    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type == "cuda"
    disable_progress_bar()  # transformers' own, over files written in an instant

    run |= {"settings": settings, "max_steps": max_steps} | ({"start": asdict(start)} if start else {})
    if args.process_index == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(output_dir / RUN_FILE, run)
    interrupt, losses, bad = SaveOnInterrupt(), LossSinceLastLog(), BadSteps(args.on_bad_step, args.spike_factor)
    samples = CompletePrompts(
        tokenizer, args.sample_prompts, args.sample_at, args.sample_tokens, output_dir / "samples.jsonl"
    )
    facts = _announce(args, model, data, max_steps, checkpoint, start)
    trainer = PretrainTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=_spread(validation, args.eval_rows),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[interrupt, losses, bad, samples, PrintLog()],
        run=_Run(
            tokens_per_step=facts["tokens_per_step"],
            bytes_per_token=data.bytes_per_token(),
            eval_bytes_per_token=validation.bytes_per_token(),
            flops_per_token=flops_per_token(model.config, row_length),
            peak_flops=peak_flops(args.device, args.bf16),
            schedule=schedule,
            settings=settings,
            start=start,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(CarryRandomState(trainer))
    samples.together = trainer.generates_together()
    trainer.watch(losses, bad)
    interrupt.watch(trainer.accelerator)

    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    stopped = interrupt.interrupted and trainer.state.global_step < max_steps
    if (stopped or bad.failure) and args.process_index == 0:
        artifacts.write_json(output_dir / RUN_FILE, run | {"seconds": run["seconds"] + time.perf_counter() - started})
    if stopped and not bad.failure:
        if args.process_index == 0:
            print(f"saved {checkpoint_name(trainer.state.global_step)} in {output_dir}; the same command continues")
        raise KeyboardInterrupt
    if bad.failure:
        kept = newest(output_dir)
        there = f"{kept} is from before" if kept else "there is no checkpoint yet"
        raise UserError(
            f"training stopped: {bad.failure}; {there}; `--on_bad_step skip` goes on without such steps, "
            f"`--continue_from` in another folder with another rate"
        )
    at_the_end = [row for row in trainer.state.log_history if row["step"] == max_steps and "eval_loss" in row]
    metrics = at_the_end[-1] if at_the_end else trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        facts |= {"eval_loss": metrics["eval_loss"], "eval_bits_per_byte": metrics["eval_bits_per_byte"]}
        state = checkpoint_facts(args, trainer.run, max_steps, data)
        facts |= {name: state[name] for name in ("step", "schedule", "data")} | {"start": run.get("start")}
        seconds = run["seconds"] + time.perf_counter() - started
        artifacts.finish(output_dir, "pretrain", settings, seconds, **facts)
        print(f"wrote {output_dir} in {artifacts.duration(seconds)}")
    return output_dir


@dataclass(frozen=True)
class _Run:
    """What a run is, and what turns losses and seconds into figures a person compares."""

    tokens_per_step: int
    bytes_per_token: float
    eval_bytes_per_token: float
    flops_per_token: float
    peak_flops: float | None
    schedule: Schedule | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    start: Start | None = None


class PretrainTrainer(Continuing, Sharded, Trainer):
    """transformers' Trainer with our parameter groups, sealed checkpoints and a log in bits per byte."""

    def __init__(self, *args: Any, run: _Run, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run, self.start = run, run.start
        self.watch(LossSinceLastLog(), BadSteps("ignore"))
        self.last_log = (0, 0.0)  # step and time; LossSinceLastLog sets them when training begins
        self.balance_loss = BalanceLoss()

    def watch(self, losses: LossSinceLastLog, bad_steps: BadSteps) -> None:
        """Which callbacks are told what the Trainer tells none."""
        self.losses, self.bad_steps = losses, bad_steps
        losses.trainer = bad_steps.trainer = self

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return decayed_parameters(model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        args: Any = self.args
        target: Any = model or self.model
        if self.optimizer is None and args.muon_learning_rate:
            self.optimizer = make_optimizer(target, args)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args: Any = self.args
        if args.train_sampling_strategy not in ("random", "sequential"):
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seen = self.start.rows_seen if self.start else 0
        shuffle = args.train_sampling_strategy == "random"
        return StepOrder(len(dataset), args.rows_per_step, order_seed(args), seen, shuffle)

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
            self.bad_steps.at_log(logs)
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
        found = attention_statistics(self, self.eval_dataset)
        output.metrics.update({f"eval_{name}": x for name, x in found.items()})
        return output

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.bad_steps.step(norm)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.bad_steps.look()
        if self.bad_steps.failure:
            return  # the checkpoint before stays the newest
        self.losses.gather()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            step = self.state.global_step
            facts = checkpoint_facts(self.args, self.run, step, self.train_dataset)
            seal(Path(str(self.args.output_dir), checkpoint_name(step)), **facts)


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
        accumulation, compiled = args.gradient_accumulation_steps, args.torch_compile
        fits = steps_in(args.max_minutes, model, batches, accumulation, optimizer, args.bf16, compiled)
        return min(fits, args.max_steps) if args.max_steps > 0 else fits
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = math.ceil(len(data) / (rows * args.world_size * args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def _accumulate(args: PretrainArguments, row_length: int) -> None:
    try:
        args.accumulate(row_length)
    except ValueError as error:
        raise UserError(str(error)) from error


def _announce(
    args: PretrainArguments,
    model: DogeForCausalLM,
    data: PackedTokens,
    max_steps: int,
    checkpoint: Path | None,
    start: Start | None,
) -> dict[str, Any]:
    """Print, before the first step, what is about to happen; returns it for the record."""
    row_length, parameters = data.manifest["row_length"], sum(p.numel() for p in model.parameters())
    rows = args.rows_per_step
    tokens = rows * row_length * max_steps
    epochs = tokens / (len(data) * row_length)
    micro_batch, compiled = args.train_batch_size, args.torch_compile
    products = args.bf16 and has_products(args.device)
    memory = training_bytes(model.config, parameters, micro_batch, row_length, args.bf16, compiled, products)
    if args.process_index == 0:
        print(
            f"{parameters:,} parameters, {max_steps:,} steps of {rows * row_length:,} tokens = {tokens:,} tokens "
            f"({epochs:.2f} epochs), about {memory / 2**20:,.0f} MiB on {args.device}",
            flush=True,
        )
        if args.bf16 and lacks_quack(args.device):
            print('training is faster on this GPU after `pip install "small-doge[hopper]"`', flush=True)
        w, config = model.config.keep_window_size, model.config
        if row_length >= OUTGROWN * w and not (config.score_lifetime or config.local_window):
            print(
                f"rows of {row_length:,} tokens are far longer than the window of {w:,} keys, in which models have not "
                f"learnt here: try `score_lifetime: {row_length}`",
                flush=True,
            )
        if checkpoint:
            print(f"continuing from {checkpoint}", flush=True)
        elif start:
            print(
                f"{start.words()}, at a rate of {args.learning_rate:g}{', decaying' if args.decay else ''}", flush=True
            )
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
