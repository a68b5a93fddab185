"""What each model of a run says to the same held-out questions, and held-out figures by one rule for all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import artifacts
from ..data.rendering import require_chat
from ..data.stdlib_chat import CONVERSATIONS, PREFERENCES
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..models import load_model
from .likelihood_generate import Generator, Prompt

ANSWERS_FILE = "answers.json"
_ROWS_PER_BATCH = 32


@dataclass
class AnswersRecipe:
    """Which models answer, what they are asked, and where the answers go."""

    models: list[str] = field(metadata={"help": "model folders, such as those of pretrain, sft and dpo"})
    questions: str = field(metadata={"help": "folder of `doge questions`; its test side is asked"})
    output_dir: str = field(metadata={"help": "folder for answers.json"})
    rows: int = field(default=256, metadata={"help": "held-out conversations and pairs measured, spread evenly"})
    asked: int = field(default=128, metadata={"help": "questions that are answered, of these"})
    shown: int = field(default=6, metadata={"help": "answers kept to be read, of these"})
    max_new_tokens: int = field(default=128, metadata={"help": "tokens of an answer at most"})

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("`models` is empty, expected at least one folder")
        for name in ("rows", "asked", "shown", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least 1")


def answers(recipe: AnswersRecipe) -> Path:
    """Ask the models the held-out questions and measure them; returns the folder with ``answers.json``.

    Raises:
        UserError: if a model or the questions are missing, or the folder holds another run.
    """
    started = time.perf_counter()
    output_dir = Path(recipe.output_dir)
    settings = {n: v for n, v in asdict(recipe).items() if n not in ("models", "questions", "output_dir")}
    for name, folders, pattern in (
        ("models", recipe.models, "*.safetensors"),
        ("questions", [recipe.questions], "*/test.jsonl"),
    ):
        files = [sorted(Path(folder).glob(pattern)) for folder in folders]
        for folder, there in zip(folders, files, strict=True):
            if not there:
                raise UserError(f"`{name}`: {folder} holds no {pattern}")
        settings[f"{name}_sha256"] = [artifacts.sha256(*there) for there in files]
    if artifacts.is_finished(output_dir, "answers", settings):
        print(f"{output_dir} holds these answers already")
        return output_dir

    conversations = _spread(_rows(Path(recipe.questions, CONVERSATIONS, "test.jsonl")), recipe.rows)
    pairs = _rows(Path(recipe.questions, PREFERENCES, "test.jsonl"))
    twos = list(zip(pairs[::2], pairs[1::2], strict=False))  # siblings with each other's answer (data/stdlib_chat.py)
    if not twos:
        raise UserError(f"{recipe.questions} has fewer than two held-out pairs, expected some to match")
    pairs = [pair for two in _spread(twos, max(1, recipe.rows // 2)) for pair in two]
    asked = _spread(conversations, recipe.asked)
    figures, said = {}, {}
    for folder in recipe.models:
        name = Path(folder).name
        model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
        figures[name] = measure(model, tokenizer, conversations, pairs)
        questions = [row["messages"][0]["content"] for row in asked]
        said[name], ended = ask(model, tokenizer, questions, recipe.max_new_tokens)
        figures[name]["ended"] = sum(ended) / len(ended)
        print(
            f"{name}: loss of an answer's token {figures[name]['loss']:.3f}, ends its turn "
            f"{figures[name]['ended']:.0%}, preference accuracy {figures[name]['preference_accuracy']:.1%}, "
            f"answers matched {figures[name]['matched']:.1%}, "
            f"loss of a chosen answer's token {figures[name]['chosen_loss']:.3f}",
            flush=True,
        )
    shown = [
        {
            "question": asked[i]["messages"][0]["content"],
            "docstring": asked[i]["messages"][1]["content"],
            "answers": {name: texts[i] for name, texts in said.items()},
        }
        for i in _spread(range(len(asked)), recipe.shown)
    ]
    counts = {"conversations": len(conversations), "pairs": len(pairs), "asked": len(asked)}
    with artifacts.staged(output_dir) as partial:
        artifacts.write_json(partial / ANSWERS_FILE, {"figures": figures, "shown": shown, **counts})
        artifacts.finish(partial, "answers", settings, time.perf_counter() - started, **counts)
    print(f"wrote {output_dir} in {artifacts.duration(time.perf_counter() - started)}")
    return output_dir


def measure(model: Any, tokenizer: Any, conversations: list[dict], pairs: list[dict]) -> dict[str, float]:
    """Held-out figures of one model.

    ``loss`` and ``chosen_loss`` are nats for each token of the answers, end token included, over conversations and over
    the chosen side of pairs. A pair is right in ``preference_accuracy`` if the chosen answer has the higher
    log-probability for each of its tokens, so that the shorter one has no advantage. That asks much of a small model,
    since some answers are likelier than others whatever the question. ``matched`` asks only what belongs together: of
    two pairs in turn, which have each other's answers, whether the right ones are likelier than the exchanged ones.
    """
    renderer = require_chat(tokenizer, prompts=True)

    def spoken(question: str, answer: str) -> tuple[list[int], list[int]]:
        asked = [{"role": "user", "content": question}]
        prompt = renderer.prompts([asked])[0]
        reply = renderer.replies([[*asked, {"role": "assistant", "content": answer}]])[0]
        if not prompt or not reply:
            raise UserError(f"the chat template refuses the question {question!r}")
        return prompt, reply

    told = log_probs(model, [spoken(*(m["content"] for m in row["messages"])) for row in conversations])
    chosen, rejected = (
        log_probs(model, [spoken(pair["prompt"], pair[side]) for pair in pairs]) for side in ("chosen", "rejected")
    )
    right = sum(a / n > b / m for (a, n), (b, m) in zip(chosen, rejected, strict=True))
    better = [a - b for (a, _), (b, _) in zip(chosen, rejected, strict=True)]
    twos = [one + other for one, other in zip(better[::2], better[1::2], strict=False)]
    return {
        "loss": -sum(a for a, _ in told) / sum(n for _, n in told),
        "preference_accuracy": right / len(pairs),
        "matched": sum(two > 0 for two in twos) / len(twos),
        "chosen_loss": -sum(a for a, _ in chosen) / sum(n for _, n in chosen),
    }


@torch.no_grad()
def log_probs(model: Any, spoken: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, int]]:
    """Of each (prompt, reply) in tokens the reply's log-probability and its number of tokens."""
    found: dict[int, tuple[float, int]] = {}
    order = sorted(range(len(spoken)), key=lambda i: sum(map(len, spoken[i])))
    for begin in range(0, len(order), _ROWS_PER_BATCH):
        batch = order[begin : begin + _ROWS_PER_BATCH]
        longest = max(sum(map(len, spoken[i])) for i in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.int64)  # padding comes last, and causality hides it
        for row, i in enumerate(batch):
            whole = [*spoken[i][0], *spoken[i][1]]
            ids[row, : len(whole)] = torch.tensor(whole)
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T − 1)
        for row, i in enumerate(batch):
            first, count = len(spoken[i][0]) - 1, len(spoken[i][1])
            found[i] = (-float(losses[row, first : first + count].double().sum()), count)
    return [found[i] for i in range(len(spoken))]


def ask(model: Any, tokenizer: Any, questions: list[str], max_new_tokens: int) -> tuple[list[str], list[bool]]:
    """The likeliest answer to each question, token by token, and whether it came to its end token."""
    renderer = require_chat(tokenizer, prompts=True)
    prompts = renderer.prompts([[{"role": "user", "content": question}] for question in questions])
    waiting = [Prompt(i, ids) for i, ids in enumerate(prompts) if ids]
    texts, ended = [""] * len(questions), [False] * len(questions)
    generator = Generator(model, tokenizer, None, tokens_per_batch=1 << 14)
    with torch.inference_mode():
        for i, ids in generator.run(waiting, [], max_new_tokens, {"do_sample": False}):
            ended[i] = bool(ids) and ids[-1] == tokenizer.eos_token_id
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts, ended


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, expected a folder of `doge questions`") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON lines: {error}") from None
    if not rows:
        raise UserError(f"{path} is empty, expected held-out rows")
    return rows


def _spread(rows: Sequence[Any], count: int) -> list[Any]:
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
