"""Texts that follow prompts, many at a time, each until a string of its own end.

transformers' ``generate`` computes; for our models it makes the cache of constant size. In its batches all rows wait
for the last, and a model may ramble where most rows end after a few tokens. So it is run for a few tokens first, and
what has not ended goes on in batches of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

ROUNDS = (16, 64)  # tokens after which a prompt that has not ended changes its batch
PROMPTS_PER_BATCH = 256
LOOKBACK = 2  # tokens more than a stop string has, since the model may write it in other tokens


@dataclass
class Prompt:
    """``ids`` to continue, at least one; ``generated`` follow them already."""

    index: int
    ids: list[int]
    generated: list[int] = field(default_factory=list)


class Generator:
    """``generate`` of one model for prompts of different lengths."""

    def __init__(self, model: Any, tokenizer: Any, autocast: torch.dtype | None, tokens_per_batch: int):
        self.model, self.tokenizer, self.autocast = model, tokenizer, autocast
        self.tokens_per_batch = tokens_per_batch

    def run(
        self, prompts: list[Prompt], until: list[str], max_tokens: int, options: dict[str, Any]
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (index, the tokens that follow) of each prompt; the last tokens may hold one of ``until``.

        Args:
            until: a prompt ends with the token that completes one of these strings, if not with the model's own end
                token or after ``max_tokens``.
            options: of transformers' ``generate``, normalised by the harness.
        """
        options = dict(options)
        temperature, sampled = options.get("temperature", 0.0), options.get("do_sample")
        if not sampled and not temperature:
            options.pop("temperature", None)
            options["do_sample"] = False
        greedy = not (options.keys() - {"do_sample"}) and not options["do_sample"]
        # What is sampled, or looks at where the prompt ended, is not the same in parts.
        rounds = [*(n for n in ROUNDS if n < max_tokens), max_tokens] if greedy else [max_tokens]
        same: dict[tuple[int, ...], list[int]] = {}
        waiting = []
        for prompt in prompts:
            twins = same.setdefault(tuple(prompt.ids), []) if greedy else []
            twins.append(prompt.index)
            if len(twins) == 1:
                waiting.append(prompt)
        for end in rounds:
            unfinished = []
            for batch in self._batches(waiting, end):
                ended = self._continue(batch, until, end, options)
                for prompt, has_ended in zip(batch, ended, strict=True):
                    if has_ended or end == max_tokens:
                        for index in same[tuple(prompt.ids)] if greedy else [prompt.index]:
                            yield index, prompt.generated
                    else:
                        unfinished.append(prompt)
            waiting = unfinished

    def _batches(self, prompts: list[Prompt], end: int) -> Iterator[list[Prompt]]:
        """The longest first, of like length; what is generated counts as computed."""
        waiting = sorted(prompts, key=lambda prompt: -len(prompt.ids))
        while waiting:
            size = max(1, min(PROMPTS_PER_BATCH, self.tokens_per_batch // (len(waiting[0].ids) + end)))
            yield waiting[:size]
            waiting = waiting[size:]

    def _continue(self, batch: list[Prompt], until: list[str], end: int, options: dict[str, Any]) -> list[bool]:
        """Generate until each has ended or has ``end`` tokens; returns which have ended."""
        done = len(batch[0].generated)  # the same for all: they have gone through the same rounds
        inputs = [prompt.ids + prompt.generated for prompt in batch]
        longest = max(map(len, inputs))
        ids = torch.full((len(batch), longest), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(inputs):
            ids[row, longest - len(tokens) :] = torch.tensor(tokens)
            mask[row, longest - len(tokens) :] = 1
        device = self.model.device
        stop = _StopStrings(self.tokenizer, until, longest - done, len(batch))
        precision: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.autocast is not None:
            precision = torch.autocast(device.type, dtype=self.autocast)
        with precision:
            out = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=end - done,
                stopping_criteria=StoppingCriteriaList([stop]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **options,
            )
        ends = self._end_tokens()
        ended = []
        for row, (prompt, tokens) in enumerate(zip(batch, out[:, longest - done :].tolist(), strict=True)):
            if stop.length[row] is not None:
                tokens = tokens[: stop.length[row]]
            at = next((i for i, token in enumerate(tokens) if token in ends), None)
            prompt.generated = tokens if at is None else tokens[: at + 1]
            ended.append(at is not None or stop.length[row] is not None)
        return ended

    def _end_tokens(self) -> set[int]:
        """Tokens after which ``generate`` itself ends a text."""
        ids = self.model.generation_config.eos_token_id
        return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


class _StopStrings(StoppingCriteria):
    """Ends each row with the token that completes one of some strings. HFLM's own waits for all rows."""

    def __init__(self, tokenizer: Any, until: list[str], begin: int, rows: int):
        self.tokenizer, self.until, self.begin = tokenizer, [string for string in until if string], begin
        lengths = [len(tokenizer.encode(string, add_special_tokens=False)) for string in self.until]
        self.lookback = max(lengths, default=0) + LOOKBACK
        self.length: list[int | None] = [None] * rows  # tokens with which a row has ended, from ``begin`` on

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        running = [row for row, length in enumerate(self.length) if length is None]
        recent = input_ids[running, self.begin :][:, -self.lookback :]
        for row, text in zip(running, self.tokenizer.batch_decode(recent), strict=True):
            if any(string in text for string in self.until):
                self.length[row] = input_ids.shape[1] - self.begin
        return torch.tensor([length is not None for length in self.length], device=input_ids.device)
