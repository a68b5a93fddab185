"""A suite run on a model: each task once, resumable, into a folder with scores, table, picture and model card.

The folder holds ``tasks/TASK/`` (the settings a task runs under, every answer as it came, the score once it is done)
and what is made from the scores: ``results.json``, ``table.md``, ``scores.png`` and ``README.md``, a model card. With
local data, ``harness/`` holds the task files, for ``lm_eval --include_path``.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts
from ..errors import UserError
from .local_tasks import LocalTask, find_local, harness_folder, write_tasks
from .results_table import RESULTS_FILE, add_verdict, cell, markdown, read_results
from .suites import Suite, SuiteTask, choose_tasks, find_suite

if TYPE_CHECKING:
    from .evaluate import EvaluateRecipe

STAGE = "evaluate"
TASKS_FOLDER, SETTINGS_FILE, ANSWERS_FILE, SCORE_FILE = "tasks", "settings.json", "answers.jsonl", "score.json"
# What a model folder holds that changes an answer.
_MODEL_FILES = "config.json generation_config.json *.safetensors pytorch_model*.bin".split()
_MODEL_FILES += "tokenizer.json tokenizer_config.json chat_template.jinja".split()


def evaluate_suite(recipe: EvaluateRecipe) -> Path:
    """Run the tasks of ``recipe.suite`` that have no score yet, write results, table, picture and card.

    Called again after an interruption it goes on with the answers it has. Tasks that were scored earlier, with the same
    settings, stay in the table.

    Returns:
        The path of ``results.json``.

    Raises:
        UserError: for an unknown suite or task, data or a model that cannot be used, an output folder that holds
            something else or scores of other settings, or a folder to compare with that has no results.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a suite runs in one process, on one device; start it without `accelerate launch`")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars, one for each of MMLU's subjects; ours say more
    suite = find_suite(recipe.suite or "")
    harness_folder()
    tasks, notes = _without_missing_packages(choose_tasks(suite, recipe.task_names()), bool(recipe.task_names()))
    output = _output_dir(recipe, suite)
    others = [read_results(folder, suite) for folder in recipe.compared_folders()]
    local = {task.name: find_local(recipe.data_dir, task) for task in tasks} if recipe.data_dir else {}
    settings = _settings(recipe, suite)
    mine = {t.name: settings | {"data_sha256": local[t.name].sha256() if local else "Hub"} for t in tasks}
    _require_ours(output, mine)

    waiting = [task for task in tasks if not (output / TASKS_FOLDER / task.name / SCORE_FILE).is_file()]
    if waiting:
        _run(recipe, suite, waiting, local, mine, output)
    return _summarise(recipe, suite, output, settings, notes, others)


def _output_dir(recipe: EvaluateRecipe, suite: Suite) -> Path:
    """Where the results go: if nothing is said in the model folder, a trial apart from the real thing."""
    if recipe.output_dir:
        return Path(recipe.output_dir)
    if not Path(recipe.model).is_dir():
        raise UserError(f"{recipe.model} is no folder of this machine, so say where results go with --output_dir")
    shots = "" if recipe.num_fewshot is None else f"-{recipe.num_fewshot}shot"
    limit = "" if recipe.limit is None else f"-limit{recipe.limit}"
    return Path(recipe.model) / "evaluation" / f"{suite.name}{shots}{limit}"


