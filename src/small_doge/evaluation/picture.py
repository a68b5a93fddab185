"""The picture of a suite's scores: bars with their errors, what guessing gives, what was published."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results_table import label
from .suites import PUBLISHED, SUITES, TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour blindness, as in the pictures of the report.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_MARKS = ("o", "D")
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "svg.hashsalt": "small-doge",
}


def scores_figure(results: dict[str, Any], others: list[dict[str, Any]]) -> Figure:
    """A group of bars for each task, a bar for each model, thin lines for the 95 % interval.

    A dashed line across each group is what guessing gives; marks are the published scores.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, models = list(results["scores"]), [results, *others]
    width = 0.72 / len(models)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(5.4, 1.15 * len(names) + 1), 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for number, model in enumerate(models):
            shown = [(i, model["scores"][name]) for i, name in enumerate(names) if name in model["scores"]]
            places = [i - 0.36 + width * (number + 0.5) for i, _ in shown]
            values = [score["score"] for _, score in shown]
            errors = [
                [max(0.0, s["score"] - s["interval"][0]) for _, s in shown],
                [max(0.0, s["interval"][1] - s["score"]) for _, s in shown],
            ]
            color = _COLORS[number % len(_COLORS)]
            axes.bar(places, values, width * 0.92, color=color, yerr=errors, capsize=3, label=label(model, results))
        for i, name in enumerate(names):
            chance = results["scores"][name]["chance"]
            if chance is not None:
                name_once = "_" if i else "random guess"  # in the legend
                axes.hlines(chance, i - 0.42, i + 0.42, "#222222", "dashed", linewidth=1.3, label=name_once)
        if not SUITES[results["suite"]].chat:
            # At the two ends of a group, where no bar hides them.
            for (published, scores), mark, shift in zip(PUBLISHED.items(), _MARKS, (-0.42, 0.42), strict=True):
                values = [scores[name] for name in names]
                style: Any = {"color": "white", "edgecolors": "#222222", "s": 34, "zorder": 3}
                axes.scatter(
                    [i + shift for i in range(len(names))],
                    values,
                    marker=mark,
                    label=f"{published}, published",
                    **style,
                )
        axes.set_xticks(range(len(names)), [TASKS[name].title for name in names])
        axes.set(ylim=(0, 100), ylabel="percent; lines: 95 % interval")
        legend = axes.legend(loc="upper left", ncols=2, fontsize=9)
        for text in (*legend.get_texts(), *axes.get_xticklabels()):
            text.set_parse_math(False)  # a dollar sign in a folder's name starts no formula
    return figure


def save_scores(results: dict[str, Any], others: list[dict[str, Any]], path: Path) -> None:
    """Write the picture as PNG, whole or not at all."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        scores_figure(results, others).savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(buffer.getvalue())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
