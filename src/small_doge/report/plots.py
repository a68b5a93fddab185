"""The pictures of a report. Each function returns a matplotlib Figure that nothing else holds on to.

Text from the model or the tokenizer is drawn as it is: a dollar sign starts no formula.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour blindness; None of them carries meaning alone.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8A8A8A"
PALE = "#F2CDB5"  # an area of orange on which grey and blue lines are seen
WIDTH = 5.4  # inches; on the 390 pixels of a phone the labels then keep some 10 pixels
STYLE: Any = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so pictures are the same everywhere
    "svg.hashsalt": "small-doge",  # the same figure gives the same file
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """The one look of all pictures, while a figure is drawn or saved."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of its own (not pyplot's, which would keep it in memory) on the Agg canvas, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def to_svg(figure: Figure) -> str:
    """The figure as one ``<svg>`` element: no prolog, no metadata, no comments, text as outlines."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    # matplotlib repeats every text in a comment; the text may be a model's.
    return re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def to_png_base64(figure: Figure, dpi: int = 130) -> str:
    """The figure as a PNG in base64, for ``data:image/png;base64,…``."""
    return base64.b64encode(to_png(figure, dpi)).decode("ascii")


def series(history: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one name in a Trainer's log history; entries without it, NaN and infinity are left out."""
    points = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
    points = [(s, v) for s, v in points if isinstance(v, (int, float)) and math.isfinite(v)]
    return [float(s) for s, _ in points], [float(v) for _, v in points]


def loss_figure(history: Sequence[dict[str, Any]]) -> Figure:
    """Loss in nats per token against the step, for training and held-out text."""
    return _curves(history, "Loss (nats per token)", loss="training text", eval_loss="held-out text")


def bits_per_byte_figure(history: Sequence[dict[str, Any]]) -> Figure:
    """Bits per byte against the step, for training and held-out text."""
    return _curves(history, "Bits per byte", bits_per_byte="training text", eval_bits_per_byte="held-out text")


def learning_rate_figure(history: Sequence[dict[str, Any]]) -> Figure:
    """Learning rate against the step."""
    figure = _curves(history, "Learning rate", learning_rate="learning rate")
    figure.axes[0].set_ylim(bottom=0)
    return figure


def balance_loss_figure(history: Sequence[dict[str, Any]]) -> Figure:
    """Balance loss of the experts against the step, with what even use has."""
    figure = _curves(history, "Balance loss", balance_loss="training text")
    with _style():
        figure.axes[0].axhline(1, color=GREY, linestyle="--", linewidth=1.2, label="even use")
        figure.axes[0].legend()
    return figure


WATCHED = {  # what `training.watching` logs for every layer
    "A": "mean |A|",
    "score_spread": "spread of the scores",
    "evicted": "share of keys that leave",
    "seen_distance": "distance seen, tokens",
}


