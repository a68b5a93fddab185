"""Questions of addition and subtraction, posed in words, for `doge sft` and `doge grpo`.

    What is 17 plus 25?   →   42

A problem, such as 17 + 25, is held out by a hash of its two numbers, whichever comes first, whatever wording asks for
it and whatever else is written: no problem is on both sides, nor the same sum with its numbers swapped. Differences are
never below 0. Rows have `messages` with the answer for `doge sft`, and `answer`, which verifies completions in
`doge grpo`. Some training messages can be given a wrong answer, for a model that has something left to learn by trying.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import artifacts
from ..errors import UserError
from ..recipe import described

STAGE = "arithmetic"
WORDINGS = {
    "+": (
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "Ann has {a} apples and gets {b} more. How many has she now?",
    ),
    "-": (
        "What is {a} minus {b}?",
        "Take {b} from {a}.",
        "What is left of {a} without {b}?",
        "Ann has {a} apples and gives away {b}. How many has she now?",
    ),
}


# ruff: noqa: RUF009 - described makes dataclass fields
@dataclass
class ArithmeticRecipe:
    """Which questions are asked, how many, and where they go."""

    output_dir: str = described("folder for train.jsonl and test.jsonl")
    train_rows: int = described("questions to learn from", 8000)
    test_rows: int = described("questions held out", 256)
    largest: int = described("largest number in a question; 99 is one and two digits", 99)
    operations: list[str] = described("what is asked: + and -", ["+", "-"])
    validation_fraction: float = described("share of the problems held out", 0.1)
    wrong_fraction: float = described("share of train.jsonl's messages with a wrong answer; `answer` is right", 0.0)
    seed: int = described("seed of the choice, of what is held out and of what is wrong", 233)

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("`output_dir` is not set, expected a folder")
        for name, least in (("train_rows", 1), ("test_rows", 1), ("largest", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {least}")
        if (
            not self.operations
            or not set(self.operations) <= set(WORDINGS)
            or len(set(self.operations)) < len(self.operations)
        ):
            raise ValueError(f"`operations` is {self.operations}, expected +, - or both")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` is {self.validation_fraction}, expected between 0 and 1")
        if not 0 <= self.wrong_fraction <= 1:
            raise ValueError(f"`wrong_fraction` is {self.wrong_fraction}, expected 0 to 1")


def write_arithmetic(recipe: ArithmeticRecipe) -> Path:
    """Write train.jsonl and test.jsonl; returns their folder. A folder that holds them is left as it is.

    Raises:
        UserError: if there are fewer questions than asked for, or the folder holds something else.
    """
    started, output_dir = time.perf_counter(), Path(recipe.output_dir)
    settings = {name: value for name, value in asdict(recipe).items() if name != "output_dir"}
    if artifacts.is_finished(output_dir, STAGE, settings):
        print(f"{output_dir} holds these questions already")
        return output_dir
    train, test = rows(recipe)
    with artifacts.staged(output_dir) as partial:
        for name, side in (("train", train), ("test", test)):
            artifacts.write_text(partial / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in side))
        artifacts.finish(partial, STAGE, settings, time.perf_counter() - started, train=len(train), test=len(test))
    print(f"wrote {output_dir}: {len(train):,} questions to learn from, {len(test):,} held out")
    return output_dir


def rows(recipe: ArithmeticRecipe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows and held-out rows with ``messages`` and ``answer``, the same ones for the same recipe.

    A question, its wording included, is on a side once at most.

    Raises:
        UserError: if there are fewer questions than asked for.
    """
    sides: tuple[list[tuple[str, int]], ...] = ([], [])
    for operation in recipe.operations:
        for a in range(recipe.largest + 1):
            for b in range(recipe.largest + 1 if operation == "+" else a + 1):
                side = sides[held_out(a, b, recipe)]
                answer = a + b if operation == "+" else a - b
                side += [(wording.format(a=a, b=b), answer) for wording in WORDINGS[operation]]
    rng = random.Random(recipe.seed)
    chosen = []
    for name, side, size in zip(("train", "test"), sides, (recipe.train_rows, recipe.test_rows), strict=True):
        if size > len(side):
            raise UserError(f"`{name}_rows` is {size:,}, expected at most {len(side):,}: there are no more questions")
        chosen.append(rng.sample(side, size))
    train = [_row(q, n, _wrong(n, rng) if rng.random() < recipe.wrong_fraction else n) for q, n in chosen[0]]
    return train, [_row(question, n, n) for question, n in chosen[1]]


def held_out(a: int, b: int, recipe: ArithmeticRecipe) -> bool:
    """Whether the problems of two numbers are held out: by a hash, so that a larger range moves none."""
    text = f"{recipe.seed} {min(a, b)} {max(a, b)}"
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return share < recipe.validation_fraction


def _wrong(answer: int, rng: random.Random) -> int:
    """A wrong answer that is near: off by one or by ten."""
    return rng.choice([n for n in (answer - 10, answer - 1, answer + 1, answer + 10) if n >= 0])


def _row(question: str, answer: int, said: int) -> dict[str, Any]:
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": str(said)}]
    return {"messages": pair, "answer": answer}
