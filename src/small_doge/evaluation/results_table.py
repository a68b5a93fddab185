"""Scores beside each other and beside chance: what the numbers say, as text and as a Markdown table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .. import artifacts
from ..errors import UserError
from .suites import PUBLISHED, PUBLISHED_SPEED, SUITES, TASKS, Suite

RESULTS_FILE = "results.json"
Z = 1.96  # standard errors on each side of a 95 % interval


def interval(score: float, documents: int) -> tuple[float, float]:
    """The 95 % interval of a share of right answers, 0 to 1, after Wilson.

    For many documents it is the score ± 1.96 standard errors. For few it stays honest where that fails: none right of
    five is no proof that a model never answers right.
    """
    centre = (score + Z**2 / (2 * documents)) / (1 + Z**2 / documents)
    half = Z * math.sqrt(score * (1 - score) / documents + Z**2 / (4 * documents**2)) / (1 + Z**2 / documents)
    return max(0.0, centre - half), min(1.0, centre + half)


def add_verdict(score: dict[str, Any]) -> dict[str, Any]:
    """``score`` (of one task, as ``score_task`` returns it) with its value, error and interval in percent.

    ``at_chance`` says whether the interval contains what guessing gives; None where that is not known.
    """
    value, error = score["metrics"][score["metric"]], score["metrics"].get(f"{score['metric']}_stderr")
    low, high = interval(value, score["documents"])
    chance = score["chance"]
    return {
        "score": 100 * value,
        "stderr": None if error is None else 100 * error,
        "interval": [100 * low, 100 * high],
        "chance": None if chance is None else 100 * chance,
        "at_chance": None if chance is None else low <= chance <= high,
        **{name: score[name] for name in score if name != "chance"},
    }


def read_results(folder: str | Path, suite: Suite) -> dict[str, Any]:
    """The results of an evaluation by ``suite``; ``folder`` is where they were written, or the model's own.

    Raises:
        UserError: if there are none.
    """
    places = [Path(folder) / RESULTS_FILE, Path(folder) / "evaluation" / suite.name / RESULTS_FILE]
    for path in places:
        if path.is_file():
            results = artifacts.read_json(path)
            if isinstance(results, dict) and "scores" in results:
                return results
            raise UserError(f"{path} holds no scores of tasks, expected what `doge evaluate --suite` wrote")
    raise UserError(f"{folder} holds no results to compare with: looked for {places[0]} and {places[1]}")


def cell(score: dict[str, Any]) -> str:
    """A score with its standard error, and a word where it cannot be told from chance."""
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.2f}"
    return f"{score['score']:.2f}{error}" + (" (chance)" if score["at_chance"] else "")


def label(one: dict[str, Any], results: dict[str, Any]) -> str:
    """The name of an evaluated model, with the settings in which it differs from ``results``."""
    there, here = one["settings"], results["settings"]
    words = {
        "suite": there["suite"],
        "num_fewshot": f"{there['num_fewshot']}-shot",
        "limit": f"first {there['limit']}" if there["limit"] else "all questions",
    }
    return ", ".join([one["name"], *(text for name, text in words.items() if there[name] != here[name])])


def table_rows(results: dict[str, Any], others: list[dict[str, Any]]) -> list[list[str]]:
    """The table as rows of cells, the head first: a column for each task, a row for each model, for chance, for the
    published values."""
    names = [*results["scores"], *(["speed"] if any(one.get("speed") for one in (results, *others)) else [])]

    def row(first: str, cells: dict[str, str]) -> list[str]:
        return [first, *(cells.get(name, "") for name in names)]

    rows = [row("", {name: TASKS[name].title if name in TASKS else "tokens/s on a CPU" for name in names})]
    for one in (results, *others):
        cells = {name: cell(score) for name, score in one["scores"].items()}
        speed = one.get("speed")
        cells |= {"speed": f"{speed['best']['tokens_per_second']:,.0f}"} if speed else {}
        rows.append(row(label(one, results), cells))
    chances = {name: score["chance"] for name, score in results["scores"].items()}
    rows.append(row("random guess", {name: f"{chance:.2f}" for name, chance in chances.items() if chance is not None}))
    if not SUITES[results["suite"]].chat:
        for model, scores in PUBLISHED.items():
            cells = {name: f"{score:.2f}" for name, score in scores.items()} | {"speed": f"{PUBLISHED_SPEED[model]:,}"}
            rows.append(row(f"{model}, published", cells))
    return rows


def notes(results: dict[str, Any]) -> list[str]:
    """What has to stand beside the table, a sentence each."""
    scores = results["scores"]
    by_metric: dict[str, list[str]] = {}
    for name, score in scores.items():
        by_metric.setdefault(score["metric"], []).append(TASKS[name].title)
    shown = "; ".join(f"{metric} of {', '.join(titles)}" for metric, titles in by_metric.items())
    found = [f"Percent, ± one standard error. Shown is {shown}."]
    if any(score["at_chance"] for score in scores.values()):
        found.append("(chance): the 95 % interval of the score contains what guessing gives.")
    shots = sorted({score["num_fewshot"] for score in scores.values()})
    limit = f", only the first {results['limit']:,} questions of each task or subject" if results["limit"] else ""
    how = ", as a chat" if SUITES[results["suite"]].chat else ""
    documents = ", ".join(f"{TASKS[name].title} {score['documents']:,}" for name, score in scores.items())
    found.append(f"{' or '.join(map(str, shots))} examples before each question{how}{limit}. Questions: {documents}.")
    cut = {TASKS[name].title: score for name, score in scores.items() if score["truncated"]}
    if cut:
        which = ", ".join(f"{title} {score['truncated']:,} of {score['requests']:,}" for title, score in cut.items())
        found.append(
            f"Requests longer than the model's {results['context_length']:,} tokens lost their start: {which}."
        )
    else:
        found.append("No request was longer than the model reads.")
    found += [f"{TASKS[name].title}: {note}." for name, score in scores.items() for note in score["notes"]]
    found += results["notes"]
    if results.get("speed"):
        best, cpu = results["speed"]["best"], results["speed"]["cpu"]
        found.append(
            f"Tokens/s of one reply after {best['context']:,} tokens, {best['precision']} weights, {best['threads']} "
            f"thread{'s' if best['threads'] > 1 else ''}, {cpu} (`doge bench`); published ones on an i7-11 CPU."
        )
    if not SUITES[results["suite"]].chat:
        found.append(
            "Published rows are five-shot, with lighteval's prompts, and were not measured here; the others are the "
            f"harness's (lm-eval {results['versions'].get('lm_eval', '?')})."
        )
    return found


def markdown(results: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The table and its notes in Markdown."""
    head, *rows = [[text.replace("|", "\\|") for text in row] for row in table_rows(results, others)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    table = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    return table + "\n\n" + "\n".join(f"- {note}" for note in notes(results)) + "\n"
