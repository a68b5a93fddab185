"""One training run of a study: any model, on packed rows, by the Trainer of `doge pretrain`."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from points import Row, this_device
from transformers import PrinterCallback

from small_doge.data.packing import PackedTokens, collate
from small_doge.models.modeling_doge import DogePreTrainedModel
from small_doge.ops.linear_cross_entropy import linear_cross_entropy
from small_doge.training.arguments import PretrainArguments
from small_doge.training.estimates import peak_flops
from small_doge.training.pretrain import PretrainTrainer, _Run
from small_doge.training.schedule import schedule_options

IGNORED = -100
ROWS = 8  # of a validation batch
# Steps. With 40 or 48 at the published rate of the 20m, 8e-3, a Doge stayed 0.25 nats above one with 60, and a Llama
# 0.8 above one at half the rate.
WARMUP = 100


class Plain(PretrainTrainer):
    """The same Trainer for a model of transformers': its hidden states, and our loss, which needs no logits."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            return loss_of(model, inputs, num_items_in_batch)


def loss_of(model: Any, batch: dict[str, torch.Tensor], items: Any = None) -> torch.Tensor:
    """The mean loss of the labelled tokens, or their sum over ``items``; positions are passed on if the batch has them.

    Args:
        batch: ``input_ids`` and ``labels`` (B, T), and ``position_ids`` for a model that keeps documents apart.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    following = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    count = (following != IGNORED).sum().clamp(min=1) if items is None else items
    return linear_cross_entropy(hidden.flatten(0, 1), model.get_output_embeddings().weight, following, count)


@dataclass
class Run:
    """What a run gave.

    Attributes:
        log: a row for every few steps: step, tokens, loss, tokens_per_second.
        eval_loss: nats a token, held out.
        eval_bits_per_byte: the same in bits a byte of the text.
    """

    log: list[Row] = field(default_factory=list)
    eval_loss: float = math.nan
    eval_bits_per_byte: float = math.nan

    @property
    def figures(self) -> Row:
        """Those of the end, for a row."""
        speeds = sorted(x["tokens_per_second"] for x in self.log[1:] or self.log)  # the first has the compiling in it
        return {
            "loss": self.log[-1]["loss"],
            "eval_loss": round(self.eval_loss, 4),
            "eval_bits_per_byte": round(self.eval_bits_per_byte, 4),
            "tokens": self.log[-1]["tokens"],
            "tokens_per_second": speeds[len(speeds) // 2],
        }


def _batch_of(kept: tuple[str, ...], rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate(rows)  # (B, T), or (B, texts, T) if a row is several texts
    return {name: batch[name].flatten(0, -2) for name in kept if name in batch}


def train(
    model: Any,
    data: Any,
    validation: PackedTokens,
    *,
    steps: int,
    rows: int,
    micro_batches: int,
    learning_rate: float,
    seed: int,
    decay_steps: int | None = None,
    documents_apart: bool = True,
    **arguments: Any,
) -> Run:
    """Train a model in place, and score it on held-out rows.

    In bfloat16 and compiled layer by layer on a GPU. Warmup in the first 100 steps, decay in the last fifth. A model of
    transformers' gets a row as one text, as it is usually trained. Tokens that begin a document carry no loss.

    Args:
        data: rows as :class:`PackedTokens` gives them.
        rows: of a micro-batch.
        decay_steps: 0 leaves the model in the stable stage.
        documents_apart: no document of a row sees another; False gives a Doge a row as one text too.
        arguments: of :class:`PretrainArguments`, in place of those here.
    """
    device, row_length = this_device(), validation.manifest["row_length"]
    gpu, ours = device.type == "cuda", isinstance(model, DogePreTrainedModel)
    decay = schedule_options(steps, steps // 5 if decay_steps is None else decay_steps, "linear", 0.0)
    kept = ("input_ids", "labels", *(["position_ids"] if ours and documents_apart else []))

    batch_of = partial(_batch_of, kept)
    torch._dynamo.reset()
    for layer in model.base_model.layers if gpu else ():
        layer.compile(dynamic=False)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "output_dir": folder,
            "data": "-",
            "tokenizer": "-",
            "max_steps": steps,
            "learning_rate": learning_rate,
            "warmup_steps": min(WARMUP, steps // 2),
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": decay,
            "bf16": gpu,
            "seed": seed,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": micro_batches,
            "logging_steps": min(10, steps),
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_num_workers": 0,  # of a worker of points.run they would be spawned, which takes longer
            "on_bad_step": "ignore",
        }
        made = PretrainArguments(**options | arguments)
        tokens, bytes_per_token = rows * micro_batches * row_length, validation.bytes_per_token()
        run = _Run(tokens, bytes_per_token, bytes_per_token, 0.0, peak_flops(device, bf16=True))
        trainer = (PretrainTrainer if ours else Plain)(model, made, train_dataset=data, data_collator=batch_of, run=run)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = [
        {"step": x["step"], "tokens": x["step"] * tokens, "loss": round(x["loss"], 4)}
        | {"tokens_per_second": round(x["tokens_per_second"])}
        for x in trainer.state.log_history
        if "loss" in x
    ]
    del trainer
    gc.collect()
    loss = held_out(model, validation, batch_of)
    return Run(log, loss, loss / math.log(2) / bytes_per_token)


@torch.no_grad()
def held_out(
    model: Any, data: Any, batch_of: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] = collate
) -> float:
    """Nats a token over all labelled tokens of a split. Layer by layer as written: compiling anew would take longer."""
    device = next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    with torch.compiler.set_stance("force_eager"):
        for start in range(0, len(data), ROWS):
            batch = batch_of([data[i] for i in range(start, min(start + ROWS, len(data)))])
            labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                total += loss_of(model, {name: x.to(device) for name, x in batch.items()}).item() * labels
            count += labels
    return total / count
