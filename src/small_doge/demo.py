"""The whole way on a laptop: the recipes of doge-tiny, one after another, into one folder."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import artifacts
from . import recipe as recipes
from .errors import UserError

# Of the time given, what pretraining takes. SFT takes a third of that, DPO two thirds; all other stages have the rest.
_PRETRAINING_SHARE = 0.44
# Steps of SFT and DPO, at most, for each of pretraining. SFT's take as long; DPO's, of eight short pairs, a third.
_SFT_STEPS, _DPO_STEPS = 0.35, 2.1


@dataclass
class DemoRecipe:
    """What the demo may take and where it goes."""

    output_dir: str = field(default="runs/demo", metadata={"help": "folder of the run"})
    max_minutes: float = field(default=7.8, metadata={"help": "minutes for all stages together"})
    recipes: str = field(
        default=str(Path(__file__).resolve().parents[2] / "recipes" / "doge-tiny"),
        metadata={"help": "folder with tokenizer.yaml, prepare.yaml and the recipes of the other stages"},
    )

    def __post_init__(self) -> None:
        if self.max_minutes <= 0:
            raise ValueError(f"`max_minutes` is {self.max_minutes}, expected more than 0")


def demo(recipe: DemoRecipe) -> Path:
    """Train a tokenizer and a model on the standard library, teach it to answer, and write a report; returns that.

    Each stage is the very one the `doge` command runs. Called again it continues where it was interrupted. Where TRL
    is not installed, as on Python 3.10, the model is not taught to answer.

    Raises:
        UserError: if the recipes are not where they should be, or any stage finds something wrong.
    """
    from .data.packing import PrepareRecipe, prepare
    from .data.tokenizer import TokenizerRecipe, train_tokenizer

    root, started = Path(recipe.output_dir), time.perf_counter()
    folders = {name: str(root / name) for name in ("tokenizer", "data", "pretrain", "evaluation")}

    def settings(name: str, cls: type, **overrides: object) -> Any:
        path = Path(recipe.recipes, f"{name}.yaml")
        if not path.is_file():
            raise UserError(f"{path} does not exist; run the demo from a checkout, or say where the --recipes are")
        return recipes.load(cls, path, overrides)

    _say("1/8 tokenizer")
    train_tokenizer(settings("tokenizer", TokenizerRecipe, output_dir=folders["tokenizer"]))
    _say("2/8 tokens")
    paths = {"tokenizer": folders["tokenizer"], "output_dir": folders["data"]}
    prepare(settings("prepare", PrepareRecipe, **paths))

    _say("3/8 model")
    from .training.pretrain import PretrainArguments, pretrain

    paths = {"data": folders["data"], "tokenizer": folders["tokenizer"], "output_dir": folders["pretrain"]}
    minutes = recipe.max_minutes * _PRETRAINING_SHARE
    pretrain(settings("pretrain", PretrainArguments, max_minutes=minutes, **paths))

    taught = _teach(root, settings)

    _say("7/8 evaluation")
    from .evaluation.evaluate import EvaluateRecipe, evaluate

    paths = {"model": folders["pretrain"], "data": folders["data"], "output_dir": folders["evaluation"]}
    evaluate(settings("evaluate", EvaluateRecipe, **paths))
    if taught:
        from .evaluation.answers import AnswersRecipe, answers

        models = [str(root / name) for name in ("pretrain", "sft", "dpo")]
        paths = {"questions": str(root / "questions"), "output_dir": str(root / "answers")}
        answers(settings("answers", AnswersRecipe, models=models, **paths))

    _say("8/8 report")
    from .report.page import ReportRecipe, report

    page = report(settings("report", ReportRecipe, run_dir=str(root), output=str(root / "report.html")))
    print(f"\nthe demo took {(time.perf_counter() - started) / 60:.1f} minutes")
    print(f'look at {page}, then try: doge generate "def read_" --model {folders["pretrain"]}')
    if taught:
        print(f"and: doge chat {root / 'dpo'}")
    return page


def _teach(root: Path, settings: Callable[..., Any]) -> bool:
    """Questions, SFT and DPO; returns whether they could be run."""
    if importlib.util.find_spec("trl") is None:
        print("\nTRL is not installed (it needs Python 3.11): the model is not taught to answer")
        return False
    from .data.stdlib_chat import CONVERSATIONS, PREFERENCES, QuestionsRecipe, write_questions

    _say("4/8 questions")
    questions = write_questions(settings("questions", QuestionsRecipe, output_dir=str(root / "questions")))

    # Pretraining was as long as this machine could do in its time. These two are as long as their recipes say, or
    # shorter on a slower machine.
    steps = artifacts.read_json(root / "pretrain" / artifacts.STAGE_FILE)["steps"]

    from .training.dpo import DPOArguments, dpo
    from .training.sft import SFTArguments, sft

    _say("5/8 SFT")
    data = str(questions / CONVERSATIONS)
    paths = {"data": data, "eval_data": data, "model": str(root / "pretrain"), "output_dir": str(root / "sft")}
    asked = settings("sft", SFTArguments, **paths)
    sft(settings("sft", SFTArguments, max_steps=_fewer(_SFT_STEPS * steps, asked.max_steps), **paths))

    _say("6/8 DPO")
    data = str(questions / PREFERENCES)
    paths = {"data": data, "eval_data": data, "model": str(root / "sft"), "output_dir": str(root / "dpo")}
    asked = settings("dpo", DPOArguments, **paths)
    dpo(settings("dpo", DPOArguments, max_steps=_fewer(_DPO_STEPS * steps, asked.max_steps), **paths))
    return True


def _fewer(steps: float, planned: int) -> int:
    """The steps that there is time for, and at most those of the recipe, if it says."""
    return max(1, min(int(steps), planned) if planned > 0 else int(steps))


def _say(stage: str) -> None:
    print(f"\n== {stage}", flush=True)
