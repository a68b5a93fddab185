"""Supervised fine-tuning: TRL's SFTTrainer on packed conversations, with loss on what the assistant says.

TRL's best-fit packing fills rows with whole conversations, but its collator then lays a batch end to end as one long
row. That row is longer than the window of keys, which must then be chosen instead of all being there, and its length
is the batch's. Here the packed rows stay rows (B, T), with positions that begin anew in every conversation: that is
how Doge tells documents apart, and no conversation sees another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..data.conversations import encode_conversations, read_conversations
from ..errors import UserError
from ..ops.linear_cross_entropy import IGNORED
from ..recipe import described
from .align import Stage, align, two_sides
from .align_arguments import NEEDS_TRL, AlignArguments
from .align_trainer import AlignTrainer

try:
    from trl import SFTConfig, SFTTrainer, pack_dataset
except ImportError:
    raise UserError(NEEDS_TRL) from None


@dataclass
class SFTArguments(AlignArguments, SFTConfig):  # type: ignore[misc]  # null means more here
    """A recipe for supervised fine-tuning: our fields, and every field of TRL's SFTConfig."""

    learning_rate: float = described("peak learning rate (published: 8e-4 at 20M to 2e-4 at 320M)", 8e-4)
    max_length: int | None = described("tokens of a row; longer conversations are cut at a turn", 2048)
    packing: bool = described("several conversations to a row; false pads one to the longest of its batch", True)


def sft(args: SFTArguments) -> Path:
    """Teach the model of ``args.model`` to answer; returns the folder it is in. See :func:`align.align`."""
    return align(args, STAGE)


class PackedCollator:
    """Rows of packed conversations as tensors (B, T): positions restart with a conversation.

    T is ``length``, or the longest row's where that is None.
    """

    def __init__(self, pad_token_id: int, length: int | None = None):
        self.pad_token_id, self.length = pad_token_id, length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of ``input_ids``, ``labels`` and ``seq_lengths``, the lengths of the conversations in them."""
        B, T = len(rows), self.length or max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((B, T), self.pad_token_id),
            "labels": torch.full((B, T), IGNORED),
            "attention_mask": torch.zeros((B, T), dtype=torch.long),
            # padding counts on from 0 as one more document; nobody reads what it sees
            "position_ids": torch.zeros((B, T), dtype=torch.long),
        }
        for b, row in enumerate(rows):
            n = len(row["input_ids"])
            batch["input_ids"][b, :n] = torch.tensor(row["input_ids"])
            batch["labels"][b, :n] = torch.tensor(row["labels"])
            batch["attention_mask"][b, :n] = 1
            lengths = torch.tensor([*row["seq_lengths"], T - n])
            begins = lengths.cumsum(0) - lengths
            batch["position_ids"][b] = torch.arange(T) - begins.repeat_interleave(lengths)
        # the first token of a conversation is nobody's continuation, least of all the one before's
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch


class DogeSFTTrainer(AlignTrainer, SFTTrainer):
    """TRL's SFTTrainer on rows that are ready, with the model's own loss, and the held-out loss of a token."""

    def __init__(self, model: Any, args: SFTArguments, **options: Any):
        packing = args.packing
        args.packing = False  # for TRL: it is done, and its own would flatten the batches
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        # Packed rows are nearly full, and what is compiled for one length is compiled once.
        length = args.max_length if packing and args.torch_compile else None
        collator = PackedCollator(options["processing_class"].pad_token_id, length)
        for side in ("train_dataset", "eval_dataset"):
            if options.get(side) is not None:  # arrays, not lists of numbers: a seventh of the time to make a batch
                options[side] = options[side].with_format("numpy")
        super().__init__(model, args, data_collator=collator, **options)
        args.packing = packing

    def training_loss(self, model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """The model's own loss, as in pretraining, experts' balance loss included.

        TRL's scores every position on a CPU and holds all their logits: a step of doge-tiny takes half as long again.
        """
        self.count_tokens(inputs["attention_mask"])
        inputs = {**inputs, "skip_logits": True, "use_cache": False}
        if not self.model.config.is_moe:  # a balance loss passes padding over; else it is one more document, unlabelled
            del inputs["attention_mask"]  # and documents alone take the fastest attention
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items)
        if outputs.get("aux_loss") is not None:
            self.balance_loss.add(outputs["aux_loss"], inputs["labels"], num_items)
        return loss

    def examples(self, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        return torch.stack([-output.log_probs.double().sum(-1), output.label_mask.sum(-1)], dim=-1)

    def held_out_figures(self, sums: list[float]) -> dict[str, float]:
        return {"loss": sums[0] / max(sums[1], 1.0)}


def encode(args: SFTArguments, tokenizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Training rows and held-out rows with ``input_ids``, ``labels`` and ``seq_lengths``; and facts for the record."""
    max_length: Any = args.max_length
    train, held_out, dropped = two_sides(args, read_conversations, _question)
    sides, conversations = [], []
    for dataset in (train, held_out):
        encoded, counts = encode_conversations(dataset, tokenizer, max_length, args.dataset_num_proc)
        if dataset is train:
            dropped = {reason: dropped.get(reason, 0) + counts.get(reason, 0) for reason in {**dropped, **counts}}
        conversations.append(len(encoded))
        labelled = encoded.map(
            _labels, remove_columns=["assistant_masks"], num_proc=args.dataset_num_proc, desc="Labelling tokens"
        )
        sides.append(_packed(labelled, args))
    tokens = sum(map(sum, sides[0]["seq_lengths"]))
    facts = {
        "conversations": conversations[0],
        "held_out_conversations": conversations[1],
        "rows": len(sides[0]),
        "tokens": tokens,
        "dropped": dropped,
        "words": f"{conversations[0]:,} conversations of {tokens:,} tokens in {len(sides[0]):,} rows",
    }
    return sides[0], sides[1], facts


def _packed(dataset: Any, args: SFTArguments) -> Any:
    max_length: Any = args.max_length
    if args.packing:
        options = {"num_proc": args.dataset_num_proc, "desc": "Packing conversations"}
        return pack_dataset(dataset, max_length, "bfd", options)
    return dataset.map(_alone, num_proc=args.dataset_num_proc, desc="One conversation a row")


def _alone(row: dict[str, Any]) -> dict[str, Any]:
    return {"seq_lengths": [len(row["input_ids"])]}


def _labels(row: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(row["input_ids"], row["assistant_masks"], strict=True)
    return {"labels": [i if learned else IGNORED for i, learned in pairs]}


def _question(row: dict[str, Any]) -> str:
    """What a conversation opens with, its system message aside, which many share."""
    return next((m["content"] for m in row["messages"] if m["role"] != "system"), "")


STAGE = Stage("sft", encode, DogeSFTTrainer, {"eval_loss": "held-out loss of an assistant's token"})
