"""Multi-query associative recall: Dynamic Mask Attention against other mixers, by width, by length and by window.

python experiments/recall_study.py --workers 12        # GPUs; writes recall_study.csv and the pictures beside it
python experiments/recall_study.py --draw              # draws them again and prints the tables, without a GPU

A point is one model of two layers (see mixers.py), trained on rows of all the lengths with a pair for every eight
positions, short ones first, and measured at each length on held-out rows. The longest have 256 pairs, 512 positions of
2,048 that matter, so a window of 512 holds them all only if it chooses them well. Pictures show the best of the
learning rates, chosen by the same held-out rows, for every mixer alike.

Of ``dma`` the CSV also has what the last query of one held-out row keeps, by layer and head (``kept``), and at one
width the scores and eviction times behind that (``scores``).

Points are told apart by mixer, width, window, rate and seed alone: other steps, lengths or filler need another CSV.
Filler of random tokens looks like pairs to a score of the first layer, which knows the token alone; padding does not.

A trial for a CPU: --steps 5 --dimensions 64 --lengths 32 64 --window 16 --windows --learning_rates 1e-2
--tokens_per_step 256 --test_rows 4 --output trial.csv
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import points
import torch
from common import BLUE, GREEN, GREY, ORANGE, RED, SKY, Row, read_csv, this_device
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mixers import BASED_WINDOW, MIXERS, WINDOWED, build

from small_doge.evaluation.recall import RecallRecipe, train
from small_doge.evaluation.recall_task import IGNORED, Filler, measure, pairs_at, recall_rows
from small_doge.ops.dynamic_mask import eviction_times
from small_doge.report.plots import attention_and_scores

OUTPUT = Path(__file__).with_suffix(".csv")
PAIRS = 0.125  # of the length
PURPLE = "#CC79A7"
AXIS = 64  # the width at which the window varies, and whose scores are kept
EVERY = 7  # one position in so many has its score in the CSV: odd, so that keys and values both do
COLORS = (BLUE, PURPLE, GREY, SKY, ORANGE, RED, GREEN, "#000000")
STYLE = dict(zip(MIXERS, zip(COLORS, "oXsD^vP*", strict=True), strict=True))
# Published (Wonderful Matrices, arXiv:2412.11834): accuracy by length, at these widths; NaN where none is shown.
PAPER_WIDTHS = (32, 64, 128, 256)
PAPER: dict[str, dict[int, tuple[float, ...]]] = {
    "dma": {256: (0.54, 1, 1, 1), 512: (0, 0.79, 1, 1), 1024: (0, 0.18, 1, 1), 2048: (0.01, 0.16, 1, 1)},
    "query_topk": {2048: (math.nan, 0.09, 0.19, 0.36)},
    "ssd": {2048: (math.nan, 0, 0.13, 0.32)},
    "based": {2048: (math.nan, math.nan, 0.04, 0.18)},
}


def plan(args: Any) -> list[points.Point]:
    """All points, those that matter most first: the widths at the middle rate, at the others, then the windows."""
    middle = sorted(args.learning_rates)[len(args.learning_rates) // 2]
    rates = sorted(args.learning_rates, key=lambda rate: (rate != middle, -rate))
    widths = [(mixer, width, args.window) for width in args.dimensions for mixer in args.mixers]
    windows = [(mixer, AXIS, one) for one in args.windows for mixer in args.mixers if mixer in WINDOWED]
    found = [
        (mixer, width, window_of(mixer, window, args.lengths), rate, seed)
        for seed in args.seeds
        for part in (widths, windows)
        for rate in rates
        for mixer, width, window in part
    ]
    names = ("mixer", "hidden_size", "window", "learning_rate", "seed")
    return [dict(zip(names, one, strict=True)) for one in dict.fromkeys(found)]


def window_of(mixer: str, window: int, lengths: list[int]) -> int:
    """The window a mixer has where those with a choice have ``window``; 0 for one without."""
    return {"full": max(lengths), "ssd": 0, "based": BASED_WINDOW}.get(mixer, window)


def measured(
    point: points.Point, lengths: list[int], steps: int, tokens_per_step: int, test_rows: int, filler: Filler
) -> list[Row]:
    """Train the model of a point; a row for each length."""
    device = this_device()
    recipe = RecallRecipe(
        output_dir="",  # nothing is written
        lengths=lengths,
        pairs=[PAIRS],
        filler=filler,
        hidden_size=point["hidden_size"],
        keep_window_size=point["window"] or None,
        steps=steps,
        tokens_per_step=tokens_per_step,
        learning_rate=point["learning_rate"],
        bf16=device.type == "cuda",
        seed=point["seed"],
    )
    model = build(point["mixer"], recipe)
    with contextlib.redirect_stdout(io.StringIO()):  # its lines would mingle with those of the other workers
        for _step, _loss in train(model, recipe, device):
            pass
    rows = []
    options: dict[str, Any] = {"rows": test_rows, "tokens_per_batch": tokens_per_step, "filler": filler}
    for length in sorted(lengths):
        pairs = pairs_at(length, PAIRS, model.config.vocab_size)
        found = measure(model, length, pairs, recipe.seed, **options)  # in float32
        row = {name: found[name] for name in ("length", "pairs")}
        row |= {name: round(found[name], 5) for name in ("accuracy", "standard_error", "loss")}
        row |= {
            "filler": filler,
            "steps": steps,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        rows.append(row | {"by_distance": json.dumps([round(x["accuracy"], 3) for x in found["by_distance"]])})
    if point["mixer"] == "dma":
        kept, scores = what_is_kept(model, rows[-1]["length"], rows[-1]["pairs"], recipe.seed, filler)
        rows[-1] |= {"kept": kept} | ({"scores": scores} if point["hidden_size"] == AXIS else {})
    return rows


KINDS = {"key": BLUE, "value": SKY, "query": ORANGE, "filler": GREY}


def kinds_of(length: int, pairs: int, seed: int, filler: Filler = "random") -> tuple[np.ndarray, np.ndarray]:
    """One held-out row (1, T), and of each of its positions the index in ``KINDS`` (T), whatever the filler."""
    row = recall_rows(1, length, pairs, seed, filler=filler, split="test")
    kinds = np.full(length, 3)
    kinds[: 2 * pairs : 2], kinds[1 : 2 * pairs : 2] = 0, 1
    kinds[np.nonzero(row.labels[0] != IGNORED)[0] - 1] = 2
    return row.input_ids, kinds


def what_is_kept(model: Any, length: int, pairs: int, seed: int, filler: Filler) -> tuple[str, str]:
    """JSON of what the last query of a row keeps, and of the scores, each [layer][head].

    The first: of the keys it keeps, the share that are a pair's key or value, a query, filler. The second: scores and
    eviction times of every ``EVERY``-th position.
    """
    input_ids, kinds = kinds_of(length, pairs, seed, filler)
    device = next(model.parameters()).device
    model.eval()
    _, scores = attention_and_scores(model, torch.from_numpy(input_ids).to(device))
    kept, thinned = [], []
    for s in scores:
        e = eviction_times(torch.from_numpy(s)[None], model.config.keep_window_size)[0].numpy()
        there = [kinds[head == length] for head in e]
        kept.append([[round(float(x), 3) for x in ((k <= 1).mean(), (k == 2).mean(), (k == 3).mean())] for k in there])
        thinned.append([[[float(f"{x:.4g}") for x in a], b.tolist()] for a, b in zip(s[:, ::EVERY], e[:, ::EVERY])])  # noqa: B905
    return json.dumps(kept), json.dumps(thinned)


def best(rows: list[Row], mixer: str, width: int, window: int, length: int) -> tuple[float, float]:
    """The highest accuracy of all learning rates, mean over seeds, and its rate; NaN if none was measured."""
    by_rate = defaultdict(list)
    for row in rows:
        where = (row["mixer"], int(row["hidden_size"]), int(row["window"]), int(row["length"]))
        if where == (mixer, width, window, length):
            by_rate[float(row["learning_rate"])].append(float(row["accuracy"]))
    means = [(statistics.fmean(accuracies), rate) for rate, accuracies in by_rate.items()]
    return max(means, default=(math.nan, math.nan))


def report(rows: list[Row], window: int, lengths: list[int]) -> None:
    """Accuracy and its learning rate, a table for each length, by width and by window."""
    widths = sorted({int(row["hidden_size"]) for row in rows})
    windows = sorted({int(row["window"]) for row in rows if row["mixer"] in WINDOWED})
    for length in lengths:
        print(f"\nlength {length:,}: accuracy (learning rate) by width, windows of {window}")
        print(f"{'':12}" + "".join(f"{width:>16}" for width in widths))
        for mixer in (mixer for mixer in MIXERS if any(row["mixer"] == mixer for row in rows)):
            cells = [best(rows, mixer, width, window_of(mixer, window, lengths), length) for width in widths]
            print(f"{mixer:12}" + "".join(f"{accuracy:>8.3f} ({rate:.0e})" for accuracy, rate in cells))
        print(f"by window at width {AXIS}\n{'':12}" + "".join(f"{one:>16}" for one in windows))
        for mixer in (mixer for mixer in WINDOWED if any(row["mixer"] == mixer for row in rows)):
            cells = [best(rows, mixer, AXIS, one, length) for one in windows]
            print(f"{mixer:12}" + "".join(f"{accuracy:>8.3f} ({rate:.0e})" for accuracy, rate in cells))


def draw(rows: list[Row], window: int, output: Path) -> None:
    """The pictures beside the CSV: by width, by window, and what is kept."""
    lengths = sorted({int(row["length"]) for row in rows})
    widths = sorted({int(row["hidden_size"]) for row in rows})
    windows = sorted({int(row["window"]) for row in rows if row["mixer"] in WINDOWED})
    by_width, by_window = panels(lengths, "width of the model", widths), panels(lengths, "window, keys", windows)
    for length, left, right in zip(lengths, by_width.axes, by_window.axes, strict=True):
        for mixer in (mixer for mixer in MIXERS if any(row["mixer"] == mixer for row in rows)):
            color, marker = STYLE[mixer]
            style: dict[str, Any] = {"color": color, "marker": marker}
            own = window_of(mixer, window, lengths)
            left.plot(widths, [best(rows, mixer, width, own, length)[0] for width in widths], label=mixer, **style)
            if length in PAPER.get(mixer, {}):
                paper = PAPER[mixer][length]
                left.plot(PAPER_WIDTHS, paper, ":", label=f"{mixer}, published", markerfacecolor="none", **style)
            if mixer in WINDOWED:
                seen = [(one, best(rows, mixer, AXIS, one, length)[0]) for one in windows]
                right.plot(*zip(*seen, strict=True), label=mixer, **style)
        right.axhline(best(rows, "full", AXIS, max(lengths), length)[0], color=GREY, linestyle="--", label="full")
        right.axvline(length * PAIRS * 2, color="#777777", linestyle=":", label="positions of pairs")
    figures = [(by_width, output.with_suffix(".png"))] if len(widths) > 1 else []
    figures += [(by_window, output.with_name(f"{output.stem}_windows.png"))] if len(windows) > 1 else []
    for figure, path in figures:
        figure.axes[0].set_ylabel("accuracy on held-out rows")
        figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, dpi=130)
    draw_kept(rows, window, lengths, output.with_name(f"{output.stem}_kept.png"))


def panels(lengths: list[int], label: str, ticks: list[int]) -> Figure:
    """A panel of accuracies for each length."""
    figure = Figure(figsize=(3.2 * len(lengths) + 0.8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, length in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
        axes.set(xlabel=label, ylim=(-0.03, 1.03))
        axes.set_title(f"length {length:,}, {round(length * PAIRS)} pairs", loc="left", fontsize=10)
        axes.grid(color="#E4E4E4")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_kept(rows: list[Row], window: int, lengths: list[int], path: Path) -> None:
    """Score and eviction time of the keys of one row, by layer and head, of the model that recalls best."""
    length = max(lengths)
    accuracy, rate = best(rows, "dma", AXIS, window, length)
    for row in rows:
        where = [row["mixer"], *(float(row[x]) for x in ("hidden_size", "window", "learning_rate", "length"))]
        if where == ["dma", AXIS, window, rate, length] and row.get("scores"):
            break
    else:
        return
    kinds = kinds_of(length, int(row["pairs"]), int(row["seed"]))[1][::EVERY]
    heads = [
        (f"layer {i + 1}, head {j + 1}: of the keys kept\n{share[0]:.0%} pairs, {share[1]:.0%} queries", *head)
        for i, (shares, layer) in enumerate(zip(json.loads(row["kept"]), json.loads(row["scores"]), strict=True))
        for j, (share, head) in enumerate(zip(shares, layer, strict=True))
    ]
    figure = Figure(figsize=(3.2 * len(heads) + 0.8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    at = np.arange(0, length, EVERY)
    for column, (title, scores, evicted) in zip(figure.subplots(2, len(heads), sharex=True).T, heads, strict=True):
        for axes, values, label in zip(column, map(np.array, (scores, evicted)), ("score", "evicted at"), strict=True):
            for kind, (name, color) in enumerate(KINDS.items()):
                for kept in (False, True):
                    chosen = (kinds == kind) & ((np.array(evicted) == length) == kept)
                    face = color if kept else "none"
                    words = f"{name}{', kept to the end' if kept else ''}"
                    axes.scatter(at[chosen], values[chosen], 14, facecolors=face, edgecolors=color, label=words)
            axes.set_ylabel(label)
            axes.spines[["top", "right"]].set_visible(False)
        column[0].set_title(title, loc="left", fontsize=10)
        column[1].set_xlabel("position")
    figure.suptitle(f"dma, width {AXIS}, {window} of {length:,} keys: accuracy {accuracy:.2f}", fontsize=11)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = points.parser(__doc__, OUTPUT)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS)
    parser.add_argument("--dimensions", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--window", type=int, default=512, help="window of all widths")
    parser.add_argument("--windows", nargs="*", type=int, default=[64, 128, 256, 512, 1024, 2048], help="at one width")
    parser.add_argument("--tokens_per_step", type=int, default=16384)
    parser.add_argument("--test_rows", type=int, default=256, help="held-out rows of each length")
    parser.add_argument("--filler", default="random", choices=("random", "padding"), help="another needs another CSV")
    args = parser.parse_args()
    if args.draw:
        rows = read_csv(args.output)
    else:
        same = {name: getattr(args, name) for name in ("lengths", "steps", "tokens_per_step", "test_rows", "filler")}
        rows = points.run(plan(args), partial(measured, **same), args)
    if rows:
        report(rows, args.window, sorted({int(row["length"]) for row in rows}))
        draw(rows, args.window, args.output)


if __name__ == "__main__":
    main()
