"""Direct preference optimisation: TRL's DPOTrainer, the reference's log-probabilities computed once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.preferences import encode_preferences, read_preferences
from ..errors import UserError
from ..ops.linear_cross_entropy import IGNORED
from ..recipe import described
from .align import Stage, align, prompt_text, two_sides
from .align_arguments import NEEDS_TRL, AlignArguments
from .align_trainer import AlignTrainer

try:
    from trl import DPOConfig, DPOTrainer
except ImportError:
    raise UserError(NEEDS_TRL) from None


@dataclass
class DPOArguments(AlignArguments, DPOConfig):  # type: ignore[misc]  # null means more here
    """A recipe for preference optimisation: our fields, and every field of TRL's DPOConfig."""

    learning_rate: float = described("peak learning rate (published: 8e-5 at 20M to 2e-5 at 320M)", 8e-5)
    max_length: int | None = described("tokens of a prompt with its longer reply", 1024)
    precompute_ref_log_probs: bool = described(
        "compute the reference's log-probabilities before training, so that it is not in memory during it", True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.precompute_ref_log_probs:
            raise ValueError("`precompute_ref_log_probs` is false, expected true: held-out figures are made with them")
        if self.beta <= 0:
            raise ValueError(f"`beta` is {self.beta}, expected more than 0")


def dpo(args: DPOArguments) -> Path:
    """Teach the model of ``args.model`` which of two replies is preferred; returns the folder it is in.

    See :func:`align.align`.
    """
    return align(args, STAGE)


class DogeDPOTrainer(AlignTrainer, DPOTrainer):
    """TRL's DPOTrainer on pairs that are ready, with held-out figures that mean something before training too."""

    def __init__(self, model: Any, args: DPOArguments, **options: Any):
        self.watch_aux_loss(model)
        super().__init__(model, args, **options)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """The pairs are in tokens already, which TRL does not expect."""
        return dataset

    def training_loss(self, model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        loss = DPOTrainer.compute_loss(self, model, inputs)
        return self.with_balance_loss(loss, inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED))

    def examples(self, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Terms of each pair, in the order :meth:`held_out_figures` reads them.

        ``output.log_probs`` (2B, T − 1) holds the chosen replies, then the rejected ones, 0 outside the reply.
        """
        log_probs = output.log_probs.double().sum(-1)  # (2B,)
        lengths = output.label_mask.sum(-1)
        chosen, rejected = log_probs.chunk(2)
        mean_chosen, mean_rejected = (log_probs / lengths.clamp(min=1)).chunk(2)
        rewards = self.beta * (chosen - inputs["ref_chosen_logps"] - rejected + inputs["ref_rejected_logps"])
        terms = (
            torch.ones_like(chosen),
            mean_chosen > mean_rejected,
            mean_chosen - mean_rejected,
            rewards > 0,
            rewards,
            -chosen,
            lengths.chunk(2)[0],
        )
        return torch.stack([term.double() for term in terms], dim=-1)

    def held_out_figures(self, sums: list[float]) -> dict[str, float]:
        pairs, accurate, margin, rewarded, reward_margin, chosen, tokens = sums
        return {
            # by the log-probability of a token, so that the shorter reply has no advantage; it needs no reference
            "preference_accuracy": accurate / pairs,
            "preference_margin": margin / pairs,
            # by DPO's own reward; before training it is 0 for all, and its accuracy that of rounding
            "reward_accuracy": rewarded / pairs,
            "reward_margin": reward_margin / pairs,
            "chosen_loss": chosen / tokens,
        }


def encode(args: DPOArguments, tokenizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Training pairs and held-out pairs with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; and facts."""
    max_length: Any = args.max_length
    train, held_out, dropped = two_sides(args, read_preferences, prompt_text)
    train, counts = encode_preferences(train, tokenizer, max_length, args.dataset_num_proc)
    held_out, _ = encode_preferences(held_out, tokenizer, max_length, args.dataset_num_proc)
    seen = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if 0 < seen < len(train):  # the reference reads every pair there is, so there should be none that training skips
        in_order = args.train_sampling_strategy == "sequential"
        train = (train if in_order else train.shuffle(seed=args.seed)).select(range(seen))
    facts = {
        "pairs": len(train),
        "held_out_pairs": len(held_out),
        "dropped": {reason: dropped.get(reason, 0) + counts.get(reason, 0) for reason in {**dropped, **counts}},
        "words": f"{len(train):,} pairs",
    }
    return train, held_out, facts


STAGE = Stage(
    "dpo",
    encode,
    DogeDPOTrainer,
    {
        "eval_loss": "held-out DPO loss",
        "eval_preference_accuracy": "held-out preference accuracy",
        "eval_preference_margin": "margin of a token",
        "eval_reward_margin": "reward margin",
        "eval_chosen_loss": "loss of a chosen reply's token",
    },
)
