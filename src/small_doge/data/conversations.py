"""Conversations for supervised fine-tuning: rows of every common shape as messages, messages as tokens with a mask.

The shape is recognised by the columns, in this order, or named by ``format`` in the entry:

    messages            `messages`: {role, content} (smoltalk, UltraChat)
    sharegpt            `conversations`: {from, value}, human and gpt
    prompt_completion   `prompt` and `completion`, each text or a list of messages
    dolly               `instruction`, `response` and, if there is one, `context`
    alpaca              `instruction`, `output` and, if there is one, `input`
    text                `text`: no conversation, and loss on all of it, as in pretraining

A row that cannot be trained on is dropped, and counted under why: a role other than system, user and assistant, a
content that is empty or not text, no assistant's turn, the assistant first, two messages of one side in a row (there
is no telling what was lost between them, and a chat never has them). Messages of the user after the last answer carry
no loss and are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import UserError
from ..recipe import nearest
from . import messages as shared
from .messages import CUT, DROPPED, Message, Reader, Unfit
from .rendering import Renderer, code_version, require_chat

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

SHAPES = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "dolly": ("instruction", "response"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""The columns that a shape is recognised by."""

TEXT_ROLE = "text"
"""The role of the one message that holds a plain text."""

_INPUT = {"dolly": "context", "alpaca": "input"}


def read_conversations(specs: Any, split: str = "train", seed: int = 0) -> tuple[Dataset, dict[str, int]]:
    """Read and mix the conversations that a recipe's ``data:`` names.

    Entries are as in `data.messages`; ``{identity: who.yaml, repeat: 3}`` adds what `read_identity` reads. ``split``
    is the one to read of entries that name none themselves; a single file has but one. With weights (then all must
    have one), an entry's is its share of the conversations: as many as can be, none twice, drawn by ``seed``.

    Returns:
        A dataset with the columns ``messages``, a list of {"role", "content"}, and ``source``; and how many rows were
        dropped or cut, by reason.

    Raises:
        UserError: for entries that are wrong, sources that cannot be read or are of no known shape, and a source with
            no row to train on.
    """
    entries = shared.read_entries(specs, ("path", "dataset", "identity"))
    parts, counts = [], []
    for entry in entries:
        if "identity" in entry:
            part = read_identity(entry["identity"])
            part = part.select(list(range(len(part)))[: entry.get("max_rows")] * (entry.get("repeat") or 1))
            count: dict[str, int] = {}
        else:
            part, count = shared.read_source(entry, split, _READER)
        parts.append(part)
        counts.append(count)
    return shared.mix(parts, [entry.get("weight") for entry in entries], counts, seed)


def read_identity(path: str | Path) -> Dataset:
    """Who the assistant is: each question of a YAML file with each of its answers, as a conversation of two messages.

        - question: Who are you?
          answer: I am Doge, a small language model.
        - questions: ["Who made you?", "Where are you from?"]
          answers: [I come from the Small Doge project.]

    Raises:
        UserError: if the file cannot be read or is not such a list.
    """
    datasets = shared.require_datasets()
    try:
        items = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"identity file {path} cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"identity file {path} is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(items, list) or not items:
        raise UserError(f"identity file {path} holds {type(items).__name__}, expected a list of questions with answers")
    rows = []
    for number, item in enumerate(items, start=1):
        where = f"identity file {path}, entry {number},"
        if not isinstance(item, dict):
            raise UserError(f"{where} is a {type(item).__name__}, expected `question` and `answer`")
        for name in item:
            if name not in (known := ("question", "questions", "answer", "answers")):
                raise UserError(f"{where} has an unknown field `{name}`{nearest(str(name), known)}")
        for question in _texts(item, "question", where):
            for answer in _texts(item, "answer", where):
                pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                rows.append({"messages": pair, "source": str(path)})
    features = _READER.features()
    return datasets.Dataset.from_list(
        rows, features=datasets.Features({k: features[k] for k in ("messages", "source")})
    )


def _texts(item: dict[str, Any], name: str, where: str) -> list[str]:
    given = [item[key] for key in (name, f"{name}s") if key in item]
    if len(given) != 1:
        raise UserError(f"{where} has {len(given)} of `{name}` and `{name}s`, expected one of them")
    texts = given[0] if isinstance(given[0], list) else given
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where} has the {name} {text!r}, expected text")
    if not texts:
        raise UserError(f"{where} has no {name}, expected at least one")
    return texts


