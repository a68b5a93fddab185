"""What associative recall gave, as a picture, as CSV and as lines of text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from .. import artifacts


def picture(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Accuracy of one or more models as the bytes of a PNG file: for every task, and by distance at the hardest one.

    Args:
        results: rows of :func:`measure` by the name of their model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Okabe and Ito's colours, told apart with every common colour blindness; markers differ as well.
    colours, markers = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#999999"), "osD^vP"
    every = sorted({(row["length"], row["pairs"]) for rows in results.values() for row in rows})
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (name, rows) in enumerate(results.items()):
        style: dict[str, Any] = {"color": colours[i % 6], "marker": markers[i % 6], "label": name, "alpha": 0.85}
        x = [every.index((row["length"], row["pairs"])) for row in rows]
        left.errorbar(x, [r["accuracy"] for r in rows], [2 * r["standard_error"] for r in rows], capsize=3, **style)
        for row in rows:
            if (row["length"], row["pairs"]) == every[-1]:
                parts = row["by_distance"]
                middle = [(part["from"] + part["to"]) / 2 for part in parts]
                right.plot(middle, [part["accuracy"] for part in parts], **style)
    left.plot(range(len(every)), [1 / p for _, p in every], ":", color="#777777", label="any value of the row")
    left.set_xticks(range(len(every)), [f"{length:,}\n{pairs:,}" for length, pairs in every])
    left.set(xlabel="positions of the row\nkey-value pairs", ylabel="accuracy on held-out rows", ylim=(-0.03, 1.03))
    left.set_title("every length and number of pairs", loc="left")
    right.set(xlabel="positions from the query back to its value", xlim=(0, every[-1][0]))
    right.set_title(f"{every[-1][0]:,} positions, {every[-1][1]:,} pairs", loc="left")
    for axes in (left, right):
        axes.grid(color="#E4E4E4")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def as_csv(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a task, with the model's facts and the versions in every line."""
    text = io.StringIO()
    lines = [{**facts, **row, **artifacts.versions()} for row in rows]
    names = [name for name in lines[0] if name != "by_distance"]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The accuracies as lines of text."""
    lines = ["length  pairs  accuracy ± error   loss"]
    lines += [
        f"{r['length']:>6,} {r['pairs']:>6,}  {r['accuracy']:>8.4f} ± {r['standard_error']:.4f}  {r['loss']:.4f}"
        for r in rows
    ]
    return "\n".join(lines)


def brief(row: Mapping[str, Any]) -> str:
    """A task and its accuracy in a few characters."""
    return f"{row['length']:,}/{row['pairs']:,}: {row['accuracy']:.3f}"


def name_of(facts: Mapping[str, Any]) -> str:
    """What to call a model in a picture."""
    window = f", window {facts['keep_window_size']:,}" if facts["keep_window_size"] else ""
    return f"{facts['model_type']} {facts['hidden_size']:,}{window}"