def watching_figure(history: Sequence[dict[str, Any]]) -> Figure | None:
    """The gradient's norm and what attention keeps, layer by layer, against the step; None if none of it was logged."""
    import matplotlib

    panels: dict[str, list[tuple[list[float], list[float]]]] = {"gradient norm": [series(history, "grad_norm")]}
    names = list(dict.fromkeys(name for entry in history for name in entry))
    for name, words in WATCHED.items():
        panels[words] = [
            series(history, key) for key in names if key.removeprefix("eval_").startswith(f"{name}/layer_")
        ]
    panels = {words: curves for words, curves in panels.items() if any(steps for steps, _ in curves)}
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with _style():
        figure, axes = _figure(WIDTH, 2.3 * rows + 0.4, rows, columns, squeeze=False, sharex=True)
        places = list(axes.flat)
        for one in places[len(panels) :]:
            one.set_axis_off()
        for one, (words, curves) in zip(places, panels.items(), strict=False):
            shades = matplotlib.colormaps["viridis"]([i / max(1, len(curves) - 1) * 0.9 for i in range(len(curves))])
            for i, (steps, values) in enumerate(curves):
                color = BLUE if len(curves) == 1 else shades[i]
                label = {0: "first layer", len(curves) - 1: "last layer"}.get(i) if len(curves) > 1 else None
                one.plot(steps, values, color=color, linewidth=1.3, label=label, marker="o" if len(steps) == 1 else "")
            one.set_ylabel(words)
            one.set_ylim(bottom=0)
        labelled = [one for one in places if one.get_legend_handles_labels()[0]]
        if labelled:  # above the panels, for in each of them curves may be anywhere
            figure.legend(*labelled[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        for one in places[max(0, len(panels) - columns) : len(panels)]:
            one.set_xlabel("Step")
            one.xaxis.set_tick_params(labelbottom=True)
    return figure


def _curves(history: Sequence[dict[str, Any]], label: str, **names: str) -> Figure:
    """Curves of up to two names of the log history, each with its words for the legend."""
    with _style():
        figure, axes = _figure(WIDTH, 3.4)
        drawn = 0
        for (name, words), color in zip(names.items(), (BLUE, ORANGE), strict=False):
            steps, values = series(history, name)
            if values:
                # Held-out figures are few, and a single point has no line: both need marks to be seen.
                marker = "o" if name.startswith("eval_") or len(values) == 1 else ""
                axes.plot(steps, values, color=color, marker=marker, markersize=4, linewidth=1.5, label=words)
                drawn += 1
        axes.set(xlabel="Step", ylabel=label)
        if drawn > 1:
            axes.legend()
        elif not drawn:
            axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes, color=GREY)
    return figure


def comparison_figure(bits: dict[str, float]) -> Figure:
    """Bits per byte of the model beside those of the baselines, fewest first; the bar of ``model`` stands out."""
    ordered = sorted(bits.items(), key=lambda item: item[1])
    names = ["this model" if name == "model" else name.replace(" after ", "\nafter ") for name, _ in ordered]
    colors = [BLUE if name == "model" else GREY for name, _ in ordered]
    return _bars(
        names, [value for _, value in ordered], colors, "Bits per byte of held-out text (fewer: better)", "{:.3f}"
    )


def stage_time_figure(seconds: dict[str, float]) -> Figure:
    """How long each stage of the run took, in the order given."""
    longest = max(seconds.values(), default=0)
    unit, divisor = ("minutes", 60) if longest >= 120 else ("seconds", 1)
    values = [value / divisor for value in seconds.values()]
    return _bars(list(seconds), values, [BLUE] * len(values), f"Time ({unit})", "{:.1f}")


def _bars(names: list[str], values: list[float], colors: list[str], label: str, number: str) -> Figure:
    with _style():
        figure, axes = _figure(WIDTH, 0.9 + 0.42 * max(1, len(names)))
        bars = axes.barh(range(len(names)), values, color=colors, height=0.62)
        axes.bar_label(bars, labels=[number.format(v) for v in values], padding=4, fontsize=10)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max([*values, 1e-9]))
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    return figure


def expert_use_figure(counts: np.ndarray) -> Figure:
    """A panel for each layer: its experts, the most used first, against how often each was chosen.

    Args:
        counts: (layers, experts), how often each was chosen; every layer has some.
    """
    layers, experts = counts.shape
    columns = min(2, layers)
    rows = math.ceil(layers / columns)
    relative = -np.sort(-counts / counts.mean(axis=1, keepdims=True), axis=1)  # 1: as often as in even use
    seen = relative[relative > 0]
    with _style():
        figure, grid = _figure(WIDTH, 1.1 + 1.55 * rows, rows, columns, sharex=True, sharey=True, squeeze=False)
        for number, (axes, use) in enumerate(zip(grid.flat, relative, strict=False), 1):
            used = int((use > 0).sum())
            # 16,384 experts are more points than the picture has dots: a few hundred, most of them at the steep start.
            places = np.concatenate([np.linspace(0, used - 1, 200), np.geomspace(1, used, 100) - 1])
            places = np.unique(places.round().astype(int))
            axes.axvspan(100 * used / experts, 100, color=PALE, linewidth=0, label="never chosen")
            axes.axhline(1, color=GREY, linestyle="--", linewidth=1.2, label="even use")
            mark = "o" if used == 1 else ""
            axes.plot(100 * (places + 0.5) / experts, use[places], BLUE, marker=mark, linewidth=1.8, label="experts")
            axes.set_title(f"Layer {number}: {percent(1 - used / experts)} never chosen", loc="left", fontsize=10)
            axes.tick_params(which="minor", length=0)
        low, high = min(0.1, seen.min() / 1.5), max(10.0, seen.max() * 1.5)
        axes.set(xlim=(0, 100), xticks=(0, 25, 50, 75), yscale="log", ylim=(low, high))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        for axes in grid.flat[layers:]:
            axes.set_visible(False)
        figure.supxlabel("Experts of the layer, most used first (%)", fontsize=11)
        figure.supylabel("Chosen, against even use", fontsize=11)
        handles, words = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles[::-1], words[::-1], loc="outside upper center", ncols=3)
    return figure


