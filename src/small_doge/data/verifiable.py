"""Questions whose answers a program can verify, for GRPO: a prompt as messages, and what verifies a completion of it.

The shape is recognised by the columns, in this order, or named by ``format`` in the entry:

    messages    `messages`: {role, content}; the answer of the assistant at the end, if there is one, is left out, so
                that rows of `doge sft` serve as they are
    prompt      `prompt`: text, or a list of messages
    question    `question`: text (GSM8K)

Beside it stands what verifies: `answer`, an integer as a number or text (of GSM8K's answers what follows "####"), or
`tests`, Python statements as text or a list of texts (MBPP), or both. A row with neither, and one whose answer is no
integer, is dropped and counted, as is all that makes a conversation unfit.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import messages as shared
from .messages import CUT, Reader, Unfit

if TYPE_CHECKING:
    from datasets import Dataset

SHAPES = ("messages", "prompt", "question")
"""Names of the shapes; each is also the column that it is recognised by."""

CHECKS = ("answer", "tests")
"""The columns that can verify a completion."""

_INTEGER = re.compile(r"[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+")
# A sign belongs to a number unless something that can be subtracted from stands before it, as in 8-5.
_NUMBER = re.compile(r"((?<![\w)\]])[-+\u2212])?((?:[\w.,]*[0-9])[\w.,]*)")


def integer_of(text: str) -> str | None:
    """The last number of a text as a canonical integer ("-7", "1024"); None if there is none or it is no integer.

    "4.5", "1e5", "x12" and "12th" are no integers, and hide the ones before them: what is asked is the last number
    there is, not any that fits. "1,024" is one; full stops and commas behind it are not its own. Text and not int,
    because a completion may hold more digits than Python reads.
    """
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 - the last one
        pass
    if found is None:
        return None
    digits = found[2].strip("_").rstrip(".,")
    if not _INTEGER.fullmatch(digits):
        return None
    digits = digits.replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if found[1] in ("-", "\u2212") and digits != "0" else digits


def read_questions(specs: Any, split: str = "train", seed: int = 0) -> tuple[Dataset, dict[str, int]]:
    """Read and mix the questions that a recipe's ``data:`` names; entries, weights and errors as in
    `conversations.read_conversations`.

    Returns:
        A dataset with the columns ``prompt``, a list of {"role", "content"} that ends with the user, ``answer`` (a
        canonical integer as text, or None), ``tests`` (text or None) and ``source``; and how many rows were dropped or
        cut, by reason.
    """
    from datasets import Features, Value

    entries = shared.read_entries(specs)
    read = [shared.read_source(entry, split, _READER) for entry in entries]
    weights = [entry.get("weight") for entry in entries]
    dataset, dropped = shared.mix([part for part, _ in read], weights, [count for _, count in read], seed)
    features = dataset.features
    columns = Features(
        {
            **{name: features[name] for name in ("prompt", "source")},
            **{name: Value("string") for name in CHECKS},
        }
    )
    return dataset.map(_as_columns, remove_columns=["checks"], features=columns, desc="Reading questions"), dropped


def _as_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    checks = {check["role"]: check["content"] for check in row["checks"]}
    return {name: checks.get(name) for name in CHECKS}


# ---- rows as messages -----------------------------------------------------------------------------------------------


def _shape_of(columns: Sequence[str]) -> str | None:
    return next((shape for shape in SHAPES if shape in columns), None)


def _arrange(row: Mapping[str, Any], shape: str) -> dict[str, Any]:
    """The prompt, and beside it what verifies: pairs like messages, the column's name for the role."""
    value = row.get(shape)
    given = shared.messages_of([{"role": "user", "content": value}] if isinstance(value, str) else value)
    prompt = shared.in_turn(given)
    notes = [CUT + "an empty system message"] if len(prompt) < len(given) else []
    if prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if not prompt or prompt[-1]["role"] != "user":
        raise Unfit("its prompt does not end with the user")
    checks = [{"role": name, "content": text} for name, text in (_answer(row), _tests(row)) if text is not None]
    if not checks:
        raise Unfit("neither `answer` nor `tests` to verify a completion with")
    return {"prompt": prompt, "checks": checks, "notes": notes}


def _answer(row: Mapping[str, Any]) -> tuple[str, str | None]:
    value = row.get("answer")
    if value is None:
        return "answer", None
    if isinstance(value, str):
        stated = value.rpartition("####")[2].strip()
        integer = integer_of(stated) if _INTEGER.fullmatch(stated.lstrip("-+\u2212")) else None
    else:
        integer = str(value) if isinstance(value, int) and not isinstance(value, bool) else None
    if integer is None:
        raise Unfit("an answer that is no integer")
    return "answer", integer


def _tests(row: Mapping[str, Any]) -> tuple[str, str | None]:
    value = row.get("tests")
    if isinstance(value, list):
        value = "\n".join(shared.text_of(test) for test in value) or None
    if value is None:
        return "tests", None
    text = shared.text_of(value)
    try:
        holds = bool(ast.parse(text).body)
    except (SyntaxError, ValueError):
        raise Unfit("tests that are not Python") from None
    if not holds:
        raise Unfit("tests without a statement")
    return "tests", text


_READER = Reader("questions", SHAPES, ("prompt", "checks"), _shape_of, _arrange, __file__)
