"""Draw the figures of the documentation with the project's own functions, into docs/images.

    python docs/figures.py

Every picture is computed: masks by ``ops.dynamic_mask``, slots by the cache, candidates by ``ops.product_key``, rates
by ``training.schedule`` from the recipe of 20m. Scores come from a fixed seed: the same versions give the same files.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from small_doge import recipe
from small_doge.models.cache_layer import DynamicMaskLayer
from small_doge.ops.dynamic_mask import eviction_times, ranks, reference, visible_keys
from small_doge.ops.dynamic_mask.reference import kept_keys
from small_doge.ops.product_key import retrieve
from small_doge.report.plots import BLUE, GREY, ORANGE, PALE, _figure, _style, to_svg
from small_doge.training.schedule import set_schedule

DOCS = Path(__file__).resolve().parent
RECIPE = DOCS.parent / "recipes" / "doge-20m" / "pretrain.yaml"
GREEN, SKY = "#009E73", "#9CCBEB"
WIDE = 6.4  # inches; on a phone the labels then keep some 9 pixels


def some_scores(count: int, seed: int = 233) -> np.ndarray:
    """(count,) scores of the size that a trained head has, around 1."""
    return np.exp(0.35 * np.random.default_rng(seed).standard_normal(count))


def evictions(scores: np.ndarray, window: int) -> np.ndarray:
    """(T,) scores → (T,) eviction times, held to the mask that the reference builds."""
    s = torch.tensor(scores)[None, None]
    e = eviction_times(s, window)[0, 0].numpy()
    i, j = np.mgrid[: len(scores), : len(scores)]
    mask = kept_keys(s, visible_keys(len(scores), len(scores), s.device), window)[0, 0].numpy()
    assert (mask == ((j <= i) & (i < e[j]))).all()
    return e


def interval_masks() -> Figure:
    """Who sees whom for equal scores, random ones, and scores that favour a few keys."""
    T, w = 64, 16
    rng = np.random.default_rng(7)
    favoured = 1 + 0.02 * rng.standard_normal(T)
    favoured[[3, 9, 10, 22, 37, 41]] = 2.2
    panels = {"Equal scores": np.ones(T), "Random scores": some_scores(T), "Six keys stand out": favoured}
    with _style():
        figure, axes = _figure(WIDE, 3.1, 2, 3, height_ratios=[1, 10], sharex=True)
        for column, (title, scores) in enumerate(panels.items()):
            strip, grid = axes[0, column], axes[1, column]
            strip.bar(np.arange(T), scores, width=1, color=GREY, linewidth=0)
            strip.set_title(title, loc="left")
            strip.set_ylim(0, 2.6)
            e = evictions(scores, w)
            grid.bar(np.arange(T), e - np.arange(T), width=1, bottom=np.arange(T) - 0.5, color=BLUE, linewidth=0)
            grid.set(xlim=(-0.5, T - 0.5), ylim=(T - 0.5, -0.5), aspect="equal", xlabel="key j")
            for one in (strip, grid):
                one.grid(visible=False)
                one.set(xticks=[], yticks=[])
            strip.spines[:].set_visible(False)
        axes[0, 0].set_ylabel("s", rotation=0, labelpad=8, va="center")
        axes[1, 0].set_ylabel("query i")
    return figure


def eviction_picture() -> Figure:
    """Scores, the w-th best of every prefix, and until when each key is seen."""
    T, w = 48, 8
    scores = some_scores(T)
    e = evictions(scores, w)
    order = ranks(torch.tensor(scores)).numpy()
    threshold = [scores[np.argsort(order[: i + 1])[-w]] if i + 1 >= w else np.nan for i in range(T)]
    with _style():
        figure, axes = _figure(WIDE, 3.8)
        never = e == np.arange(T)
        axes.hlines(scores, np.arange(T), e, color=SKY, linewidth=2.4, label="queries that see the key")
        axes.plot(np.arange(T)[~never], scores[~never], "o", color=BLUE, markersize=4.5, label="key j, at its score")
        axes.plot(np.arange(T)[never], scores[never], "x", color=GREY, markersize=6, label="a key that nobody sees")
        # The value at i holds from i on: query i is the first that a key below it is hidden from.
        axes.step(np.arange(T), threshold, where="post", color=ORANGE, linewidth=2, label=f"t: the {w}th best so far")
        axes.set(xlabel="position", ylabel="score s", xlim=(-1, T), ylim=(0.35, scores.max() + 0.25))
        axes.legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.22), columnspacing=1.2, handlelength=1.4)
    return figure


def cache_slots() -> Figure:
    """What the slots of the bounded cache hold while a text comes in, and how much a cache that grows would."""
    T, w = 48, 8
    scores = some_scores(T)
    s = torch.tensor(scores)[None, None]
    kept = kept_keys(s, visible_keys(T, T, s.device), w)[0, 0]
    layer = DynamicMaskLayer(w)
    held = np.full((w, T), -1)
    for i in range(T):
        nothing = torch.zeros(1, 1, 1, 2)
        new = layer.describe(nothing, nothing, s[:, :, i : i + 1])
        slots = (layer.step(new) if i else layer.extend(new)).arrivals[0, 0].numpy()
        slots = slots[: min(i + 1, w)]
        held[: len(slots), i] = slots
        assert set(slots) == set(kept[i].nonzero().flatten().tolist())
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, T))
    with _style():
        figure, (top, bottom) = _figure(WIDE, 4.2, 2, 1, height_ratios=[2.2, 1], sharex=True)
        for slot, row in enumerate(held):
            start = 0
            for key, group in itertools.groupby(row):
                length = len(list(group))
                if key >= 0:
                    bar = {"height": 0.86, "edgecolor": "white", "linewidth": 1}
                    top.barh(slot, length, left=start, color=shades[key], **bar)
                    if length > 1:
                        color = "white" if key < 0.7 * T else "black"
                        top.text(start + 0.35, slot, str(key), va="center", fontsize=8.5, color=color)
                start += length
        top.set(yticks=range(w), yticklabels=range(1, w + 1), ylabel="slot", ylim=(w - 0.5, -0.5))
        top.set_title("The key that each slot holds, by its position", loc="left")
        top.grid(visible=False)
        steps = np.arange(1, T + 1)
        bottom.step(np.r_[0, steps], np.r_[0, steps], where="pre", color=GREY, label="a cache that grows")
        bottom.step(np.r_[0, steps], np.r_[0, (held >= 0).sum(0)], where="pre", color=BLUE, label="DynamicMaskCache")
        bottom.set(xlabel="tokens", ylabel="keys held", xlim=(0, T), ylim=(0, T))
        bottom.legend(loc="upper left")
    return figure


def folded_scores() -> Figure:
    """Logits of q and k, the scores, and logits of q' and k': the third is the sum of the others."""
    T, D = 14, 8
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((2, T, D))
    s = some_scores(T, 3)
    wide_q = np.concatenate([q, np.ones((T, 1))], axis=1)
    wide_k = np.concatenate([k, D**0.5 * s[:, None]], axis=1)
    products, sums = q @ k.T / D**0.5, wide_q @ wide_k.T / D**0.5
    assert np.allclose(products + s, sums)
    q4, k4, s4 = (torch.tensor(x)[None, None] for x in (q, k, s))
    _, weights = reference(q4, k4, k4, s4, T)
    wanted = np.where(np.tri(T, dtype=bool), np.exp(sums), 0)
    assert np.allclose(weights[0, 0].numpy(), wanted / wanted.sum(axis=1, keepdims=True))
    panels = {"q · k / √D": products, "+  s": np.broadcast_to(s, (T, T)), "=  q′ · k′ / √D": sums}
    limit = max(float(np.abs(x).max()) for x in panels.values())
    with _style():
        figure, axes = _figure(WIDE, 2.5, 1, 3, sharey=True)
        for one, (title, values) in zip(axes, panels.items(), strict=True):
            shown = np.ma.masked_where(~np.tri(T, dtype=bool), values)
            drawn = one.pcolormesh(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.5)
            one.set(ylim=(T, 0), aspect="equal", xticks=[], yticks=[], xlabel="key j")
            one.set_title(title, loc="left")
            one.grid(visible=False)
            one.spines[:].set_visible(False)
        axes[0].set_ylabel("query i")
        figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02)
    return figure


def sorted_tiles() -> Figure:
    """Which tiles a kernel has to read, with keys by position and with keys sorted by eviction time inside blocks."""
    T, w, block, tile = 256, 48, 64, 16
    e = evictions(some_scores(T), w)
    sorted_keys = np.concatenate([b + np.argsort(-e[b : b + block], kind="stable") for b in range(0, T, block)])
    i = np.arange(T)[:, None]
    with _style():
        figure, axes = _figure(WIDE, 3.9, 1, 2, sharey=True)
        for one, (title, keys) in zip(
            axes, {"by position": np.arange(T), "sorted by e": sorted_keys}.items(), strict=True
        ):
            seen = (keys <= i) & (i < e[keys])
            share = seen.reshape(T // tile, tile, T // tile, tile).mean(axis=(1, 3))
            for (row, column), part in np.ndenumerate(share):
                if part:
                    color = SKY if part == 1 else PALE
                    one.add_patch(Rectangle((column * tile, row * tile), tile, tile, facecolor=color, linewidth=0))
            one.bar(np.arange(T) + 0.5, e[keys] - keys, width=1, bottom=keys, color=BLUE, linewidth=0, alpha=0.75)
            partly = int(((share > 0) & (share < 1)).sum())
            one.set_title(f"Keys {title}: {int((share > 0).sum())} tiles,\n{partly} of them with a mask", loc="left")
            one.set(xlim=(0, T), ylim=(T, 0), aspect="equal", xlabel="key, in blocks of 64")
            one.set_xticks(range(0, T + 1, block))
            one.set_yticks(range(0, T + 1, block))
            one.grid(color="#BBBBBB", linewidth=0.7)
            one.set_axisbelow(False)
        axes[0].set_ylabel("query i")
    return figure


def product_keys() -> Figure:
    """Sums of two sorted halves: the candidates under the hyperbola, and the k that are chosen."""
    K, k = 16, 8
    logits = np.random.default_rng(12).standard_normal(2 * K)
    _, indices = retrieve(torch.tensor(logits), k)
    rows, columns = np.argsort(-logits[:K], kind="stable"), np.argsort(-logits[K:], kind="stable")
    sums = logits[:K][rows][:, None] + logits[K:][columns]
    rank_of_row, rank_of_column = np.argsort(rows), np.argsort(columns)
    chosen = [(rank_of_row[int(e) // K], rank_of_column[int(e) % K]) for e in indices]
    best = {divmod(int(at), K) for at in np.argsort(-sums, axis=None, kind="stable")[:k]}
    assert set(chosen) == best
    assert all((i + 1) * (j + 1) <= k for i, j in chosen)
    with _style():
        figure, axes = _figure(5.4, 4.6)
        drawn = axes.pcolormesh(sums, cmap="Greys", edgecolors="white", linewidth=0.5, vmax=2.2 * sums.max())
        candidates = [(i, j) for i in range(K) for j in range(K) if (i + 1) * (j + 1) <= k]
        for i, j in candidates:
            box = {"fill": False, "edgecolor": ORANGE, "linewidth": 1.6, "zorder": 3}
            axes.add_patch(Rectangle((j + 0.06, i + 0.06), 0.88, 0.88, **box))
        axes.plot([j + 0.5 for _, j in chosen], [i + 0.5 for i, _ in chosen], "o", color=BLUE, markersize=8, zorder=4)
        axes.plot([], [], "s", markerfacecolor="none", markeredgecolor=ORANGE, label=f"{len(candidates)} candidates")
        axes.plot([], [], "o", color=BLUE, label=f"the {k} chosen of {K * K}")
        axes.set(ylim=(K, 0), aspect="equal", xlabel="rank in ry, best first", ylabel="rank in rx, best first")
        ticks = [0, 5, 10, 15]
        axes.set_xticks([t + 0.5 for t in ticks], ticks)
        axes.set_yticks([t + 0.5 for t in ticks], ticks)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.legend(loc="lower right", frameon=True, facecolor="white", framealpha=0.95, edgecolor="none")
        figure.colorbar(drawn, ax=axes, shrink=0.7, label="score S")
    return figure


def rates(steps: int, carried: bool | None = None, **fields: Any) -> np.ndarray:
    """The learning rate of every step of a run, as ``doge pretrain`` with the recipe of 20m sets it."""
    from transformers import get_scheduler

    defaults = {"decay": False, "decay_type": "1-sqrt", "min_lr_ratio": 0.0, "rewarmup_steps": 50}
    args = SimpleNamespace(**{**defaults, **recipe.read_yaml(RECIPE), **fields})
    args.get_warmup_steps = lambda _: args.warmup_steps
    set_schedule(args, steps, carried)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=args.warmup_steps,
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return args.learning_rate * np.array([scheduler.lr_lambdas[0](step) for step in range(steps + 1)])


def wsd() -> Figure:
    """The rate of the recipe of 20m, and the three shapes of its decay."""
    steps = recipe.read_yaml(RECIPE)["max_steps"]
    with _style():
        figure, axes = _figure(WIDE, 3.2)
        styles = {"1-sqrt": (BLUE, "-"), "linear": (ORANGE, "--"), "cosine": (GREEN, "-.")}
        for kind, (color, line) in reversed(styles.items()):
            axes.plot(rates(steps, decay_type=kind), color=color, linestyle=line, linewidth=2, label=kind)
        axes.set(xlabel="step", ylabel="learning rate", xlim=(0, steps), ylim=(0, 0.0093))
        for x, words in ((400, "warmup"), (4000, "stable"), (7600, "decay")):
            axes.text(x, 0.00845, words, ha="center", color="#444444")
        handles, words = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], words[::-1], title="decay_type", loc="lower center")
    return figure


def wsd_continued() -> Figure:
    """What can follow from a checkpoint of the stable stage."""
    steps, at = recipe.read_yaml(RECIPE)["max_steps"], 6000
    with _style():
        figure, axes = _figure(WIDE, 3.3)
        on = rates(steps, carried=True)
        axes.plot(at + np.arange(len(on)), on, color=GREEN, linewidth=2, linestyle="--", label="--continue_from")
        axes.plot(rates(steps), color=GREY, linewidth=2, label="the run itself")
        down = rates(800, carried=True, decay=True)
        axes.plot(at + np.arange(len(down)), down, color=BLUE, linewidth=2, label="--continue_from … --decay")
        axes.plot([at], [on[0]], "o", color=ORANGE, markersize=7, zorder=5, label=f"checkpoint-{at}")
        axes.set(xlabel="step of all", ylabel="learning rate", xlim=(0, at + steps + 100), ylim=(0, 0.0087))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


FIGURES = {
    "interval_masks": interval_masks,
    "eviction_times": eviction_picture,
    "cache_slots": cache_slots,
    "folded_scores": folded_scores,
    "sorted_tiles": sorted_tiles,
    "product_keys": product_keys,
    "wsd": wsd,
    "wsd_continued": wsd_continued,
}


def main() -> None:
    """Write every figure."""
    folder = DOCS / "images"
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        path = folder / f"{name}.svg"
        path.write_text(to_svg(draw()) + "\n", encoding="utf-8", newline="\n")
        print(f"wrote docs/images/{path.name}, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
