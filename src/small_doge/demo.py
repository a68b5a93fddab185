"""The whole way on a laptop: the recipes of doge-tiny, one after another, into one folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from . import recipe as recipes
from .errors import UserError

# Of the time given, what training takes; the rest is for tokenizer, tokens, evaluation and report.
_TRAINING_SHARE = 0.72


@dataclass
class DemoRecipe:
    """What the demo may take and where it goes."""

    output_dir: str = field(default="runs/demo", metadata={"help": "folder of the run"})
    max_minutes: float = field(default=6.5, metadata={"help": "minutes for all stages together"})
    recipes: str = field(
        default=str(Path(__file__).resolve().parents[2] / "recipes" / "doge-tiny"),
        metadata={"help": "folder with tokenizer.yaml, prepare.yaml, pretrain.yaml, evaluate.yaml and report.yaml"},
    )

    def __post_init__(self) -> None:
        if self.max_minutes <= 0:
            raise ValueError(f"`max_minutes` is {self.max_minutes}, expected more than 0")


def demo(recipe: DemoRecipe) -> Path:
    """Train a tokenizer and a model on the standard library, evaluate it, and write a report; returns the report.

    Each stage is the very one the `doge` command runs. Called again it continues where it was interrupted.

    Raises:
        UserError: if the recipes are not where they should be, or any stage finds something wrong.
    """
    from .data.packing import PrepareRecipe, prepare
    from .data.tokenizer import TokenizerRecipe, train_tokenizer

    root, started = Path(recipe.output_dir), time.perf_counter()
    folders = {name: str(root / name) for name in ("tokenizer", "data", "pretrain", "evaluation")}

    def settings(name: str, cls: type, **overrides: object) -> object:
        path = Path(recipe.recipes, f"{name}.yaml")
        if not path.is_file():
            raise UserError(f"{path} does not exist; run the demo from a checkout, or say where the --recipes are")
        return recipes.load(cls, path, overrides)

    _say("1/5 tokenizer")
    train_tokenizer(settings("tokenizer", TokenizerRecipe, output_dir=folders["tokenizer"]))  # type: ignore[arg-type]
    _say("2/5 tokens")
    paths = {"tokenizer": folders["tokenizer"], "output_dir": folders["data"]}
    prepare(settings("prepare", PrepareRecipe, **paths))  # type: ignore[arg-type]

    _say("3/5 model")
    from .training.pretrain import PretrainArguments, pretrain

    paths = {"data": folders["data"], "tokenizer": folders["tokenizer"], "output_dir": folders["pretrain"]}
    minutes = recipe.max_minutes * _TRAINING_SHARE
    pretrain(settings("pretrain", PretrainArguments, max_minutes=minutes, **paths))  # type: ignore[arg-type]

    _say("4/5 evaluation")
    from .evaluation.evaluate import EvaluateRecipe, evaluate

    paths = {"model": folders["pretrain"], "data": folders["data"], "output_dir": folders["evaluation"]}
    evaluate(settings("evaluate", EvaluateRecipe, **paths))  # type: ignore[arg-type]

    _say("5/5 report")
    from .report.page import ReportRecipe, report

    page = report(settings("report", ReportRecipe, run_dir=str(root), output=str(root / "report.html")))  # type: ignore[arg-type]
    print(f"\nthe demo took {(time.perf_counter() - started) / 60:.1f} minutes")
    print(f'look at {page}, then try: doge generate "def read_" --model {folders["pretrain"]}')
    return page


def _say(stage: str) -> None:
    print(f"\n== {stage}", flush=True)
