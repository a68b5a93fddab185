"""Preferences for DPO: a prompt, the reply that was chosen and the one that was rejected, as messages and as tokens.

The shape is recognised by the columns, in this order, or named by ``format`` in the entry:

    pair           `prompt`, `chosen`, `rejected`: text or lists of messages, in any mixture; the lists may repeat the
                   prompt (ultrafeedback_binarized, where `prompt` is the text of the user's message in them)
    transcript     `chosen` and `rejected` alone, which share all but the last turn: text of "\\n\\nHuman: …" and
                   "\\n\\nAssistant: …" turns (Anthropic HH), or lists of messages

Published code lets each reply through the chat template as a conversation of its own, which puts a begin token and a
system block inside it. Here a reply is its tokens and its end token, and the prompt ends in the generation prompt: the
two are the whole conversation as the template writes it.

A pair is dropped, and counted under why, if its prompts differ, its replies are the same or empty, or its scores, where
there are some, are equal or speak against the choice; and for all that makes a conversation unfit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import messages as shared
from .messages import CUT, DROPPED, Message, Reader, Unfit
from .rendering import Renderer, code_version, require_chat

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

SHAPES = {"pair": ("prompt", "chosen", "rejected"), "transcript": ("chosen", "rejected")}
"""The columns that a shape is recognised by."""

_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"))
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def read_preferences(specs: Any, split: str = "train", seed: int = 0) -> tuple[Dataset, dict[str, int]]:
    """Read and mix the preferences that a recipe's ``data:`` names; entries, weights and errors as in
    `conversations.read_conversations`.

    Returns:
        A dataset with the columns ``prompt``, ``chosen`` and ``rejected``, each a list of {"role", "content"}, of
        which the last two hold the reply alone, and ``source``; and how many pairs were dropped or cut, by reason.
    """
    entries = shared.read_entries(specs)
    read = [shared.read_source(entry, split, _READER) for entry in entries]
    weights = [entry.get("weight") for entry in entries]
    return shared.mix([part for part, _ in read], weights, [count for _, count in read], seed)


def encode_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int, num_proc: int | None = None
) -> tuple[Dataset, dict[str, int]]:
    """The preferences in tokens, in the order they came, prompt and longer reply together at most ``max_length``.

    A prompt that is too long loses its oldest exchanges, as a chat does whose history outgrows the context; its system
    message stays. Where the last message of the user leaves no room for the replies the pair is dropped: the loss
    compares whole replies.

    Returns:
        A dataset with the columns ``prompt_ids``, which ends in the generation prompt, ``chosen_ids`` and
        ``rejected_ids``, each a reply and its end token; and the counts by reason.

    Raises:
        UserError: for a tokenizer that `require_chat` refuses, and if no pair is left.
    """
    datasets = shared.require_datasets()
    if max_length < 2:
        raise UserError(f"max_length is {max_length}, expected at least 2")
    require_chat(tokenizer, prompts=True)
    ids = datasets.List(datasets.Value("int32"))
    features = {**dict.fromkeys(_COLUMNS, ids), "notes": datasets.List(datasets.Value("string"))}
    encoded = dataset.map(
        _encode,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "code": code_version(__file__)},
        remove_columns=dataset.column_names,
        features=datasets.Features(features),
        num_proc=num_proc,
        desc="Encoding preferences",
    )
    return shared.settle(encoded, f"encoded to at most {max_length} tokens")


_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def _encode(
    batch: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerFast, max_length: int, code: str
) -> dict[str, list[Any]]:
    renderer = Renderer(tokenizer)
    prompts = renderer.prompts(batch["prompt"])
    replies = [
        renderer.replies([prompt + reply for prompt, reply in zip(batch["prompt"], batch[side], strict=True)])
        for side in ("chosen", "rejected")
    ]
    columns: dict[str, list[Any]] = {name: [] for name in (*_COLUMNS, "notes")}
    for messages, prompt, chosen, rejected in zip(batch["prompt"], prompts, *replies, strict=True):
        note = None
        if prompt is None or chosen is None or rejected is None:
            note = DROPPED + "the chat template refuses it"
        elif chosen == rejected:
            note = DROPPED + "its replies are the same"
        else:
            room = max_length - max(len(chosen), len(rejected))
            while prompt is not None and len(prompt) > room:
                messages, note = _without_oldest(messages), CUT + "exchanges of the prompt beyond max_length"
                prompt = renderer.prompts([messages])[0] if messages else None
            if prompt is None:
                note = DROPPED + "its last exchange exceeds max_length"
        kept = (prompt, chosen, rejected) if note is None or note.startswith(CUT) else ([], [], [])
        for name, value in zip(_COLUMNS, kept, strict=True):
            columns[name].append(value)
        columns["notes"].append([note] if note else [])
    return columns


def _without_oldest(messages: list[Message]) -> list[Message] | None:
    """A prompt without its first message of the user and the answer to that; None if there is no other."""
    first = 1 if messages[0]["role"] == "system" else 0
    shorter = messages[:first] + messages[first + 2 :]
    return shorter if len(shorter) > first else None


# ---- rows as messages -----------------------------------------------------------------------------------------------


def _shape_of(columns: Sequence[str]) -> str | None:
    return next((shape for shape, needed in SHAPES.items() if set(needed) <= set(columns)), None)


def _arrange(row: Mapping[str, Any], shape: str) -> dict[str, Any]:
    prompt = row.get("prompt") if shape == "pair" else None
    if shape == "pair" and prompt is None:
        raise Unfit("no prompt")
    one, chosen = _split(prompt, row.get("chosen"))
    other, rejected = _split(prompt, row.get("rejected"))
    if one != other:
        raise Unfit("its prompts differ")
    if not chosen.strip() or not rejected.strip():
        raise Unfit("an empty reply")
    if chosen.strip() == rejected.strip():
        raise Unfit("its replies are the same")
    _check_scores(row)
    arranged = shared.in_turn(one)
    if not arranged or arranged[-1]["role"] != "user":
        raise Unfit("its prompt does not end with the user")
    notes = [CUT + "an empty system message"] if len(arranged) < len(one) else []
    sides = {"chosen": chosen, "rejected": rejected}
    replies = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": arranged, **replies, "notes": notes}


def _split(prompt: Any, side: Any) -> tuple[list[Message], str]:
    """The messages before the reply, and the reply, of one side of a row.

    The reply is the last message; blank, it is let through for the caller to name.
    """
    before = None if prompt is None else _as_prompt(prompt)
    if isinstance(side, str):
        text = shared.text_of(side)
        if before is not None and not _is_transcript(text):
            return before, text
        side = _transcript(text)
    if not isinstance(side, list) or not side:
        raise Unfit("no reply, as text or a list of messages")
    if not isinstance(side[-1], Mapping):
        raise Unfit("a message that is not a mapping")
    last = dict(side[-1])
    reply = shared.text_of(last.get("content") if last.get("content") is not None else last.get("value"))
    named = {key: last.get(key) for key in ("role", "from")}
    if shared.messages_of([{**named, "content": reply if reply.strip() else "-"}])[0]["role"] != "assistant":
        raise Unfit("a reply that is not the assistant's")
    history = shared.messages_of(side[:-1]) if side[:-1] else []
    if before is None:
        return history, reply
    if not history:
        return before, reply
    if isinstance(prompt, str) and len(before) == 1:
        # ultrafeedback_binarized: the prompt is what the user says in the messages, which may begin with the system.
        said = [message["content"].strip() for message in history if message["role"] == "user"]
        if before[0]["content"].strip() not in said:
            raise Unfit("a prompt that its messages do not hold")
        return history, reply
    if history != before:
        raise Unfit("a prompt that its messages do not hold")
    return before, reply


def _as_prompt(prompt: Any) -> list[Message]:
    if not isinstance(prompt, str):
        return shared.messages_of(prompt)
    if _is_transcript(prompt):
        messages = _transcript(prompt)
        # "…\n\nAssistant:" asks for the reply that the sides hold.
        return shared.messages_of(messages[:-1] if not messages[-1]["content"] else messages)
    return shared.messages_of([{"role": "user", "content": prompt}])


def _is_transcript(text: str) -> bool:
    found = _SPEAKER.match(text)
    return found is not None and found[1] == "Human" and "\n\nAssistant:" in text


def _transcript(text: str) -> list[Message]:
    """Anthropic's transcripts: turns that each begin with "Human:" or "Assistant:" behind a blank line."""
    parts = _SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise Unfit("a transcript that does not begin with Human: or Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": said.strip()} for name, said in zip(parts[1::2], parts[2::2], strict=True)]


def _check_scores(row: Mapping[str, Any]) -> None:
    for names in _SCORES:
        chosen, rejected = (row.get(name) for name in names)
        numbers = [s for s in (chosen, rejected) if isinstance(s, (int, float)) and math.isfinite(s)]
        if len(numbers) == 2:
            if numbers[0] == numbers[1]:
                raise Unfit("a tie: its scores are equal")
            if numbers[0] < numbers[1]:
                raise Unfit("the rejected reply has the higher score")


_READER = Reader("preferences", tuple(SHAPES), ("prompt", "chosen", "rejected"), _shape_of, _arrange, __file__)