def percent(share: float) -> str:
    """A share as a per cent that is 0 or 100 only if the share is: ``7.9 %``, ``< 0.1 %``."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %" if share else "0 %"


def attention_figure(attention: np.ndarray, scores: np.ndarray, tokens: Sequence[str], title: str) -> Figure:
    """One head: a strip of the scores of its keys, and below it who reads whom.

    Args:
        attention: (T, T), probability that query i (row) gives to key j (column).
        scores: (T,), the score s of each key.
        tokens: T short labels.
        title: stands above the strip.
    """
    count = len(tokens)
    with _style():
        width = max(WIDTH, 0.17 * count + 1.3)  # for labels of 10 points one below another, beside the widest label
        figure, (strip, grid) = _figure(width, width + 0.6, rows=2, height_ratios=[1, max(10, count)], sharex=True)
        shown = strip.imshow(np.asarray(scores)[None, :], cmap="cividis", aspect="auto", interpolation="nearest")
        strip.set_yticks([0], ["score s"])
        strip.set_title(title, loc="left", parse_math=False)
        strip.tick_params(bottom=False, left=False)
        low, high = float(np.min(scores)), float(np.max(scores))
        if math.isclose(low, high):
            shown.set_clim(low - 0.5, high + 0.5)
        # What a query cannot read, the future and what the window dropped, is white; a read of nearly 0 is not.
        readable = np.ma.masked_where(np.asarray(attention) == 0, attention)
        heat = grid.imshow(readable, cmap="YlGnBu", vmin=0, aspect="auto", interpolation="nearest")
        for axis, rotation in ((grid.xaxis, 90), (grid.yaxis, 0)):
            axis.set_ticks(range(count), list(tokens), rotation=rotation, family="DejaVu Sans Mono")
            for text in axis.get_ticklabels():
                text.set_parse_math(False)
        grid.set(xlabel="key: the token that is read", ylabel="query: the token that reads")
        for axes in (strip, grid):
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        grid.tick_params(length=0)
        strip.tick_params(labelbottom=False)
        # In the corner that is white in every picture, where it takes no width from the cells.
        bar = grid.inset_axes((0.5, 0.86, 0.46, 0.03))
        figure.colorbar(heat, cax=bar, orientation="horizontal", label="attention probability")
        # The strip's own numbers are said in words: a second colour bar would be taller than the strip.
        strip.set_xlabel(f"scores from {low:.2f} (dark) to {high:.2f} (bright)", fontsize=9)
    return figure


def attention_and_scores(model: Any, input_ids: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What each layer of a Doge model attends to, and the scores of its keys.

    Args:
        model: a DogeForCausalLM that returns attention probabilities.
        input_ids: (1, T) token ids on the model's device.

    Returns:
        For each layer the probabilities, (H, T, T) float32, and the scores s = exp(A · softplus(dt)), (M, T) float32,
        for H query heads and M score heads (query head h has the scores of head h · M // H).
    """
    import torch
    import torch.nn.functional as F

    layers = model.model.layers
    dts: dict[int, torch.Tensor] = {}
    hooks = [
        layer.self_attn.dt_proj.register_forward_hook(lambda _, __, dt, at=index: dts.update({at: dt}))
        for index, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            weights = model(input_ids=input_ids, output_attentions=True, use_cache=False).attentions
    finally:
        for hook in hooks:
            hook.remove()
    attentions = [w[0].float().cpu().numpy() for w in weights]
    scores = []
    for index, layer in enumerate(layers):
        s = torch.exp(layer.self_attn.A.float() * F.softplus(dts[index][0].float()))
        scores.append(s.T.detach().cpu().numpy())
    return attentions, scores
