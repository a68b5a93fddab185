"""The `doge` command: one thin function a stage, recipes from YAML, mistakes in one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import os
import sys
import traceback
from typing import Any

from . import recipe as recipes
from .errors import UserError

# stage: module with its recipe and its function, their names, what it does, and the fields bare words fill in turn.
_STAGES = {
    "demo": ("demo", "DemoRecipe", "demo", "the whole way on a laptop: text to tokenizer to model to report", ()),
    "tokenizer": ("data.tokenizer", "TokenizerRecipe", "train_tokenizer", "train a tokenizer on a corpus", ()),
    "prepare": ("data.packing", "PrepareRecipe", "prepare", "encode a corpus into packed rows of tokens", ()),
    "pretrain": ("training.pretrain", "PretrainArguments", "pretrain", "train a model on packed tokens", ()),
    "questions": (
        "data.stdlib_chat",
        "QuestionsRecipe",
        "write_questions",
        "questions about the standard library, for sft and dpo",
        (),
    ),
    "arithmetic": ("data.arithmetic", "ArithmeticRecipe", "write_arithmetic", "questions of arithmetic, for grpo", ()),
    "sft": ("training.sft", "SFTArguments", "sft", "teach a pretrained model to answer, from conversations", ()),
    "dpo": ("training.dpo", "DPOArguments", "dpo", "teach it which of two replies is preferred", ()),
    "grpo": ("training.grpo", "GRPOArguments", "grpo", "reward completions that a program finds right", ()),
    "evaluate": (
        "evaluation.evaluate",
        "EvaluateRecipe",
        "evaluate",
        "bits per byte of text, or a suite of tasks",
        ("model",),
    ),
    "answers": ("evaluation.answers", "AnswersRecipe", "answers", "what models answer to held-out questions", ()),
    "recall": (
        "evaluation.recall",
        "RecallRecipe",
        "recall",
        "associative recall: train on it, measure it",
        ("model",),
    ),
    "upcycle": (
        "models.upcycle",
        "UpcycleRecipe",
        "upcycle_folder",
        "experts for a dense model, or more of them, at the same logits",
        ("model", "output_dir"),
    ),
    "quantize": (
        "inference.quantize",
        "QuantizeRecipe",
        "quantize",
        "weights of 16, 8 or 4 bits, and what they cost in bits per byte",
        ("model", "output_dir"),
    ),
    "generate": ("inference.generate", "GenerateRecipe", "generate", "complete a prompt", ("prompt",)),
    "chat": ("inference.chat", "ChatRecipe", "chat", "talk with a model that has been taught to answer", ("model",)),
    "serve": ("inference.serve", "ServeRecipe", "serve", "an OpenAI-compatible HTTP API and a chat page", ("model",)),
    "bench": ("inference.bench", "BenchRecipe", "bench", "tokens per second and memory on this CPU", ("model",)),
    "info": ("inference.info", "InfoRecipe", "info", "a model's size, state and attention path", ("model",)),
    "report": ("report.page", "ReportRecipe", "report", "one page about a run", ("run_dir",)),
}


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit status: 0, 1 after a mistake, 2 for a wrong call, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="doge",
        description="Small Doge: train, evaluate and run small language models.",
        epilog="doge STAGE --help lists the fields of a stage's recipe.",
    )
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, (*_, what, _) in _STAGES.items():
        stage = stages.add_parser(name, help=what, add_help=False, allow_abbrev=False)
        stage.add_argument("-h", "--help", action="store_true")
        stage.add_argument("--config", metavar="RECIPE.yaml")
        stage.add_argument("--verbose", action="store_true")
    known, rest = parser.parse_known_args(argv)
    _still_bars()
    try:
        return _run(known, rest)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        message = _one_sentence(error)
        if message is None or known.verbose:
            traceback.print_exc()
        if message:
            print(f"doge {known.stage}: {message}", file=sys.stderr)
        return 1


def _still_bars() -> None:
    """No progress bars where standard error is no terminal: each of their moves is a line of a log, which they bury.

    tqdm, which draws all of them, looks at these variables when it is imported: by a stage, so after this. A bar that
    asks to be drawn whatever they say, as TRL's over the reference's log-probabilities does, moves once a minute.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TQDM_MININTERVAL", "60")


def _run(known: argparse.Namespace, rest: list[str]) -> int:
    module_name, recipe_name, function_name, what, bare = _STAGES[known.stage]
    overrides = _overrides(rest, *bare) if not known.help else {}
    module = importlib.import_module(f".{module_name}", __package__)
    cls = getattr(module, recipe_name)
    if known.help:
        print(_describe(known.stage, what, cls, bare))
        return 0
    getattr(module, function_name)(recipes.load(cls, known.config, overrides))
    return 0


def _overrides(words: list[str], *bare: str) -> dict[str, Any]:
    """``--field value``, ``--field=value`` and a lone ``--field`` (true) to fields and values.

    Words that belong to no field are the values of the fields ``bare``, such as the prompt, in turn.
    """
    fields: dict[str, Any] = {}
    i = 0
    while i < len(words):
        unfilled = [name for name in bare if name not in fields]
        if not words[i].startswith("--") and unfilled:
            fields[unfilled[0]] = recipes.Word(words[i])
            i += 1
            continue
        if not words[i].startswith("--") or words[i] == "--":
            raise UserError(f"found {words[i]!r}, expected `--field value`")
        name, equals, text = words[i][2:].partition("=")
        i += 1
        if not equals and i < len(words) and not words[i].startswith("--"):
            equals, text = "=", words[i]
            i += 1
        fields[name.replace("-", "_")] = recipes.Word(text) if equals else True
    return fields


def _describe(stage: str, what: str, cls: type, bare: tuple[str, ...]) -> str:
    """The fields of a recipe with their defaults and meanings."""
    words = "".join(f" [{name.upper()}]" for name in bare)
    usage = f"doge {stage}{words} [--config RECIPE.yaml] [--field value …] [--verbose]"
    lines = [f"usage: {usage}", "", what, "", "fields:"]
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            default = field.default if field.default is not dataclasses.MISSING else None
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            shown = "" if default is None else f" (default: {default})"
            lines.append(f"  --{field.name:<24} {field.metadata['help']}{shown}")
    if any(base.__name__ == "TrainingArguments" for base in cls.__mro__):
        lines.append("  and every field of transformers.TrainingArguments")
    return "\n".join(lines)


def _one_sentence(error: BaseException) -> str | None:
    """What to tell the user, or None for what looks like a mistake of ours."""
    if isinstance(error, UserError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        # safetensors and torch report a full disk as errors of their own, with the system's words in them.
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or any(w in str(cause) for w in ("No space left", "File too large", "PytorchStreamWriter failed")):
            return "the disk is full, expected room for the files this stage writes; what was finished before is whole"
        if isinstance(cause, PermissionError):
            return f"no permission to use {cause.filename}"
        cause = cause.__cause__ or cause.__context__
    return None
