"""Group relative policy optimisation (GRPO, arXiv:2402.03300): TRL's GRPOTrainer with rewards that a program verifies.

Every step asks some questions, samples ``num_generations`` completions of each, and makes the better ones of a group
likelier: an advantage is a reward's distance from its group's mean, over the group's standard deviation. Held out, each
question is answered once, by the likeliest token at every place; TRL's own look would sample.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.rendering import Renderer
from ..data.verifiable import read_questions
from ..errors import UserError
from ..recipe import described
from .align import Stage, align, prompt_text, two_sides
from .align_arguments import NEEDS_TRL, AlignArguments
from .align_trainer import AlignTrainer
from .rewards import REWARDS, rewards_of

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError:
    raise UserError(NEEDS_TRL) from None


# ruff: noqa: RUF009 - described makes dataclass fields
@dataclass
class GRPOArguments(AlignArguments, GRPOConfig):  # type: ignore[misc]  # null means more here
    """A recipe for GRPO: our fields, and every field of TRL's GRPOConfig.

    A step has ``per_device_train_batch_size · gradient_accumulation_steps`` completions on every device, a whole
    number of groups of ``num_generations``.

    Raises:
        ValueError: for values out of range, and fields of TRL that have no meaning here.
        UserError: for unknown rewards.
    """

    rewards: list[str] = described(
        "what is paid for: arithmetic (rows' `answer`), code (`tests`), format", ["arithmetic"]
    )
    max_length: int | None = described("tokens of a prompt with its completion; longer prompts are left out", 512)
    max_completion_length: int | None = described("tokens of a completion, after which it is cut", 128)
    num_generations: int | None = described("completions of a question, the group (G)", 8)
    num_generations_eval: int | None = described("held-out questions are answered once, greedily", 1)
    beta: float = described("what the KL divergence from the starting model counts (β); 0 keeps no such model", 0.04)
    loss_type: str = described(
        "how token losses are averaged: grpo (the paper's), dr_grpo, dapo or another of TRL's", "grpo"
    )
    learning_rate: float = described("peak learning rate", 1e-5)
    num_train_epochs: float = described("times every question is asked", 1.0)
    shuffle_dataset: bool | None = described("TRL's shuffling: questions are shuffled before, for each epoch", False)

    def __post_init__(self) -> None:
        if self.tokens_per_step is not None:
            raise ValueError(
                "`tokens_per_step` is set, expected `per_device_train_batch_size` and `gradient_accumulation_steps`, "
                "which count completions"
            )
        if self.use_vllm or self.use_transformers_continuous_batching:
            raise ValueError(
                "`use_vllm` or continuous batching is set, expected neither: they do not know Doge's cache"
            )
        if self.num_generations_eval != 1:
            raise ValueError(f"`num_generations_eval` is {self.num_generations_eval}, expected 1: it is greedy")
        if self.shuffle_dataset:
            raise ValueError("`shuffle_dataset` is true, expected false: questions are shuffled by `seed` before")
        if self.max_completion_length is None or not 0 < self.max_completion_length < (self.max_length or 0):
            raise ValueError(
                f"`max_completion_length` is {self.max_completion_length}, expected 1 to less than `max_length`"
            )
        if self.beta < 0:
            raise ValueError(f"`beta` is {self.beta}, expected 0 or more")
        rewards = rewards_of(self.rewards)
        if self.reward_weights is not None and len(self.reward_weights) != len(rewards):
            raise ValueError(f"`reward_weights` has {len(self.reward_weights)} numbers, expected {len(rewards)}")
        super().__post_init__()


def grpo(args: GRPOArguments) -> Path:
    """Train the model of ``args.model`` on what its own completions earn; returns the folder it is in.

    See :func:`align.align`. An interrupted run goes on with the completions it would have sampled, unless a generation
    serves several steps (``steps_per_generation`` or ``num_iterations`` above what one step uses): those were lost.
    """
    return align(args, STAGE)


class DogeGRPOTrainer(AlignTrainer, GRPOTrainer):
    """TRL's GRPOTrainer with our rendering of prompts, balance loss, and greedy held-out answers."""

    def __init__(self, model: Any, args: GRPOArguments, **options: Any):
        self.renderer = Renderer(options["processing_class"])
        self.watch_aux_loss(model)
        self.rewards, self.tokenizer = rewards_of(args.rewards), options["processing_class"]
        super().__init__(model, args, reward_funcs=list(self.rewards), **options)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """As everywhere here: what people wrote stays letters, even where it spells a special token."""
        ids: Any = self.renderer.prompts(prompts)
        return ids, None, {}

    def training_loss(self, model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        loss = GRPOTrainer.compute_loss(self, model, inputs)
        # TRL divides its loss by the micro-batches of a step itself
        return self.with_balance_loss(loss, inputs["completion_ids"], 1 / self.current_gradient_accumulation_steps)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Answer each question greedily; the loss is the reward's negative, which is what training lowers."""
        ids = self._tokenize_prompts([row["prompt"] for row in inputs])[0]
        sampled = self.generation_config, self.generation_kwargs
        self.generation_kwargs = {**self.generation_kwargs, **_GREEDY}
        self.generation_config = copy.deepcopy(sampled[0])
        self.generation_config.update(**_GREEDY)
        try:
            completions, _ = self._generate_single_turn(ids, None, {}, 1)
        finally:
            self.generation_config, self.generation_kwargs = sampled
        terms = self._terms(inputs, completions).to(self.accelerator.device)
        # without the questions that make up the last batch where processes must have equal ones
        sums = self.accelerator.gather_for_metrics(terms).sum(dim=0)
        self._sums = sums if self._sums is None else self._sums + sums
        return -terms[:, 0].mean().float(), None, None

    def _terms(self, rows: Any, completions: list[list[int]]) -> torch.Tensor:
        """(B, 5) of each completion: reward, whether verified, whether it ended, its tokens, and 1."""
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        paid = [reward(texts, **{k: v for k, v in columns.items() if k != "prompt"}) for reward in self.rewards]
        terms = []
        for i, ids in enumerate(completions):
            mine = [scores[i] for scores in paid]
            total = sum(w * s for w, s in zip(self.reward_weights.tolist(), mine, strict=True) if s is not None)
            verified = all(s == 1 for s, f in zip(mine, self.rewards, strict=True) if f.column and s is not None)
            terms.append([total, verified, ids[-1] in self.eos_token_ids, len(ids), 1])
        return torch.tensor(terms, dtype=torch.float64)

    def held_out_figures(self, sums: list[float]) -> dict[str, float]:
        reward, verified, ended, length, count = sums
        return {
            "loss": -reward / count,
            "reward": reward / count,
            "accuracy": verified / count,
            "ended": ended / count,
            "length": length / count,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._total_train_tokens = int(self.state.num_input_tokens_seen)
        if "loss" in logs:
            clipped = self._metrics["train"].get("completions/clipped_ratio", [])
            self._metrics["train"]["completions/ended"] = [1 - share for share in clipped]
        super().log(logs, start_time)


_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}


def encode(args: GRPOArguments, tokenizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Training questions in the order they are asked, epoch after epoch, held-out questions, and facts.

    The order is part of the data, not TRL's, whose sampler begins anew with the first order when a run is resumed.
    """
    train, held_out, dropped = two_sides(args, read_questions, prompt_text)
    sides = []
    for dataset in (train, held_out):
        kept, counts = _fit(dataset, args, tokenizer)
        if dataset is train:
            dropped = {**dropped, **counts}
        sides.append(kept)
    train, held_out = sides
    group: Any = args.num_generations
    generated: Any = args.generation_batch_size
    serves: Any = args.steps_per_generation
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    # questions of one generation, and the steps that it serves
    questions = generated // group
    steps = serves * args.num_iterations / args.gradient_accumulation_steps
    max_steps = args.max_steps
    if max_steps <= 0:
        max_steps = max(1, round(args.num_train_epochs * len(train) / questions * steps))
    needed = max(1, -int(-max_steps // steps)) * questions
    order: list[int] = []
    epoch = 0
    while len(order) < needed:
        shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
        order, epoch = order + shuffled, epoch + 1
    facts = {
        "questions": len(train),
        "held_out_questions": len(held_out),
        "steps": max_steps,
        "completions_per_step": per_step,
        "dropped": dropped,
        "words": f"{len(train):,} questions, {needed / len(train):.2f} times each, {group} completions",
    }
    return train.select(order[:needed]), held_out, facts


def _fit(dataset: Any, args: GRPOArguments, tokenizer: Any) -> tuple[Any, dict[str, int]]:
    """The questions that leave room for a completion and that a reward of the recipe can judge."""
    room = (args.max_length or 0) - (args.max_completion_length or 0)
    columns = [column for name in args.rewards if (column := REWARDS[name].column)]
    checks = [dataset[column] for column in columns]
    prompts = Renderer(tokenizer).prompts(dataset["prompt"])
    reasons: dict[str, int] = {}
    kept = []
    for i, prompt in enumerate(prompts):
        reason = None
        if all(column[i] is None for column in checks):
            reason = f"dropped: no `{'` or `'.join(columns)}`, which the rewards of the recipe read"
        elif prompt is None:
            reason = "dropped: the chat template refuses it"
        elif len(prompt) > room:
            reason = "dropped: its prompt leaves no room for a completion within max_length"
        if reason is None:
            kept.append(i)
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    if not kept:
        why = "; ".join(f"{reason.removeprefix('dropped: ')} ({count:,})" for reason, count in reasons.items())
        raise UserError(f"of {len(prompts):,} questions none can be asked: {why}")
    return dataset.select(kept), reasons


STAGE = Stage(
    "grpo",
    encode,
    DogeGRPOTrainer,
    {
        "eval_reward": "held-out reward",
        "eval_accuracy": "held-out accuracy",
        "eval_ended": "answers that end",
        "eval_length": "tokens of an answer",
    },
)