def _settings(recipe: EvaluateRecipe, suite: Suite) -> dict[str, Any]:
    """What decides the scores; not the device, nor how many tokens share a step."""
    folder = Path(recipe.model)
    if folder.is_dir():
        files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)})
        if not any(file.name == "config.json" for file in files):
            raise UserError(f"{folder} holds no model: config.json is not there")
        model = artifacts.sha256(*files)
    else:
        model = recipe.model
    shots = suite.num_fewshot if recipe.num_fewshot is None else recipe.num_fewshot
    return {
        "suite": suite.name,
        "model": model,
        "num_fewshot": shots,
        "limit": recipe.limit,
        "context_length": recipe.context_length,
        "lm_eval": _version("lm_eval"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _without_missing_packages(tasks: list[SuiteTask], asked_for: bool) -> tuple[list[SuiteTask], list[str]]:
    """The tasks that can run here, and a note on one that cannot: IFEval's checks need packages and data of their own.

    Raises:
        UserError: if it was asked for by name.
    """
    if not any(task.name == "ifeval" for task in tasks):
        return tasks, []
    try:
        import immutabledict  # noqa: F401
        import langdetect  # noqa: F401
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
        return tasks, []
    except (ImportError, LookupError) as error:
        lacking = "nltk's punkt_tab" if isinstance(error, LookupError) else getattr(error, "name", "a package")
        why = f"IFEval needs {lacking}: pip install 'lm-eval[ifeval]', then python -m nltk.downloader punkt_tab"
        if asked_for:
            raise UserError(why) from None
        print(f"left out: {why}")
        return [task for task in tasks if task.name != "ifeval"], [f"IFEval was not run. {why}."]


def _require_ours(output: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Raise UserError if ``output`` holds something else, or one of the tasks under other settings."""
    if output.is_file():
        raise UserError(f"output folder {output} is a file")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / TASKS_FOLDER).is_dir():
        raise UserError(f"output folder {output} holds files that are not of this run; choose another --output_dir")
    for name, mine in settings.items():
        path = output / TASKS_FOLDER / name / SETTINGS_FILE
        if path.is_file():
            artifacts.require_same_settings(path.parent, artifacts.read_json(path), mine)


def _run(
    recipe: EvaluateRecipe,
    suite: Suite,
    tasks: list[SuiteTask],
    local: dict[str, LocalTask],
    settings: dict[str, dict[str, Any]],
    output: Path,
) -> None:
    """Score ``tasks``, a folder each."""
    shots = settings[tasks[0].name]["num_fewshot"]
    print(f"{suite.name}: {len(tasks)} tasks, {shots}-shot, into {output}", flush=True)
    from .harness import RememberingModel, load_tasks, open_model, score_task

    model = open_model(recipe.model, recipe.device, recipe.tokens_per_batch, recipe.context_length, suite.chat)
    loaded = load_tasks(tasks, local, shots)
    if local:
        write_tasks([local[task.name] for task in tasks], output / "harness")
    facts = {
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "model_type": model.model.config.model_type,
        "context_length": model.max_length,
    }
    for number, task in enumerate(tasks, 1):
        folder = output / TASKS_FOLDER / task.name
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(folder / SETTINGS_FILE, settings[task.name])
        progress = _Progress(f"{number}/{len(tasks)} {task.title}")
        print(f"{progress.label}: writing its prompts", flush=True)
        remembering = RememberingModel(model, folder / ANSWERS_FILE, progress)
        try:
            score = score_task(task, loaded.pop(task.name), remembering, shots, recipe.limit, suite.chat)
        finally:
            remembering.close()
        note = local[task.name].note() if local and shots else ""
        score |= {"notes": [note] if note else [], "model": facts}
        artifacts.write_json(folder / SCORE_FILE, score)
        print(f"{progress.label}: {cell(add_verdict(score))} in {artifacts.duration(score['seconds'])}", flush=True)


@dataclass
class _Progress:
    """Says about every ten seconds how far a task is and how long it will take."""

    label: str
    began: float | None = None
    already: int = 0
    said: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.began is None:
            self.began, self.already, self.said = now, done - 1, now
            kept = f", {self.already:,} answered before" if self.already else ""
            print(f"{self.label}: {total:,} requests{kept}", flush=True)
        if now - self.said > 10:
            self.said = now
            left = (now - self.began) / (done - self.already) * (total - done)
            print(f"  {done:,} of {total:,} requests, about {artifacts.duration(left)} left", flush=True)


def _speed(model: str) -> dict[str, Any] | None:
    """What `doge bench` found for a model folder and left in it, if it has been run."""
    path = Path(model) / "bench" / "bench.json"
    if not path.is_file():
        return None
    found = artifacts.read_json(path)
    return {"cpu": found["cpu"], "best": found["best"]}


def _summarise(
    recipe: EvaluateRecipe,
    suite: Suite,
    output: Path,
    settings: dict[str, Any],
    notes: list[str],
    others: list[dict[str, Any]],
) -> Path:
    """Everything that is made from the scores in ``output``: every task of the suite that has one."""
    from .model_card import model_card
    from .picture import save_scores

    scores, facts = {}, {}
    for name in suite.tasks:
        path = output / TASKS_FOLDER / name / SCORE_FILE
        if path.is_file():
            scores[name] = add_verdict(artifacts.read_json(path))
            facts = scores[name].pop("model")
    results = {
        "name": "/".join(Path(recipe.model).absolute().parts[-2:]) if Path(recipe.model).exists() else recipe.model,
        "suite": suite.name,
        **facts,
        "limit": settings["limit"],
        "scores": scores,
        "notes": notes,
        "speed": _speed(recipe.model),
        "settings": settings,
        "versions": artifacts.versions() | {"lm_eval": settings["lm_eval"]},
    }
    table = markdown(results, others)
    artifacts.write_json(output / RESULTS_FILE, results)
    artifacts.write_text(output / "table.md", table)
    artifacts.write_text(output / "README.md", model_card(results, table))
    save_scores(results, others, output / "scores.png")
    artifacts.finish(output, STAGE, settings, sum(score["seconds"] for score in scores.values()), model=recipe.model)
    print(f"\n{table}")
    print(f"wrote {output / RESULTS_FILE}, table.md, scores.png and README.md, a model card")
    return output / RESULTS_FILE