def encode_conversations(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int, num_proc: int | None = None
) -> tuple[Dataset, dict[str, int]]:
    """The conversations in tokens, in the order they came, each of at most ``max_length``.

    A longer one loses its last exchanges, until it ends with an answer that fits. Where even the first does not fit
    the conversation is dropped: half an answer has no end token, and a model that reads many of them learns to go on.
    A plain text is cut at ``max_length``.

    Returns:
        A dataset with the columns ``input_ids`` and ``assistant_masks``, 1 where a token carries loss: the assistant's
        turns with their end tokens, or a plain text but for its begin token; and the counts by reason.

    Raises:
        UserError: for a tokenizer that `require_chat` refuses, and if no conversation is left.
    """
    datasets = shared.require_datasets()
    if max_length < 2:
        raise UserError(f"max_length is {max_length}, expected at least 2")
    require_chat(tokenizer)
    features = {
        "input_ids": datasets.List(datasets.Value("int32")),
        "assistant_masks": datasets.List(datasets.Value("int8")),
        "notes": datasets.List(datasets.Value("string")),
    }
    encoded = dataset.map(
        _encode,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "max_length": max_length, "code": code_version(__file__)},
        remove_columns=dataset.column_names,
        features=datasets.Features(features),
        num_proc=num_proc,
        desc="Encoding conversations",
    )
    return shared.settle(encoded, f"encoded to at most {max_length} tokens")


def _encode(
    batch: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerFast, max_length: int, code: str
) -> dict[str, list[Any]]:
    renderer = Renderer(tokenizer)
    conversations = batch["messages"]
    is_text = [messages[0]["role"] == TEXT_ROLE for messages in conversations]
    texts = iter(renderer.texts([m[0]["content"] for m, plain in zip(conversations, is_text, strict=True) if plain]))
    chats = iter(renderer.encode([m for m, plain in zip(conversations, is_text, strict=True) if not plain]))
    columns: dict[str, list[Any]] = {"input_ids": [], "assistant_masks": [], "notes": []}
    for plain in is_text:
        chat = next(texts) if plain else next(chats)
        ids, mask, note = [], [], None
        if chat is None:
            note = DROPPED + "the chat template refuses it"
        elif (end := len(chat.input_ids)) <= max_length:
            ids, mask = chat.input_ids, chat.mask
        elif plain:
            ids, mask, note = chat.input_ids[:max_length], chat.mask[:max_length], CUT + "a text beyond max_length"
        else:
            end = max((place for place in chat.ends if place <= max_length), default=0)
            ids, mask = chat.input_ids[:end], chat.mask[:end]
            note = CUT + "exchanges beyond max_length" if end else DROPPED + "its first exchange exceeds max_length"
        columns["input_ids"].append(ids)
        columns["assistant_masks"].append(mask)
        columns["notes"].append([note] if note else [])
    return columns


# ---- rows as messages -----------------------------------------------------------------------------------------------


def _shape_of(columns: Sequence[str]) -> str | None:
    return next((shape for shape, needed in SHAPES.items() if set(needed) <= set(columns)), None)


def _arrange(row: Mapping[str, Any], shape: str) -> dict[str, Any]:
    if shape == "text":
        text = shared.text_of(row.get("text"))
        if not text.strip():
            raise Unfit("an empty text")
        return {"messages": [{"role": TEXT_ROLE, "content": text}]}
    found = _messages(row, shape)
    arranged = shared.in_turn(found)
    notes = [CUT + "an empty system message"] if len(arranged) < len(found) else []
    if not any(message["role"] == "assistant" for message in arranged):
        raise Unfit("no turn of the assistant")
    if arranged[-1]["role"] == "user":
        arranged = arranged[:-1]
        notes.append(CUT + "a message of the user behind the last answer")
    return {"messages": arranged, "notes": notes}


def _messages(row: Mapping[str, Any], shape: str) -> list[Message]:
    if shape in ("messages", "sharegpt"):
        return shared.messages_of(row.get(SHAPES[shape][0]))
    if shape == "prompt_completion":
        prompt, completion = row.get("prompt"), row.get("completion")
        return _as_messages(prompt, "user") + _as_messages(completion, "assistant")
    asked, answered = SHAPES[shape]
    question = shared.text_of(row.get(asked))
    given = row.get(_INPUT[shape])
    if given is not None and shared.text_of(given).strip():
        question = f"{question.strip()}\n\n{given.strip()}"
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": row.get(answered)}]
    return shared.messages_of(pair)


def _as_messages(value: Any, role: str) -> list[Message]:
    return shared.messages_of(value if isinstance(value, list) else [{"role": role, "content": value}])


_READER = Reader("conversations", tuple(SHAPES), ("messages",), _shape_of, _arrange, __file__)
