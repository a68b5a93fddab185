"""The suites: tasks of the evaluation harness, what the table shows of each, what columns its rows have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..recipe import nearest


@dataclass(frozen=True)
class SuiteTask:
    """A task of lm-evaluation-harness and what we must know about it; prompts and scoring stay the harness's own.

    ``source`` is the harness's own file below its folder of tasks. ``evaluated`` and ``examples`` are the splits that
    hold the questions and the few-shot examples (None: the task has none), and ``columns`` what their rows must have.
    """

    name: str
    title: str
    metric: str
    source: str
    evaluated: str
    examples: str | None
    columns: tuple[str, ...]


_ARC = ("question", "choices.text", "choices.label", "answerKey")
TASKS = {
    task.name: task
    for task in (
        SuiteTask("mmlu", "MMLU", "acc", "mmlu/default/_mmlu.yaml", "test", "dev", ("question", "choices", "answer")),
        SuiteTask(
            "triviaqa",
            "TriviaQA",
            "exact_match",
            "triviaqa/default.yaml",
            "validation",
            "train",
            ("question", "answer.aliases"),
        ),
        SuiteTask("arc_easy", "ARC-E", "acc_norm", "arc/arc_easy.yaml", "test", "train", _ARC),
        SuiteTask("arc_challenge", "ARC-C", "acc_norm", "arc/arc_challenge.yaml", "test", "train", _ARC),
        SuiteTask(
            "piqa", "PIQA", "acc_norm", "piqa/piqa.yaml", "validation", "train", ("goal", "sol1", "sol2", "label")
        ),
        SuiteTask(
            "hellaswag",
            "HellaSwag",
            "acc_norm",
            "hellaswag/hellaswag.yaml",
            "validation",
            "train",
            ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        ),
        SuiteTask(
            "openbookqa",
            "OBQA",
            "acc_norm",
            "openbookqa/openbookqa.yaml",
            "test",
            "train",
            ("question_stem", "choices.text", "choices.label", "answerKey"),
        ),
        SuiteTask(
            "winogrande",
            "Winogrande",
            "acc",
            "winogrande/default.yaml",
            "validation",
            "train",
            ("sentence", "option1", "option2", "answer"),
        ),
        SuiteTask(
            "ifeval",
            "IFEval",
            "prompt_level_strict_acc",
            "ifeval/ifeval.yaml",
            "train",
            None,
            ("key", "prompt", "instruction_id_list", "kwargs"),
        ),
    )
}


@dataclass(frozen=True)
class Suite:
    """Tasks that are run together: with how many examples, and whether as a chat."""

    name: str
    tasks: tuple[str, ...]
    num_fewshot: int
    chat: bool


_BASE = ("mmlu", "triviaqa", "arc_easy", "arc_challenge", "piqa", "hellaswag", "openbookqa", "winogrande")
SUITES = {
    suite.name: suite
    for suite in (Suite("doge-base", _BASE, 5, False), Suite("doge-instruct", ("ifeval", *_BASE), 5, True))
}

# Five-shot, as published with the Doge models, whose scripts ran lighteval: its prompts and its choice of metric are
# not the harness's, so a point of difference is not a point of quality.
PUBLISHED = {
    name: dict(zip(_BASE, scores, strict=True))
    for name, scores in {
        "Doge-20M": (25.43, 0.03, 36.83, 22.78, 58.38, 27.25, 25.60, 50.20),
        "Doge-60M": (26.41, 0.18, 50.46, 25.34, 61.43, 31.45, 28.00, 50.75),
    }.items()
}
# Tokens per second on an i7-11 CPU, from the model cards.
PUBLISHED_SPEED = {"Doge-20M": 142, "Doge-60M": 62}


def find_suite(name: str) -> Suite:
    """The suite called ``name``; UserError, naming the nearest one, if there is none."""
    if name not in SUITES:
        raise UserError(f"there is no suite {name!r}{nearest(name, SUITES)}; expected one of {', '.join(SUITES)}")
    return SUITES[name]


def choose_tasks(suite: Suite, names: Sequence[str]) -> list[SuiteTask]:
    """The tasks of ``suite`` called ``names``, in the suite's order; all of them if there are no names.

    Raises:
        UserError: for a name that is not one of the suite's tasks, with the nearest that is.
    """
    for name in names:
        if name not in suite.tasks:
            raise UserError(
                f"suite {suite.name} has no task {name!r}{nearest(name, suite.tasks)}; it has {', '.join(suite.tasks)}"
            )
    return [TASKS[name] for name in suite.tasks if not names or name in names]
