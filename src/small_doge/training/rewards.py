"""Rewards that a program verifies, for GRPO: each takes completions and the columns of their rows, and pays 0 or 1.

    arithmetic   the last number of the completion is the row's `answer`, exactly (``data.verifiable.integer_of``)
    code         the last ```python block of the completion passes the row's `tests` (``training.bounded``)
    format       the completion is an integer, perhaps with a full stop, and nothing else: a small help, such as
                 ``rewards: [arithmetic, format]`` with ``reward_weights: [1.0, 0.1]``. It looks at no answer, so on
                 its own it teaches to say any number

A verified reward can still be earned by other means than those meant. A completion that ends in every number in turn
is paid for its last only; but tests that compare with == are passed by an object that equals everything, and tests
that are few by a table of their answers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..data.verifiable import integer_of
from ..errors import UserError
from ..recipe import nearest
from .bounded import Bounds, passes, require_bounds

_BOUNDS = Bounds()
_BLOCK = re.compile(r"^```(?:python|py|python3)?[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL | re.IGNORECASE)
_NOTHING_ELSE = re.compile(r"\s*[-+\u2212]?[0-9][0-9,]*\.?\s*")


@dataclass(frozen=True)
class Reward:
    """``column``: what a row must have to be judged, None if nothing; ``score(completions, values)``: 0 or 1."""

    name: str
    column: str | None
    score: Callable[[Sequence[str], Sequence[Any]], list[float]]

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """TRL's call: completions as text or message lists, columns as lists; None for rows without the column."""
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        values = columns.get(self.column) if self.column else None
        if self.column is None:
            return list(self.score(texts, texts))
        values = values or [None] * len(texts)
        judged = [i for i, value in enumerate(values) if value is not None]
        scores = self.score([texts[i] for i in judged], [values[i] for i in judged])
        paid: list[float | None] = [None] * len(texts)
        for i, score in zip(judged, scores, strict=True):
            paid[i] = score
        return paid

    @property
    def __name__(self) -> str:  # what TRL calls it in the log
        return self.name


def arithmetic(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 where the last number of a completion is the answer, a canonical integer as text."""
    return [float(integer_of(text) == answer) for text, answer in zip(completions, answers, strict=True)]


def plain_integer(completions: Sequence[str], _: Sequence[Any]) -> list[float]:
    """1 where the whole completion is an integer."""
    return [float(bool(_NOTHING_ELSE.fullmatch(t)) and integer_of(t) is not None) for t in completions]


def code(completions: Sequence[str], tests: Sequence[str], bounds: Bounds = _BOUNDS) -> list[float]:
    """1 where the last block of code of a completion passes its tests; 0 without a block that is closed."""
    require_bounds()

    def one(pair: tuple[str, str]) -> float:
        block = code_block(pair[0])
        return float(block is not None and passes(block, pair[1], bounds))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, zip(completions, tests, strict=True)))


def code_block(completion: str) -> str | None:
    """The last closed block between ``` and ```, named python or not at all; None if there is none."""
    blocks = _BLOCK.findall(completion)
    return blocks[-1] if blocks else None


REWARDS = {
    "arithmetic": Reward("arithmetic", "answer", arithmetic),
    "code": Reward("code", "tests", code),
    "format": Reward("format", None, plain_integer),
}


def rewards_of(names: Sequence[str]) -> list[Reward]:
    """The rewards of a recipe.

    Raises:
        UserError: for an unknown name, a list without one that verifies, and `code` where there are no bounds for it.
    """
    for name in names:
        if name not in REWARDS:
            raise UserError(
                f"`rewards` names {name!r}{nearest(str(name), list(REWARDS))}, expected some of {', '.join(REWARDS)}"
            )
    rewards = [REWARDS[name] for name in names]
    if not any(reward.column for reward in rewards) or len(set(names)) < len(names):
        raise UserError(f"`rewards` is {list(names)}, expected arithmetic or code among them, and none twice")
    if "code" in names:
        require_bounds()
    return rewards
